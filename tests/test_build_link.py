"""From a configuration to both ends: chains, headers, choosers, and bad flags before the long work."""

import dataclasses
import shutil
import warnings

import pytest
import torch
from conftest import TINY, as_arguments

from guided_diffusion import build_link, load_checkpoint
from guided_diffusion.config import SampleConfig, parse_config, sweep
from guided_diffusion.console import InputError
from guided_diffusion.diffusion.solvers import SamplerSettings
from guided_diffusion.evaluation.run import SceneRun
from guided_diffusion.files import file_digest
from guided_diffusion.link.selection import mse
from guided_diffusion.link.transceiver import ideal_channel
from guided_diffusion.training.checkpoint import find_weights

FLAGS = {**TINY, "timestep_respacing": "4"}


def quiet(line):
    """Say nothing."""


@pytest.fixture
def configure(scenes, trained, tmp_path):
    """Function from flags to a configuration, and the path of the weights."""

    def make(**flags):
        flags = {"data_dir": scenes, "model_path": trained, "results_path": tmp_path / "out", **FLAGS, **flags}
        config, _ = parse_config(SampleConfig, "", as_arguments(flags))
        return config, find_weights(config.model_path)

    return make


@pytest.fixture
def parts(configure):
    """Function from flags to (config of one point, sampling parts)."""

    def make(**flags):
        config, weights = configure(**flags)
        return sweep(config)[0], build_link.sampling_parts(config, weights, quiet)

    return make


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory):
    """A TorchScript segmenter with 35 classes: a colour decides."""
    layer = torch.nn.Conv2d(3, 35, 1)
    torch.nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(0))
    path = tmp_path_factory.mktemp("networks") / "segmenter.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(layer.requires_grad_(False).eval()).save(path)
    return path


def header_of(parts, point, number=0):
    transmitter = parts["transmitter"](point)
    return transmitter.describe(parts["dataset"].batch([number]))[0].header


def test_chain_maker_keeps_one_chain_for_a_kind_of_header(configure):
    config, weights = configure(label_scale=2)
    sampling = build_link.sampling_parts(config, weights, quiet)
    header = header_of(sampling, sweep(config)[0])
    make_chain = load_checkpoint(weights, respacing="4").link[1]
    chain = make_chain(header)
    assert chain.diffusion.num_timesteps == 4 and len(chain.bank) == 16
    for same in ({"label_scale": 8}, {"boundaries": False}, {"height": 16, "width": 64}, {"edge_levels": 2}):
        assert make_chain(dataclasses.replace(header, **same)) is chain
    for other in ({"stop_step": 2}, {"precision": "bf16"}):
        assert make_chain(dataclasses.replace(header, **other)) is not chain
    guided = dataclasses.replace(header, sampler=dataclasses.replace(header.sampler, s=2.0))
    assert make_chain(guided) is not chain and make_chain(guided).bank is chain.bank  # walked once
    assert make_chain(dataclasses.replace(header, stop_step=2)).early_stop.min_steps == 2


@pytest.mark.parametrize(
    "change, words",
    [
        ({"fingerprint": "0123456789abcdef"}, "made with fingerprint '0123456789abcdef'"),
        ({"edge_plane": False}, "edge_plane False, these weights have True"),
        ({"height": 15}, "15"),
        ({"height": 4096, "width": 4096}, "4096x4096 picture, more than 16 times --image_size 16"),
        ({"bank_size": 2**32 - 1}, "bank_size 4294967295, these weights have 16"),
        ({"precision": "fp16"}, "needs fp16, which this device lacks"),
    ],
)
def test_chain_maker_refuses_messages_for_another_receiver(trained, parts, change, words):
    point, sampling = parts()
    header = dataclasses.replace(header_of(sampling, point), boundaries=False, edge_levels=0)
    make_chain = load_checkpoint(trained, respacing="4").link[1]
    with pytest.raises(InputError, match=words):
        make_chain(dataclasses.replace(header, **change))


def test_header_has_what_the_flags_ask_for(parts, trained):
    point, sampling = parts(use_ddim=True, eta=0.3, s=1.5, edge_levels=2, edge_scale=2, label_scale=4, tail_steps=1)
    header = header_of(sampling, point)
    assert header.sampler == SamplerSettings("ddim", steps="4", s=1.5, eta=0.3, tail_steps=1)
    assert (header.label_scale, header.edge_levels, header.edge_scale, header.boundaries) == (4, 2, 2, True)
    assert (header.height, header.width, header.bank_size, header.bank_seed) == (16, 32, 16, 150)
    assert header.start_sent and header.selected_steps == 0
    assert header.fingerprint == file_digest(find_weights(str(trained))).hex()[:16]
    assert sampling["transmitter"](point).chain.sampler == header.sampler


@pytest.mark.parametrize(
    "flags, start_sent, selected",
    [({"selection": "per_step", "tail_steps": 2}, False, 2), ({"selection": "both", "noise_index": 3}, True, 3)],
)
def test_header_has_per_step_selection(parts, flags, start_sent, selected):
    point, sampling = parts(step_candidates=8, step_atoms=2, **flags)
    header = header_of(sampling, point)
    assert (header.start_sent, header.selected_steps, header.sampler.variance) == (start_sent, selected, "posterior")
    assert (header.step_candidates, header.step_atoms) == (8, 2)


def test_header_refuses_more_steps_than_take_noise(parts):
    for flags in ({"selected_steps": 4}, {"tail_steps": 4}, {"timestep_respacing": 1}):
        point, sampling = parts(selection="per_step", **flags)
        with pytest.raises(InputError, match="--selected_steps"):
            sampling["transmitter"](point)


def test_sampling_parts_refuse_what_no_message_can_carry(parts):
    with pytest.raises(InputError, match="step_candidates is 9000; must be 0 to 8192"):
        parts(selection="per_step", step_candidates=9000, link="ideal", noise_bank_size=10000)
    point, sampling = parts(timestep_respacing="3", tail_steps=4)
    with pytest.raises(InputError, match="--tail_steps 4: expected 0 to 3"):
        sampling["transmitter"](point)


def test_transmitter_chooses_nothing_where_nothing_is_searched(parts):
    point, sampling = parts(noise_index=5)
    sent = sampling["transmitter"](point).send(sampling["dataset"].batch([0]), 5)
    assert sent.choice is None and sent.message.start_index == 5
    point = dataclasses.replace(point, local_picture=True)
    assert sampling["transmitter"](point).send(sampling["dataset"].batch([0]), 5).choice.index == 5


@pytest.mark.parametrize(
    "flags, codewords, evaluations",
    [
        ({"noise_index": "best", "candidates": 3, "s": 2}, 0, 2 * (3 * 4 + 4)),
        ({"noise_index": "best", "candidates": 16, "feedback_steps": 1}, 0, 16 * 1 + 4 * 4 + 4),
        ({"selection": "per_step"}, 3, 4),
        ({"selection": "both", "noise_index": 2}, 3, 4),
        ({"selection": "both", "candidates": 2}, 3, 2 * 4 + 4 + 4),
    ],
)
def test_transmitter_has_a_search_for_each_flag(parts, flags, codewords, evaluations):
    point, sampling = parts(step_candidates=8, step_atoms=2, distance="ssim", **flags)
    choice = sampling["transmitter"](point).send(sampling["dataset"].batch([1]), 2).choice
    assert (len(choice.codewords), choice.evaluations) == (codewords, evaluations)
    assert choice.score > 0 and choice.index < point.candidates


def test_transmitter_takes_a_segmenters_distance(parts, segmenter):
    point, sampling = parts(noise_index="best", candidates=3, distance="segmenter", segmenter=segmenter)
    scene = sampling["dataset"].batch([0])
    transmitter, network = sampling["transmitter"](point), torch.jit.load(segmenter)
    choice = transmitter.send(scene, 0).choice
    pictures = [transmitter.chain.run(transmitter.describe(scene)[1], [i]).images for i in range(3)]
    wrong = [(network(picture).argmax(1, keepdim=True) != scene["label"]).float().mean() for picture in pictures]
    assert choice.score == pytest.approx(float(min(wrong)), abs=0.01) and 0 < choice.score <= 1


@pytest.mark.parametrize(
    "flags, words",
    [
        ({"metrics": "miou"}, "--segmenter : cannot be loaded"),
        ({"metrics": "kid", "features": "none.pt"}, "--features none.pt: cannot be loaded"),
        ({"noise_index": "best", "distance": "segmenter", "segmenter": "none.pt"}, "--segmenter none.pt: cannot be"),
        ({"extractor": "none.pt"}, "--extractor none.pt: cannot be loaded"),
        ({"metrics": "lpips", "lpips_weights": "none.pth"}, "--lpips_weights none.pth"),
        ({"label_scale": 1, "edge_levels": 1}, "--edge_levels 1"),
    ],
)
def test_sampling_parts_name_missing_networks_before_the_weights_are_read(parts, monkeypatch, flags, words):
    monkeypatch.setattr(build_link, "load_weights", lambda *_: pytest.fail("too late"))
    with pytest.raises(InputError, match=words):
        parts(**flags)


def test_run_on_pictures_alone_with_an_extractor(parts, configure, scenes, segmenter, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, path in enumerate(sorted(scenes.rglob("val/*/*_leftImg8bit.png"))[:2]):
        shutil.copy(path, folder / f"p{number}.png")
    flags = {"data_dir": folder, "extractor": segmenter, "link": "ideal", "local_picture": True, "metrics": "psnr,miou"}
    point, sampling = parts(segmenter=segmenter, **flags)
    run = SceneRun(point, configure()[1], sampling)
    run.run()
    rows = run.done.values()
    assert [row["name"] for row in rows] == ["p0", "p1"] and all(row["mismatch_db"] == "inf" for row in rows)
    # The labels are the segmenter's own, so it agrees with itself on the real pictures.
    run.sum_up(quiet)
    assert run.summary["set"]["miou_real"] == 1.0
    scene = sampling["dataset"].batch([0])
    assert torch.equal(scene["label"], torch.jit.load(segmenter)(scene["image"]).argmax(1, keepdim=True))


def test_load_checkpoint_takes_what_model_path_takes(trained):
    checkpoint = load_checkpoint(trained, "cpu", "4")
    assert checkpoint.diffusion.num_timesteps == 4 and checkpoint.config.prediction == "v"
    assert checkpoint.bank[3].shape == (3, 16, 32) and not checkpoint.model.training
    same = load_checkpoint(trained / "ema_0.9_000004.pt")
    assert all(torch.equal(a, b) for a, b in zip(same.model.parameters(), checkpoint.model.parameters(), strict=True))
    with pytest.raises(InputError, match="--colour=1"):
        load_checkpoint(trained, colour=1)
    with pytest.raises(InputError, match="lists of --link"):
        load_checkpoint(trained, snr="1,10")
    assert load_checkpoint(trained, preset="toy").diffusion.num_timesteps == 8
    assert load_checkpoint(trained, respacing="", preset="toy").diffusion.num_timesteps == 1000


def test_checkpoint_takes_functions_as_extractor_selector_distance_and_channel(trained, scenes):
    checkpoint = load_checkpoint(trained, "cpu", "4", data_dir=scenes, candidates=3)
    scene = checkpoint.scenes(lambda image: (image.mean(1) > 0).long()).batch([0])
    assert torch.equal(scene["label"][:, 0], (scene["image"].mean(1) > 0).long())

    def take_next(chain, y, scene, start, on_step=None):
        return chain.choice(chain.run(y, [start + 1], on_step=on_step), start + 1)

    def lose_labels(sent, receiver, stream):
        return receiver.accept(receiver.session.decode(sent.parts | {"labels": None})), {}

    receiver, sent = checkpoint.receiver(), checkpoint.transmitter(take_next).send(scene, 4)
    arrivals = [channel(sent, receiver, None)[0] for channel in (ideal_channel, lose_labels)]
    assert [arrival.start for arrival in arrivals] == [5, 5] and arrivals[1].problems == ("labels",)
    assert torch.equal(receiver.pictures(arrivals[:1]).images[0], sent.choice.picture)
    per_step = load_checkpoint(trained, "cpu", "4", selection="per_step").transmitter()
    assert len(per_step.send(scene, 0).message.codewords) == 3
    transmitter = checkpoint.transmitter(distance=lambda pictures, image: -mse(pictures, image))
    pictures = torch.cat([transmitter.chain.run(sent.y, [i]).images for i in range(3)])
    assert transmitter.send(scene, 0).choice.index == int(mse(pictures, scene["image"]).argmax())
