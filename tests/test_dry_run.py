"""The dry run: what it checks, and its estimate of memory."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, TRAIN, as_arguments
from PIL import Image

from guided_diffusion import InputError, build
from guided_diffusion import dry_run as table
from guided_diffusion.config import SampleConfig, TrainConfig, parse_config
from guided_diffusion.dry_run import describe_labels, dry_run, memory_gib

GIB = 2**30


def configured(config_class, **flags):
    return parse_config(config_class, "", as_arguments({**TINY, **flags}))[0]


def test_dry_run_of_training_reports_and_writes_nothing(scenes, tmp_path):
    lines, flags = [], {"data_dir": scenes, "checkpoint_dir": tmp_path / "none", **TRAIN, "preview_items": 1}
    dry_run(configured(TrainConfig, **flags, total_steps=3000, image_size=64, channel_mult="1,1"), lines.append)
    text = "\n".join(lines)
    for words in ("train split: 6 pictures of 64x128; 6 decoded", "val split: 3 ", " 7 road  ", "parameters: "):
        assert words in text
    assert "train split: files of 32x64 pixels are enlarged to --image_size 64" in text and "--lr 0.001" in lines[-2]
    assert re.search(r"time: [\d.]+ s for a step .*, [\d:]+ for 3000 of them", text)
    assert not (tmp_path / "none").exists() and len(lines) < 40


def test_dry_run_of_sampling_checks_weights_where_they_exist(scenes, trained, monkeypatch):
    config, lines = configured(SampleConfig, data_dir=scenes, s=2), []
    monkeypatch.setattr(table, "pass_seconds", lambda *_: 0.5)
    dry_run(config, lines.append, weights=str(trained / "ema_0.9_000004.pt"))
    monkeypatch.setattr(table, "device_memory", lambda device: 2**20)
    dry_run(config, lines.append, weights="nowhere/ema.pt")
    assert "ema_0.9_000004.pt: fits" in lines[0] and any("nowhere/ema.pt does not exist" in line for line in lines)
    (timed,) = (line for line in lines if line.startswith("time: "))  # guidance doubles each of 3 times 1000 steps
    assert timed.startswith("time: 1.00 s ") and timed.endswith(" 0:50:00 for 3000 of them")
    assert any("warning: --device cpu has 0.0 GiB, which is less" in line for line in lines)


def test_describe_scenes_looks_at_a_few_or_all_and_tells_what_is_odd(scenes, tmp_path, monkeypatch):
    monkeypatch.setattr(table, "LOOKED_AT", 2)  # of six: the first and the fourth
    labels = sorted(Path(shutil.copytree(scenes / "gtFine", tmp_path / "gtFine"), "train").rglob("*_labelIds.png"))
    pictures = sorted(Path(shutil.copytree(scenes / "leftImg8bit", tmp_path / "leftImg8bit"), "train").rglob("*.png"))
    Image.fromarray(np.full((32, 64), 255, np.uint8)).save(labels[3])
    pictures[1].write_bytes(pictures[1].read_bytes()[:200])
    lines = []
    dry_run(configured(TrainConfig, data_dir=tmp_path, checkpoint_dir=tmp_path / "none", **TRAIN), lines.append)
    assert any("6 pictures of 16x32; 2 decoded" in line for line in lines)
    assert any("warning: train split: label 255 (50.00% of the pixels) became class 34" in line for line in lines)
    assert any(re.match(r"warning: \d+ of 35 classes are in no decoded scene", line) for line in lines)
    with pytest.raises(InputError, match=pictures[1].name):
        dry_run(configured(TrainConfig, data_dir=tmp_path, check_all=True, **TRAIN), print)


def test_activation_bytes_under_autocast_are_those_measured_on_a_gpu():
    # 12.4 GiB saved for one backward pass, with autocast's half-precision copies of the weights.
    config, _ = parse_config(TrainConfig, "", ["--preset", "cityscapes", "--use_checkpoint", "False"])
    model = build.untrained_model(config)
    (half, activations), (full, _) = (memory_gib(config, model, 1, 256, 512, each) for each in ("bf16", "fp32"))
    assert activations + half - full == pytest.approx(12.4, rel=0.1)


def activations(config, batch=8):
    """Return the GiB of activations for pictures of 256x512 in fp32."""
    return memory_gib(config, build.untrained_model(config), batch, 256, 512, "fp32")[1]


def test_memory_of_training_counts_pictures_checkpointing_and_what_stays_beside_weights():
    config, checkpointed = (configured(TrainConfig, ema_rate="0.9,0.99", use_checkpoint=use) for use in (False, True))
    assert activations(checkpointed) < 0.7 * activations(config) == pytest.approx(1.4 * activations(config, 4))
    model = build.untrained_model(config)
    weights, _ = memory_gib(config, model, 1, 16, 32, "fp16")  # gradients, two moments, two averages, half copies
    assert weights * GIB == pytest.approx((6 * 4 + 2) * sum(p.numel() for p in model.parameters()))


def test_memory_of_sampling_counts_guidance_and_cached_modulation():
    flags = {"batch_size": 8, "unet_model": "unet"}
    plain, guided = (activations(configured(SampleConfig, **flags, label_memory=0, s=s)) for s in (1, 2))
    config = configured(SampleConfig, **flags, label_memory=100)
    cached = build.untrained_model(config).modulation_bytes(8, 256, 512) / GIB
    assert guided == pytest.approx(2 * plain) and activations(config) == pytest.approx(plain + cached)


def test_describe_labels_shows_the_most_frequent_classes():
    expected = ["  class   3  74.00 %  ####################", "  class   1  25.00 %  #######", "  class   4   1.00 %  "]
    assert describe_labels([0, 250, 0, 740, 10], width=20) == expected
    assert describe_labels([1] * 14)[11:] == ["  class   2   7.14 %  " + 24 * "#", "  and 2 others 14.29 %"]
