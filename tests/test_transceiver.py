"""Both ends and the channels between them: what a message stands for, lost parts, equal pictures bit for bit."""

import importlib.util
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_network

from guided_diffusion import EarlyStop, InputError, NoiseBank, encode_semantics
from guided_diffusion.data.semantics import SemanticCoding, received_semantics
from guided_diffusion.data.toy_scenes import draw_scene
from guided_diffusion.diffusion.solvers import SamplerSettings
from guided_diffusion.link import transceiver
from guided_diffusion.link.channel import transmit
from guided_diffusion.link.channel_coding import DigitalChannel
from guided_diffusion.link.color_layer import TRAINED, ColorPrior, encode_color
from guided_diffusion.link.message import Header, Session, to_bytes
from guided_diffusion.link.selection import Chain, StepCodebook, select_both, select_initial, select_per_step
from guided_diffusion.link.transceiver import AnalogChannel, Receiver, Transmitter, ideal_channel

CLASSES, SIZE, T = 4, (8, 16), 6
TEMPLATE = Header(height=8, width=16, num_classes=CLASSES, bank_size=16, sampler=SamplerSettings(steps=str(T)))
STEPS = {"selected_steps": 3, "step_candidates": 16, "step_atoms": 2}
needs_sionna = pytest.mark.skipif(importlib.util.find_spec("sionna") is None, reason="sionna-no-rt is not installed")


def stream(seed=0):
    return torch.Generator().manual_seed(seed)


def scene(seed=0, size=SIZE):
    """One scene whose instances never span classes."""
    draw = stream(seed)
    coarse = torch.randint(CLASSES, (1, 1, size[0] // 4, size[1] // 4), generator=draw)
    label = coarse.repeat_interleave(4, 2).repeat_interleave(4, 3)
    instance = label * 1000
    instance[..., : size[1] // 2] += 1
    edge = torch.randint(256, (1, 1, *size), generator=draw) / 255
    image = torch.rand(1, 3, *size, generator=draw) * 2 - 1
    return {"label": label, "instance": instance, "image_edge": edge, "image": image}


@pytest.fixture(scope="module", params=[False, True], ids=["fixed", "learned"])
def network(request):
    """A tiny UNet whose output layer is not zero, with fixed and with learned variance, and its process."""
    flags = {"num_classes": CLASSES, "learn_sigma": request.param, "timestep_respacing": str(T)}
    return tiny_network(**flags, noise_schedule="cosine", prediction="v")


def chains(network, rule=None):
    """Function Header -> Chain, as a receiver makes it; without a stop step, `rule` stops."""

    def make(header):
        stop = EarlyStop(float("inf"), 1, header.stop_step) if header.stop_step else rule
        bank = NoiseBank((3, header.height, header.width), header.bank_size, header.bank_seed)
        return Chain(*network, bank, header.sampler, early_stop=stop, selected_steps=header.selected_steps)

    return make


def sender(coding=None, header=TEMPLATE, **options):
    coding = coding or SemanticCoding()
    scales = {"label_scale": coding.label_scale, "edge_scale": coding.edge_scale}
    return Transmitter(
        Session(replace(header, **scales, edge_levels=coding.edge_levels)), coding, chain=None, **options
    )


@pytest.mark.parametrize("coding", [(1, 0), (1, 256), (4, 2, 0.5, 2), (2, 16, 0.3, 4)])
@pytest.mark.parametrize("missing", ["", "instance", "image_edge"])
@pytest.mark.parametrize("form", [{}, {"one_hot": False}, {"edge_plane": False}])
def test_both_ends_build_equal_conditioning(coding, missing, form):
    found = {name: plane for name, plane in scene(size=(12, 20)).items() if name != missing}
    transmitter = sender(SemanticCoding(*coding), replace(TEMPLATE, **form))
    message, y = transmitter.describe(found)
    again, _ = transmitter.session.from_bytes(to_bytes(transmitter.session.encode(message)))
    assert torch.equal(transceiver.condition(again), y)
    planes = found["label"], found.get("instance"), found.get("image_edge")
    form = form.get("one_hot", True), form.get("edge_plane", True)
    assert torch.equal(y, received_semantics(*planes, CLASSES, *form, SemanticCoding(*coding)))
    if coding == (1, 256) and not missing and form == (True, True):  # without loss
        assert torch.equal(y, encode_semantics(*planes, CLASSES))


@pytest.mark.parametrize(("target", "color_step"), [(110, 0), (130, 0), (200, 0), (400, 0), (200, 120), (400, 150)])
def test_message_spends_its_target_and_never_more(target, color_step):
    template = replace(TEMPLATE, height=32, width=64, num_classes=35, edge_plane=False, **STEPS)
    street = draw_scene(3, 32, 64)
    found = {"image": torch.from_numpy(street[0]).permute(2, 0, 1)[None] / 127.5 - 1, "path": ["street"]}
    found["label"] = torch.from_numpy(street[1].astype("int64"))[None, None]
    prior = ColorPrior.fit([draw_scene(seed, 32, 64)[0] for seed in range(4)])
    session = Session(template, color_prior=prior)
    transmitter = Transmitter(session, SemanticCoding(0, 0), None, color_step=color_step, target=lambda *size: target)
    message, y = transmitter.describe(found)
    parts = session.encode(replace(message, codewords=(((0, 1), (1, -1)),) * 3))
    size = len(to_bytes(parts))
    assert size <= target and y.shape == (1, 39, 32, 64)
    assert len(parts["labels"]) <= target / 3 or message.header.label_scale == 4
    if message.color:
        finer = encode_color(street[0], message.color[0] - 1, prior)
        assert size - len(message.color) + 1 + len(finer) > target or message.color[0] == max(color_step, TRAINED[0])
        assert message.color[0] >= color_step
    with pytest.raises(InputError, match="street: its smallest message without colours has"):
        Transmitter(session, SemanticCoding(0, 0), None, target=lambda *size: 20).describe(found)


def test_what_is_not_sent_is_the_null_conditioning():
    prior = ColorPrior.fit([draw_scene(seed, *SIZE)[0] for seed in range(4)])
    session, found = Session(replace(TEMPLATE, edge_plane=False), color_prior=prior), scene()
    for sent in (["labels"], ["color"]):
        transmitter = Transmitter(session, SemanticCoding(1, 0), None, sent=sent, color_step=100)
        message, y = transmitter.describe(found)
        again, bits = session.from_bytes(to_bytes(session.encode(message)))
        assert torch.equal(transceiver.condition(again, prior), y)
        assert y[:, :CLASSES].any() == (sent == ["labels"]) and y[:, CLASSES:].any() == (sent == ["color"])
        assert (bits["labels"] > 0, bits["color"] > 0) == (sent == ["labels"], sent == ["color"])


def test_transmitter_needs_the_picture_for_a_choice_alone(network):
    labels_alone, chain = {"label": scene()["label"]}, chains(network)(TEMPLATE)
    with pytest.raises(InputError, match="this split has labels alone"):
        sender(choose=lambda *_: None).send(labels_alone, 0)
    sent = sender().send(labels_alone, 5)
    assert sent.choice is None and sent.message.start_index == 5 and sent.message.header.stop_step == 0
    local = Transmitter(Session(TEMPLATE), SemanticCoding(1, 0), chain, local=True).send(labels_alone, 2)
    assert (local.choice.index, local.choice.score, local.choice.evaluations) == (2, None, T)
    assert torch.equal(local.choice.picture, chain.run(local.y, [2]).images[0])


CODEBOOK = StepCodebook(16, 2)
CHOOSERS = {
    "best": lambda chain, y, found, start, on_step: select_initial(chain, y, found["image"], range(3)),
    "per_step": lambda chain, y, found, start, on_step: select_per_step(chain, y, found["image"], start, CODEBOOK),
    "both": lambda chain, y, found, start, on_step: select_both(chain, y, found["image"], range(3), CODEBOOK),
}
OPERATIONS = {
    "random": (None, {}, {}),
    "ddim": (None, {"method": "ddim", "eta": 0.3}, {}),
    "dpm++, best": ("best", {"method": "dpm++", "s": 1.7}, {}),
    "best": ("best", {"tail_steps": 3, "s": 2.0}, {}),
    "per step": ("per_step", {"variance": "posterior"}, {"start_sent": False, **STEPS}),
    "per step, ddim": ("per_step", {"method": "ddim", "eta": 1.0}, {"start_sent": False, **STEPS}),
    "both": ("both", {"variance": "posterior", "tail_steps": 2, "s": 1.5}, STEPS),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_pictures_of_both_ends_are_equal_bit_for_bit(network, operation):
    kind, settings, fields = OPERATIONS[operation]
    header = replace(TEMPLATE, sampler=SamplerSettings(steps=str(T), **settings), **fields)
    session = Session(replace(header, edge_levels=2))
    transmitter = Transmitter(session, SemanticCoding(1, 2), chains(network)(header), CHOOSERS.get(kind), local=True)
    sent = transmitter.send(scene(), 7 if header.start_sent else 0)
    receiver, message = Receiver(session, chains(network)), session.from_bytes(to_bytes(sent.parts))[0]
    result = receiver.pictures([receiver.accept(message)])
    assert torch.equal(result.images[0], sent.choice.picture) and result.steps.tolist() == [T]
    assert len(message.codewords) == header.selected_steps
    assert message.start_index == (sent.choice.index if header.start_sent else None)


@pytest.mark.parametrize("method", ["ddpm", "ddim", "dpm++"])
def test_receiver_stops_where_the_transmitter_did_whatever_shares_its_batch(network, method):
    header, sents = replace(TEMPLATE, sampler=SamplerSettings(method, str(T))), []
    for number, stop in enumerate((2, 4, T)):
        chain = chains(network, EarlyStop(10.0, 1, stop))(header)
        sents.append(Transmitter(Session(header), SemanticCoding(1, 0), chain, local=True).send(scene(number), number))
        assert sents[-1].choice.steps == stop and sents[-1].message.header.stop_step == stop % T
    receiver = Receiver(Session(header), chains(network))  # does not know the rule
    result = receiver.pictures([receiver.accept(sent.message) for sent in sents])
    assert result.steps.tolist() == [2, 4, T]
    for image, sent in zip(result.images, sents, strict=True):
        torch.testing.assert_close(image, sent.choice.picture, rtol=0, atol=1e-4)


POSTERIOR = SamplerSettings(steps=str(T), variance="posterior")
CODED = Session(replace(TEMPLATE, sampler=POSTERIOR, edge_levels=2, **STEPS))


@pytest.fixture
def message():
    """A message with codewords."""
    described, _ = sender(SemanticCoding(1, 2), CODED.template).describe(scene(), 9)
    return replace(described, codewords=(((1, 5), (1, -1)), ((0, 15), (-1, -1)), ((2, 3), (1, 1))))


def lossy(message, *lost, prefix=b""):
    return CODED.decode(CODED.encode(message) | dict.fromkeys(lost), prefix)


def test_receiver_conceals_lost_maps(message):
    arrival = Receiver(CODED, None).accept(lossy(message, "labels"))
    assert arrival.problems == ("labels",) and (arrival.start, arrival.codewords) == (9, message.codewords)
    assert arrival.y.shape == (1, CLASSES + 1, *SIZE) and not arrival.y.any()
    assert Receiver(CODED, None).accept(lossy(message, "header")) is None
    label = torch.from_numpy(message.label).long()[None, None]
    assert torch.equal(
        Receiver(CODED, None).accept(lossy(message, "edges")).y, encode_semantics(label, label, None, CLASSES)
    )


def test_receiver_uses_the_valid_beginning_of_lost_indices(network, message):
    whole, make = CODED.encode(message)["indices"], chains(network)
    for kept in (4, 3, 1, 0, 2):
        arrival = Receiver(CODED, make).accept(lossy(message, "indices", prefix=whole[:kept]))
        count = max(0, 8 * kept - 4) // 9  # 4 bits of the start, then 7 + 2 for each codeword
        assert arrival.codewords == message.codewords[:count] and arrival.start == (9 if kept else 0)
    image = Receiver(CODED, make).pictures([arrival]).images
    assert torch.equal(image, make(message.header).run(arrival.y, [9], [message.codewords[:1]]).images)


@pytest.mark.parametrize("form, planes", [({}, 4), ({"edge_plane": False}, 3), ({"one_hot": False}, 2)])
def test_analog_channel_is_transmit_and_counts_its_planes(form, planes):
    sent = sender(header=replace(TEMPLATE, **form)).send(scene(), 3)
    arrival, facts = AnalogChannel(0.22, "med")(sent, None, stream(7))
    options = {"num_classes": CLASSES, "one_hot": form.get("one_hot", True), "pool": "med"}
    assert torch.equal(arrival.y, transmit(sent.y, 0.22, generators=[stream(7)], **options))
    assert (arrival.header, arrival.start, arrival.codewords, arrival.problems) == (sent.message.header, 3, (), ())
    assert facts["channel_uses"] == planes * 8 * 16 / 2 and facts["bandwidth_ratio"] == pytest.approx(planes / 6)


def test_analog_facts_have_the_true_snr():
    y = torch.zeros(1, 4, 64, 64)
    y[:, 0, :32], y[:, 2, 32:] = 1, 1  # two planes are sent, of power 1/2 each
    noisy, clean = (transceiver.analog_facts(y, sigma, 4, True)["realised_snr_db"] for sigma in (0.36, 0.0))
    assert noisy == pytest.approx(10 * math.log10(1 / 2 / 0.36**2), abs=1e-4) and clean == math.inf


@needs_sionna
@pytest.mark.parametrize("channel", [lambda: ideal_channel, lambda: DigitalChannel(20)])
def test_channels_without_errors_deliver_the_message(channel):
    sent = sender().send(scene(), 3)
    arrival, facts = channel()(sent, Receiver(sent.session, None), stream())
    assert torch.equal(arrival.y, sent.y) and arrival.header == sent.message.header
    assert arrival.start == 3 and not arrival.problems
    if facts:
        assert facts["block_errors"] == 0 and facts["blocks"] >= 3
        assert facts["realised_snr_db"] == pytest.approx(20, abs=1)
        offset = 10 * math.log10(8 * sum(map(len, sent.parts.values())) / facts["channel_uses"])
        assert facts["eb_n0_db"] == pytest.approx(facts["realised_snr_db"] - offset, abs=1e-6)
        assert facts["bandwidth_ratio"] == facts["channel_uses"] / (3 * 8 * 16)


@needs_sionna
def test_digital_channel_delivers_the_indices_before_a_lost_block(message, monkeypatch):
    send, parts = DigitalChannel._send_part, CODED.encode(message)

    def lose_second_block(self, data, *rest):
        blocks, energies = send(self, data, *rest)
        return [*blocks[:1], None] if data == parts["indices"] else blocks, energies

    monkeypatch.setattr("guided_diffusion.link.channel_coding.INDEX_BLOCK_BYTES", 2)
    monkeypatch.setattr(DigitalChannel, "_send_part", lose_second_block)
    sent = SimpleNamespace(parts=parts, y=torch.zeros(1, CLASSES + 1, *SIZE))
    arrival, facts = DigitalChannel(20)(sent, Receiver(CODED, None), stream())
    assert facts["block_errors"] == 1 and arrival.problems == ("indices",)
    assert (arrival.start, arrival.codewords) == (9, message.codewords[:1])


@needs_sionna
def test_digital_channel_loses_maps_before_control_and_then_all():
    sent = sender(SemanticCoding(1, 2)).send(scene(), 4)
    receiver = Receiver(sent.session, None)
    arrival, facts = DigitalChannel(2)(sent, receiver, stream(5))
    assert arrival.problems == ("labels", "edges") and arrival.start == 4 and not arrival.y.any()
    assert 0 < facts["block_errors"] < facts["blocks"]
    arrival, facts = DigitalChannel(-400, fading="rayleigh")(sent, receiver, stream())
    assert arrival is None and facts["block_errors"] == facts["blocks"]
