"""From a configuration to both ends: chains, headers, choosers, and bad flags before the long work."""

import dataclasses
import shutil
import warnings

import pytest
import torch
from conftest import TINY, as_arguments

from guided_diffusion import build_link, prepare
from guided_diffusion.config import SampleConfig, parse_config, points
from guided_diffusion.console import InputError
from guided_diffusion.evaluation.run import Regeneration
from guided_diffusion.files import digest

FLAGS = {**TINY, "timestep_respacing": "4"}


def quiet(line):
    """Say nothing."""


@pytest.fixture
def configure(scenes, trained, tmp_path):
    """Function from flags to a configuration, and the path of the weights."""

    def make(**flags):
        flags = {"data_dir": scenes, "model_path": trained, "results_path": tmp_path / "out", **FLAGS, **flags}
        config, _ = parse_config(SampleConfig, "", as_arguments(flags))
        return config, prepare.find_weights(config.model_path)

    return make


@pytest.fixture
def parts(configure):
    """Function from flags to (config of one point, sampling parts)."""

    def make(**flags):
        config, weights = configure(**flags)
        return points(config)[0], build_link.sampling_parts(config, weights, quiet)

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


# -- chains -----------------------------------------------------------------------------------------------------------


def header_of(parts, point, number=0):
    transmitter = parts["transmitter"](point)
    return transmitter.describe(parts["dataset"].batch([number]))[0].header


def test_one_chain_is_kept_for_a_kind_of_header(configure):
    config, weights = configure(label_scale=2)
    sampling = build_link.sampling_parts(config, weights, quiet)
    header = header_of(sampling, points(config)[0])
    make_chain = build_link.receiving_parts(config, weights, quiet)["make_chain"]
    chain = make_chain(header)
    assert chain.diffusion.num_timesteps == 4 and chain.bank.shape == (3, 16, 32) and len(chain.bank) == 16
    for same in ({"label_scale": 8}, {"boundaries": False}, {"height": 16, "width": 64}, {"edge_levels": 2}):
        assert make_chain(dataclasses.replace(header, **same)) is chain
    for other in ({"s": 2.0}, {"steps": "3"}, {"stop_step": 2}, {"tail_steps": 1}, {"precision": "bf16"}):
        assert make_chain(dataclasses.replace(header, **other)) is not chain
    assert make_chain(dataclasses.replace(header, s=2.0)).bank is chain.bank  # walked once
    assert make_chain(dataclasses.replace(header, stop_step=2)).early_stop.min_steps == 2


@pytest.mark.parametrize(
    "change, words",
    [
        ({"fingerprint": b"12345678"}, "made for other weights .*3132333435363738"),
        ({"num_classes": 34}, r"label space .* is \(34, True, True\), the model's \(35, True, True\)"),
        ({"one_hot": False}, "label space"),
        ({"edge_plane": False}, "label space"),
        ({"height": 15}, "15"),
        ({"height": 4096, "width": 4096}, "4096x4096 picture, more than 16 times the model's 16x16"),
        ({"bank_size": 2**32 - 1}, "noise bank 150 of 4294967295 entries, the model's is 150 of 16"),
        ({"bank_seed": 7}, "noise bank 7 of 16"),
        ({"precision": "fp16"}, "made in fp16, which this device lacks"),
    ],
)
def test_messages_for_another_receiver_are_refused(configure, parts, change, words):
    point, sampling = parts()
    header = dataclasses.replace(header_of(sampling, point), boundaries=False, edge_levels=0)
    receiver = build_link.receiving_parts(*configure(), quiet)["make_chain"]
    with pytest.raises(InputError, match=words):
        receiver(dataclasses.replace(header, **change))


# -- headers ----------------------------------------------------------------------------------------------------------


def test_the_header_says_what_the_flags_ask_for(parts, trained):
    point, sampling = parts(use_ddim=True, eta=0.3, s=1.5, edge_levels=2, edge_scale=2, label_scale=4, tail_steps=1)
    header = header_of(sampling, point)
    assert (header.method, header.steps, header.s, header.tail_steps) == ("ddim", "4", 1.5, 1)
    assert header.eta == pytest.approx(0.3) and header.eta != 0.3  # in single precision, at both ends
    assert (header.label_scale, header.edge_levels, header.edge_scale, header.boundaries) == (4, 2, 2, True)
    assert (header.height, header.width, header.bank_size, header.bank_seed) == (16, 32, 16, 150)
    assert header.start_sent and header.selected_steps == 0 and header.step_variance == "model"
    assert header.fingerprint == digest(prepare.find_weights(str(trained)))[:8]
    assert sampling["transmitter"](point).chain.eta == header.eta


@pytest.mark.parametrize("flags", [{"sampler": "dpm++"}, {"sampler": "dpm++", "eta": 0.5}])
def test_dpm_solver_is_in_the_header(parts, flags):
    point, sampling = parts(**flags)
    header = header_of(sampling, point)
    assert (header.method, header.eta, header.step_variance) == ("dpm++", 0.0, "model")
    assert sampling["transmitter"](point).chain.method == "dpm++"


@pytest.mark.parametrize(
    "flags, start_sent, selected",
    [
        ({"selection": "per_step"}, False, 3),
        ({"selection": "per_step", "tail_steps": 2}, False, 2),
        ({"selection": "both"}, True, 3),
        ({"selection": "both", "noise_index": 3, "selected_steps": 1}, True, 1),
    ],
)
def test_per_step_selection_is_in_the_header(parts, flags, start_sent, selected):
    point, sampling = parts(step_candidates=8, step_atoms=2, **flags)
    header = header_of(sampling, point)
    assert (header.start_sent, header.selected_steps, header.step_variance) == (start_sent, selected, "posterior")
    assert (header.step_candidates, header.step_atoms) == (8, 2)


def test_a_chain_without_so_many_noisy_steps_is_refused(parts):
    for flags in ({"selected_steps": 4}, {"tail_steps": 4}, {"timestep_respacing": 1}):
        with pytest.raises(InputError, match="--selected_steps"):
            parts(selection="per_step", **flags)


def test_what_no_message_can_carry_is_refused_before_the_long_work(parts):
    with pytest.raises(InputError, match="--timestep_respacing 2,3: sections cannot be sent"):
        parts(timestep_respacing="2,3", link="ideal")
    parts(timestep_respacing="2,3", link="analog")
    with pytest.raises(InputError, match="--tail_steps 4: the chain has 3 steps"):
        parts(timestep_respacing="3", tail_steps=4)


# -- choosers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [{"noise_index": "random"}, {"noise_index": 5}])
def test_nothing_is_chosen_where_nothing_is_searched(parts, flags):
    point, sampling = parts(**flags)
    sent = sampling["transmitter"](point).send(sampling["dataset"].batch([0]), 5)
    assert sent.choice is None and sent.message.start_index == 5
    point = dataclasses.replace(point, local_picture=True)
    assert sampling["transmitter"](point).send(sampling["dataset"].batch([0]), 5).choice.index == 5


@pytest.mark.parametrize(
    "flags, codewords, evaluations",
    [
        ({"noise_index": "best", "candidates": 3}, 0, 3 * 4 + 4),
        ({"noise_index": "best", "candidates": 3, "s": 2}, 0, 2 * (3 * 4 + 4)),
        ({"noise_index": "best", "candidates": 16, "feedback_steps": 1}, 0, 16 * 1 + 4 * 4 + 4),
        ({"selection": "per_step"}, 3, 4),
        ({"selection": "both", "noise_index": 2}, 3, 4),
        ({"selection": "both", "candidates": 2}, 3, 2 * 4 + 4 + 4),
    ],
)
def test_each_flag_has_its_search(parts, flags, codewords, evaluations):
    point, sampling = parts(step_candidates=8, step_atoms=2, distance="ssim", **flags)
    choice = sampling["transmitter"](point).send(sampling["dataset"].batch([1]), 2).choice
    assert (len(choice.codewords), choice.evaluations) == (codewords, evaluations)
    assert choice.score > 0 and choice.index < point.candidates


def test_the_best_start_is_the_one_of_the_exhaustive_search(parts):
    point, sampling = parts(noise_index="best", candidates=4)
    scene = sampling["dataset"].batch([0])
    transmitter = sampling["transmitter"](point)
    sent = transmitter.send(scene, 0)
    scores = [float((transmitter.chain.run(sent.y, [i]).images - scene["image"]).square().mean()) for i in range(4)]
    assert sent.choice.index == sent.message.start_index == scores.index(min(scores))
    assert sent.choice.score == pytest.approx(min(scores), rel=1e-4)


def test_a_segmenter_gives_goal_driven_feedback(parts, segmenter):
    point, sampling = parts(noise_index="best", candidates=3, distance="segmenter", segmenter=segmenter)
    scene = sampling["dataset"].batch([0])
    transmitter = sampling["transmitter"](point)
    choice = transmitter.send(scene, 0).choice
    network = torch.jit.load(segmenter)
    pictures = [transmitter.chain.run(transmitter.describe(scene)[1], [i]).images for i in range(3)]
    scores = [
        float((network(picture).argmax(1, keepdim=True) != scene["label"]).float().mean()) for picture in pictures
    ]
    assert choice.score == pytest.approx(min(scores), abs=0.01) and 0 < choice.score <= 1


# -- bad flags, before the long work ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, words",
    [
        ({"metrics": "miou"}, "--metrics miou needs --segmenter"),
        ({"metrics": "miou", "segmenter": "none.pt"}, "--segmenter none.pt: cannot be read"),
        ({"metrics": "kid", "features": "none.pt"}, "--features none.pt: cannot be read"),
        ({"noise_index": "best", "distance": "segmenter"}, "--distance segmenter needs --segmenter"),
        ({"extractor": "none.pt"}, "--extractor none.pt: cannot be read"),
        ({"metrics": "lpips", "lpips_weights": "none.pth"}, "--lpips_weights none.pth"),
        ({"label_scale": 1, "edge_levels": 1}, "--edge_levels 1"),
    ],
)
def test_missing_networks_are_named_before_the_weights_are_read(parts, monkeypatch, flags, words):
    monkeypatch.setattr(build_link, "load_weights", lambda *_: pytest.fail("too late"))
    with pytest.raises(InputError, match=words):
        parts(**flags)


# -- pictures alone ---------------------------------------------------------------------------------------------------


def test_the_whole_diagram_runs_on_pictures_alone(parts, configure, scenes, segmenter, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, path in enumerate(sorted(scenes.rglob("val/*/*_leftImg8bit.png"))[:2]):
        shutil.copy(path, folder / f"p{number}.png")
    flags = {"data_dir": folder, "extractor": segmenter, "link": "ideal", "local_picture": True, "metrics": "psnr,miou"}
    point, sampling = parts(segmenter=segmenter, **flags)
    run = Regeneration(point, configure()[1], sampling)
    rows = run.run()
    assert [row["name"] for row in rows] == ["p0", "p1"] and all(row["mismatch_db"] == "inf" for row in rows)
    # The labels are the segmenter's own, so it agrees with itself on the real pictures.
    assert run.sum_up(rows)["set"]["miou_real"] == 1.0
    scene = sampling["dataset"].batch([0])
    assert torch.equal(scene["label"], torch.jit.load(segmenter)(scene["image"]).argmax(1, keepdim=True))
