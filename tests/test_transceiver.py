"""Both ends: what a message stands for, what the receiver does without its parts, equal pictures bit for bit."""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import tiny_network

from guided_diffusion import EarlyStop, InputError, NoiseBank, encode_semantics
from guided_diffusion.data.semantics import SemanticCoding, received_semantics
from guided_diffusion.link.message import Message, Reception, receive_parts
from guided_diffusion.link.selection import Chain, StepCodebook, select_both, select_initial, select_per_step
from guided_diffusion.link.transceiver import Header, Receiver, Transmitter, condition

CLASSES, SIZE, T = 4, (8, 16), 6
TEMPLATE = Header(height=1, width=1, num_classes=CLASSES, bank_size=16, steps=str(T))


def scene(seed=0, size=SIZE):
    """One scene whose instances never span classes."""
    stream = torch.Generator().manual_seed(seed)
    coarse = torch.randint(CLASSES, (1, 1, size[0] // 4, size[1] // 4), generator=stream)
    label = coarse.repeat_interleave(4, 2).repeat_interleave(4, 3)
    instance = label * 1000
    instance[..., : size[1] // 2] += 1
    edge = torch.randint(256, (1, 1, *size), generator=stream) / 255
    image = torch.rand(1, 3, *size, generator=stream) * 2 - 1
    return {"label": label, "instance": instance, "image_edge": edge, "image": image}


@pytest.fixture(scope="module", params=[False, True], ids=["fixed", "learned"])
def network(request):
    """A tiny UNet whose output layer is not zero, with fixed and with learned variance, and its flags."""
    return tiny_network(
        num_classes=CLASSES,
        learn_sigma=request.param,
        timestep_respacing=str(T),
        noise_schedule="cosine",
        prediction="v",
    )


def chains(network, rule=None):
    """Function Header -> Chain, as a receiver makes it; without a stop step, `rule` stops."""

    def make(header):
        stop = EarlyStop(float("inf"), 1, header.stop_step) if header.stop_step else rule
        bank = NoiseBank((3, header.height, header.width), header.bank_size, header.bank_seed)
        return Chain(
            *network,
            bank,
            method=header.method,
            s=header.s,
            eta=header.eta,
            early_stop=stop,
            tail_steps=header.tail_steps,
            selected_steps=header.selected_steps or None,
        )

    return make


def sender(coding=None, header=TEMPLATE, **options):
    coding = coding or SemanticCoding()
    header = dataclasses.replace(header, label_scale=coding.label_scale, edge_scale=coding.edge_scale)
    return Transmitter(header, coding, chain=None, **options)


# -- what a message stands for ----------------------------------------------------------------------------------------


def test_without_loss_the_conditioning_is_that_of_the_scene():
    message, y = sender(SemanticCoding(1, 256)).describe(scene())
    parts = (scene()[name] for name in ("label", "instance", "image_edge"))
    assert torch.equal(y, encode_semantics(*parts, CLASSES))
    assert torch.equal(y, condition(message.header, message.label, message.boundary, message.edges))
    assert message.boundary.any()


@pytest.mark.parametrize("coding", [(1, 0), (1, 2), (4, 2, 0.5, 2), (2, 16, 0.3, 4), (8, 256, 0.3, 8)])
@pytest.mark.parametrize("missing", [(), ("instance",), ("image_edge",), ("instance", "image_edge")])
@pytest.mark.parametrize("form", [{}, {"one_hot": False}, {"edge_plane": False}])
def test_both_ends_build_equal_conditioning(coding, missing, form):
    found = {name: plane for name, plane in scene(size=(12, 20)).items() if name not in missing}
    coding = SemanticCoding(*coding)
    message, y = sender(coding, dataclasses.replace(TEMPLATE, **form)).describe(found)
    message = dataclasses.replace(message, start_index=3)
    received = Receiver(None).accept(receive_parts(message.parts()))
    again = Message.from_bytes(message.to_bytes())
    assert torch.equal(received.y, y) and received.start == 3 and received.problems == ()
    assert torch.equal(condition(again.header, again.label, again.boundary, again.edges), y)
    wanted = received_semantics(
        found["label"],
        found.get("instance"),
        found.get("image_edge"),
        CLASSES,
        form.get("one_hot", True),
        form.get("edge_plane", True),
        coding,
    )
    assert torch.equal(y, wanted)


# -- the transmitter --------------------------------------------------------------------------------------------------


def test_without_a_choice_the_start_is_sent_as_it_is():
    sent = sender().send(scene(), 5)
    assert sent.choice is None and sent.message.start_index == 5 and sent.message.header.stop_step == 0
    assert sender(header=dataclasses.replace(TEMPLATE, start_sent=False)).send(scene(), 0).message.start_index is None


def test_a_choice_needs_the_picture(network):
    labels_alone = {"label": scene()["label"]}
    with pytest.raises(InputError, match="this split has labels alone"):
        sender(choose=lambda *_: None).send(labels_alone, 0)
    chain = chains(network)(TEMPLATE)
    local = Transmitter(TEMPLATE, SemanticCoding(1, 0), chain, local=True).send(labels_alone, 2)
    assert local.choice.index == 2 and local.choice.score is None and local.choice.evaluations == T
    assert torch.equal(local.choice.picture, chain.run(local.y, [2]).images[0])


STEPS = {"selected_steps": 3, "step_candidates": 16, "step_atoms": 2, "step_variance": "posterior"}
OPERATIONS = {
    "random": {},
    "ddim": {"method": "ddim"},
    "ddim, eta": {"method": "ddim", "eta": 0.3},  # not a single-precision number
    "dpm++": {"method": "dpm++"},
    "dpm++, best": {"method": "dpm++", "choose": "best", "s": 1.7},
    "guided": {"s": 1.7},
    "tail": {"tail_steps": 2},
    "best": {"choose": "best"},
    "best, tail": {"choose": "best", "tail_steps": 3, "s": 2.0},
    "per step": {"choose": "per_step", "start_sent": False, **STEPS},
    "per step, ddim": {"choose": "per_step", "method": "ddim", "eta": 1.0, **STEPS, "step_variance": "model"},
    "both": {"choose": "both", **STEPS, "tail_steps": 2, "s": 1.5},
}


def chooser(kind):
    codebook = StepCodebook(16, 2)
    return {
        None: None,
        "best": lambda chain, y, found, start, on_step: select_initial(chain, y, found["image"], range(3)),
        "per_step": lambda chain, y, found, start, on_step: select_per_step(chain, y, found["image"], start, codebook),
        "both": lambda chain, y, found, start, on_step: select_both(chain, y, found["image"], range(3), codebook),
    }[kind]


@pytest.mark.parametrize("operation", OPERATIONS)
def test_after_an_error_free_channel_the_pictures_are_equal_bit_for_bit(network, operation):
    flags = dict(OPERATIONS[operation])
    choose = chooser(flags.pop("choose", None))
    header = dataclasses.replace(TEMPLATE, height=SIZE[0], width=SIZE[1], **flags)
    transmitter = Transmitter(header, SemanticCoding(1, 2), chains(network)(header), choose, local=True)
    found = scene()
    sent = transmitter.send(found, 0 if not header.start_sent else 7)
    receiver = Receiver(chains(network))
    message = Message.from_bytes(sent.message.to_bytes())
    result = receiver.pictures([receiver.accept(receive_parts(message.parts()))])
    assert torch.equal(result.images[0], sent.choice.picture) and result.steps.tolist() == [T]
    assert len(message.codewords) == header.selected_steps
    assert message.start_index == (sent.choice.index if header.start_sent else None)
    other = chains(network)(header).run(sent.y, [(sent.choice.index + 1) % 16]).images[0]
    assert (other - sent.choice.picture).abs().max() > 1e-3  # the index matters


@pytest.mark.parametrize("method", ["ddpm", "ddim", "dpm++"])
@pytest.mark.parametrize("min_steps", [2, 4, T])
def test_the_receiver_stops_where_the_transmitter_did(network, method, min_steps):
    header = dataclasses.replace(TEMPLATE, height=SIZE[0], width=SIZE[1], method=method)
    rule = EarlyStop(10.0, 1, min_steps)
    transmitter = Transmitter(header, SemanticCoding(1, 0), chains(network, rule)(header), local=True)
    sent = transmitter.send(scene(), 4)
    assert sent.choice.steps == min_steps and sent.message.header.stop_step == min_steps % T
    receiver = Receiver(chains(network))  # does not know the rule
    result = receiver.pictures([receiver.accept(receive_parts(sent.message.parts()))])
    assert torch.equal(result.images[0], sent.choice.picture) and result.steps.tolist() == [min_steps]


def test_arrivals_with_different_stop_steps_share_a_batch(network):
    make, sents = chains(network), []
    header = dataclasses.replace(TEMPLATE, height=SIZE[0], width=SIZE[1])
    for number, stop in enumerate((2, 4, 2)):
        chain = chains(network, EarlyStop(10.0, 1, stop))(header)
        sents.append(Transmitter(header, SemanticCoding(1, 0), chain, local=True).send(scene(number), number))
    receiver = Receiver(make)
    result = receiver.pictures([receiver.accept(receive_parts(sent.message.parts())) for sent in sents])
    assert result.steps.tolist() == [2, 4, 2]
    for image, sent in zip(result.images, sents, strict=True):
        torch.testing.assert_close(image, sent.choice.picture, rtol=0, atol=1e-4)


# -- what the receiver does without a part ----------------------------------------------------------------------------


def lossy(message, *lost, prefix=b""):
    return receive_parts({name: None if name in lost else part for name, part in message.parts().items()}, prefix)


@pytest.fixture
def messages():
    """Messages of two scenes, of one size, with picks."""
    header = dataclasses.replace(TEMPLATE, height=SIZE[0], width=SIZE[1], **STEPS)
    transmitter = sender(SemanticCoding(1, 2), header)
    codewords = (((1, 5), (1, -1)), ((0, 15), (-1, -1)), ((2, 3), (1, 1)))
    found = []
    for seed in (0, 1):
        message, _ = transmitter.describe(scene(seed))
        found.append(dataclasses.replace(message, start_index=9, codewords=codewords))
    return found


def test_lost_labels_are_the_last_good_ones(messages):
    receiver = Receiver(None)
    first = receiver.accept(lossy(messages[0], "labels"))
    assert first.problems == ("labels",) and first.y.shape == (1, CLASSES + 1, *SIZE) and not first.y.any()
    receiver.accept(lossy(messages[0]))
    second = receiver.accept(lossy(messages[1], "labels"))
    assert torch.equal(second.y, condition(messages[0].header, messages[0].label)) and second.start == 9
    assert len(second.codewords) == 3
    assert not torch.equal(receiver.accept(lossy(messages[1])).y, second.y)


def test_labels_of_another_size_are_no_substitute(messages):
    receiver = Receiver(None)
    receiver.accept(
        lossy(dataclasses.replace(sender(SemanticCoding(1, 0)).describe(scene(2, (12, 20)))[0], start_index=1))
    )
    assert not receiver.accept(lossy(messages[1], "labels")).y.any()


def test_a_lost_header_is_the_last_one_and_nothing_at_first(messages):
    receiver = Receiver(None)
    assert receiver.accept(lossy(messages[0], "header")) is None
    assert receiver.accept(Reception(problems=("header",))) is None
    receiver.accept(lossy(messages[0]))
    arrival = receiver.accept(lossy(messages[1], "header"))
    assert arrival.header == messages[0].header and arrival.problems == ("header",)
    assert (arrival.start, arrival.codewords) == (0, ())
    assert torch.equal(arrival.y, condition(messages[0].header, messages[0].label))


def test_without_edges_class_boundaries_stay(messages):
    arrival = Receiver(None).accept(lossy(messages[0], "edges"))
    label = torch.from_numpy(messages[0].label.astype(np.int64))[None, None]
    assert torch.equal(arrival.y, encode_semantics(label, label, None, CLASSES)) and arrival.y[0, CLASSES].any()
    assert arrival.problems == ("edges",) and arrival.start == 9


@pytest.mark.parametrize("kept", range(5))
def test_lost_indices_leave_their_valid_beginning(network, messages, kept):
    message = messages[0]
    whole = message.parts()["indices"]
    arrival = Receiver(None).accept(lossy(message, "indices", prefix=whole[:kept]))
    count = max(0, 8 * kept - 4) // 9  # 4 bits of the start, then 7 + 2 for each pick
    assert arrival.codewords == message.codewords[:count] and arrival.start == (9 if kept else 0)
    assert arrival.problems == ("indices",)
    if kept == 2:
        make = chains(network)
        image = Receiver(make).pictures([arrival]).images
        assert torch.equal(image, make(message.header).run(arrival.y, [9], [message.codewords[:1]]).images)
        assert not torch.equal(image, make(message.header).run(arrival.y, [9]).images)


def test_a_receiver_recalls_what_an_earlier_run_had(messages):
    receiver, again = Receiver(None), Receiver(None)
    receiver.accept(lossy(messages[0]))
    receiver.accept(lossy(messages[1], "labels"))
    again.recall(messages[0])
    again.recall(messages[1], label=False)
    wanted, found = (r.accept(lossy(messages[1], "header")) for r in (receiver, again))
    assert torch.equal(wanted.y, found.y) and wanted.header == found.header
    again.recall(messages[1])
    assert not torch.equal(wanted.y, again.accept(lossy(messages[1], "header")).y)


def test_a_chain_maker_may_refuse(messages):
    def refuse(header):
        raise InputError("other weights")

    receiver = Receiver(refuse)
    with pytest.raises(InputError, match="other weights"):
        receiver.pictures([receiver.accept(lossy(messages[0]))])
