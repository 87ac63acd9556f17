"""The receiver alone: messages and a checkpoint in, the transmitter's pictures out."""

import csv
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, as_arguments
from PIL import Image

from guided_diffusion import build_link, prepare
from guided_diffusion.config import SampleConfig, parse_config, points
from guided_diffusion.console import InputError
from guided_diffusion.evaluation.receive import Receiving, read_message
from guided_diffusion.evaluation.run import Regeneration

ROOT = Path(__file__).resolve().parent.parent


def parsed(**flags):
    config, _ = parse_config(SampleConfig, "", as_arguments({**TINY, **flags}))
    return config, prepare.find_weights(config.model_path)


@pytest.fixture
def transmit(scenes, trained, tmp_path):
    """Function that writes messages into a folder; returns the rows."""

    def make(folder="sent", **flags):
        flags = {"data_dir": scenes, "timestep_respacing": 3, "model_path": trained, **flags}
        config, weights = parsed(results_path=tmp_path / folder, role="transmit", **flags)
        parts = build_link.sampling_parts(config, weights, lambda line: None)
        return Regeneration(points(config)[0], weights, parts).run()

    return make


@pytest.fixture
def receive(trained, tmp_path):
    """Function that receives a folder's messages; returns the run, unstarted."""

    def make(messages="sent/messages", folder="received", **flags):
        flags = {"model_path": trained, **flags}
        config, weights = parsed(messages=tmp_path / messages, results_path=tmp_path / folder, role="receive", **flags)
        return Receiving(config, weights, build_link.receiving_parts(config, weights, lambda line: None))

    return make


def pixels(folder):
    return {path.name: np.asarray(Image.open(path)) for path in folder.iterdir()}


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"use_ddim": True, "eta": 0.3, "s": 1.7, "edge_levels": 2, "label_scale": 2},
        {"noise_index": "best", "candidates": 3, "tail_steps": 1},
        {"sampler": "dpm++", "noise_index": "best", "candidates": 6, "feedback_steps": 1},
        {"selection": "per_step", "step_candidates": 8, "step_atoms": 2},
        {"selection": "both", "candidates": 2, "step_candidates": 8},
        {"timestep_respacing": 6, "stop_tol": 10, "stop_patience": 1},
        {"precision": "bf16", "batch_size": 3},
    ],
)
def test_the_receiver_makes_the_transmitters_pictures(transmit, receive, tmp_path, flags):
    sent = transmit(num_samples=2, **flags)
    run = receive()
    received = run.run()
    run.sum_up(received)
    assert [row["name"] for row in received] == [row["name"] for row in sent] and len(sent) == 2
    for ours, theirs in zip(received, sent, strict=True):
        for column in ("picture_sha256", "steps", "bank_index", "bits_total", "bits_indices", "bpp"):
            assert ours[column] == theirs[column], column
    local, made = pixels(tmp_path / "sent" / "local"), pixels(tmp_path / "received" / "samples")
    assert local.keys() == made.keys()
    for name in local:
        np.testing.assert_array_equal(local[name], made[name])
    labels, decoded = pixels(tmp_path / "sent" / "labels"), pixels(tmp_path / "received" / "labels")
    for name in labels if not flags.get("label_scale") else ():
        np.testing.assert_array_equal(labels[name], decoded[name])
    assert (tmp_path / "received" / "panel.png").exists()


def test_another_process_with_messages_and_checkpoint_alone(scenes, trained, tmp_path):
    shutil.copytree(scenes, tmp_path / "data")
    run = {"cwd": tmp_path, "check": True, "stderr": subprocess.PIPE, "text": True}
    script = [sys.executable, str(ROOT / "image_sample.py"), "--timestep_respacing", "3", "--num_workers", "0"]
    flags = {"role": "transmit", "data_dir": "data", "model_path": trained, "results_path": "sent", "num_samples": 2}
    subprocess.run([*script, *as_arguments(flags)], **run)
    shutil.rmtree(tmp_path / "data")
    (tmp_path / "far").mkdir()
    shutil.move(tmp_path / "sent" / "messages", tmp_path / "far" / "messages")
    weights = Path(prepare.find_weights(str(trained)))
    for name in (weights.name, "config.json"):
        (tmp_path / "far" / "checkpoint").mkdir(exist_ok=True)
        shutil.copy(weights.parent / name, tmp_path / "far" / "checkpoint")
    flags = {"role": "receive", "messages": "messages", "model_path": "checkpoint", "results_path": "out"}
    said = subprocess.run([*script[:2], *as_arguments(flags)], **{**run, "cwd": tmp_path / "far"}).stderr
    assert "receiving 2 messages" in said
    tables = []
    for folder in (tmp_path / "sent", tmp_path / "far" / "out"):
        with open(folder / "results.csv") as f:
            tables.append({row["name"]: row["picture_sha256"] for row in csv.DictReader(f)})
    assert tables[0] == tables[1] and len(tables[0]) == 2 and all(tables[0].values())


def test_an_interrupted_run_goes_on(transmit, receive, tmp_path):
    sent = transmit()
    receive(num_samples=1).run()
    first = next((tmp_path / "received" / "samples").iterdir())
    stamp = first.stat().st_mtime_ns
    rows = receive().run()
    assert first.stat().st_mtime_ns == stamp
    assert [row["picture_sha256"] for row in rows] == [row["picture_sha256"] for row in sent] and len(rows) == 3
    (tmp_path / "received" / "samples" / f"{rows[1]['name']}.png").unlink()
    assert [row["picture_sha256"] for row in receive().run()] == [row["picture_sha256"] for row in sent]


def test_fewer_messages_the_next_time_lose_no_rows(transmit, receive, tmp_path):
    transmit()
    assert len(receive().run()) == 3
    run = receive(num_samples=1)
    run.sum_up(run.run())
    assert (tmp_path / "received" / "results.csv").read_text().count("\n") == 4


def test_a_bad_message_is_named_before_any_picture(transmit, receive, tmp_path):
    transmit()
    bad = sorted((tmp_path / "sent" / "messages").iterdir())[-1]
    whole = bad.read_bytes()
    flipped = whole[:-1] + bytes([whole[-1] ^ 1])
    for data in (b"", whole[:40], whole[:-1], whole + b"x", flipped, b"\0" * 200):
        bad.write_bytes(data)
        with pytest.raises(InputError, match=f"{bad.name}: ") as caught:
            receive().run()
        assert str(caught.value).count(str(bad)) == 1
    assert not (tmp_path / "received").exists()
    with pytest.raises(InputError, match=bad.name):
        read_message(bad)


def test_other_weights_are_refused(transmit, receive, trained, tmp_path):
    transmit(num_samples=1)
    folder = tmp_path / "other"
    folder.mkdir()
    for name in ("ema_0.9_000004.pt", "model000004.pt"):
        shutil.copy(trained / name, folder)
    with pytest.raises(InputError, match=r"\.dgo: the message was made for other weights .*--model_path"):
        receive(model_path=folder / "model000004.pt").run()
    assert len(receive(model_path=folder / "ema_0.9_000004.pt").run()) == 1  # the file counts, not where it is


def test_a_folder_without_messages_is_named(receive, tmp_path):
    for folder in ("none", "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(InputError, match=rf"--messages .*{folder}: no \.dgo files there"):
            receive(folder)


def test_messages_of_several_sizes_and_folders(transmit, receive, tmp_path):
    rows = transmit("sent/wide", num_samples=2) + transmit(
        "sent/large", num_samples=1, image_size=32, attention_resolutions=16
    )
    received = receive("sent").run()
    assert sorted(row["picture_sha256"] for row in received) == sorted(row["picture_sha256"] for row in rows)
    assert {picture.shape for picture in pixels(tmp_path / "received" / "samples").values()} == {
        (16, 32, 3),
        (32, 64, 3),
    }
    assert len({row["name"] for row in received}) == 3


def test_other_settings_in_the_same_folder_are_refused(transmit, receive):
    transmit(num_samples=1)
    receive().run()
    with pytest.raises(InputError, match="seed"):
        receive(seed=5).run()
