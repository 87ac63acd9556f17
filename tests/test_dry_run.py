"""The dry run: what it checks, and its estimate of memory."""

import re

import pytest
import torch
from conftest import TINY, TRAIN, as_arguments
from torch import nn

from guided_diffusion import build
from guided_diffusion.config import SampleConfig, TrainConfig, parse_config
from guided_diffusion.diffusion.unet import ResBlock
from guided_diffusion.dry_run import activation_bytes, describe_labels, describe_network, dry_run, weight_bytes

GIB = 2**30


def configured(config_class, **flags):
    return parse_config(config_class, "", as_arguments({**TINY, **flags}))[0]


def test_dry_run_of_training_reports_and_writes_nothing(scenes, tmp_path):
    lines = []
    dry_run(configured(TrainConfig, data_dir=scenes, checkpoint_dir=tmp_path / "none", **TRAIN), lines.append)
    for words in ("pictures: 6 of 16x32", "class   7", "parameters: ", "memory estimate: "):
        assert words in "\n".join(lines)
    assert not (tmp_path / "none").exists()


def test_dry_run_of_sampling_checks_weights_where_they_exist(scenes, trained):
    config, lines = configured(SampleConfig, data_dir=scenes), []
    dry_run(config, lines.append, weights=str(trained / "ema_0.9_000004.pt"))
    dry_run(config, lines.append, weights="nowhere/ema.pt")
    assert any("ema_0.9_000004.pt: fits" in line for line in lines)
    assert any("nowhere/ema.pt: does not exist" in line for line in lines)


def naive_bytes(model, height, width, itemsize):
    """Sizes of what every layer and every residual block returns in a real forward pass."""
    layers, blocks, inside, handles = 0, 0, {}, []
    owner = {name: module for name, module in model.named_modules() if isinstance(module, ResBlock)}

    def note(name):
        def hook(module, _, output):
            nonlocal layers, blocks
            if isinstance(module, ResBlock):
                blocks += output.numel() * itemsize
                return
            full = "Norm" in type(module).__name__ or "SiLU" in type(module).__name__
            size = output.numel() * (4 if full else itemsize)
            layers += size
            for block in owner:
                if name.startswith(f"{block}."):
                    inside[block] = inside.get(block, 0) + size

        return hook

    for name, module in model.named_modules():
        leaf = not list(module.children()) and not isinstance(module, nn.Identity)
        if leaf or isinstance(module, ResBlock):
            handles.append(module.register_forward_hook(note(name)))
    with torch.no_grad():
        model(torch.zeros(1, 3, height, width), torch.zeros(1), torch.zeros(1, model.label_channels, height, width))
    return layers, blocks + max(inside.values())


@pytest.mark.parametrize(("precision", "itemsize"), [("fp32", 4), ("bf16", 2)])
@pytest.mark.parametrize("places", ["unet", "spadeboth"])
def test_activation_bytes_against_a_real_forward_pass(places, precision, itemsize):
    config = configured(TrainConfig, unet_model=places)
    model = build.untrained_model(config)
    found = activation_bytes(model, 16, 32, precision)
    assert found == naive_bytes(build.untrained_model(config).to_empty(device="cpu"), 16, 32, itemsize)
    assert found[1] < found[0] and not any(module._forward_hooks for module in model.modules())


def test_activation_bytes_under_autocast_are_those_measured_on_a_gpu():
    # 12.4 GiB saved for one backward pass, with autocast's half-precision copies of the weights.
    config, _ = parse_config(TrainConfig, "", ["--preset", "cityscapes", "--use_checkpoint", "False"])
    model = build.untrained_model(config)
    copies = weight_bytes(model, "bf16", 1) - weight_bytes(model, "fp32", 1)
    assert (activation_bytes(model, 256, 512, "bf16")[0] + copies) / GIB == pytest.approx(12.4, rel=0.1)


@pytest.mark.parametrize(
    ("precision", "ema_count", "per_parameter"), [("fp32", None, 4), ("fp32", 1, 20), ("fp32", 3, 28), ("fp16", 1, 22)]
)
def test_weight_bytes_count_gradients_moments_averages_and_copies(precision, ema_count, per_parameter):
    model = nn.Sequential(nn.Linear(3, 4), nn.Conv2d(2, 5, 3))
    assert weight_bytes(model, precision, ema_count) == per_parameter * (3 * 4 + 4 + 5 * 2 * 9 + 5)


def estimate(config, precision="fp32"):
    """Return the GiB of activations that `describe_network` names for pictures of 256x512."""
    memory = describe_network(build.untrained_model(config), config, 256, 512, precision)[1]
    return float(re.search(r"([\d.]+) activations", memory)[1])


def test_describe_network_of_training():
    flags = {"microbatch": 4, "batch_size": 4, "ema_rate": "0.9"}
    config = configured(TrainConfig, **flags)
    parameters, memory = describe_network(build.untrained_model(config), config, 256, 512, "bf16")
    assert parameters == f"parameters: {sum(p.numel() for p in build.untrained_model(config).parameters()):,}"
    assert "gradients, optimizer and averages" in memory and "activations at batch 4, 256x512, bf16" in memory
    assert estimate(configured(TrainConfig, **flags, use_checkpoint=True)) < 0.7 * estimate(config)
    half = estimate(configured(TrainConfig, **{**flags, "microbatch": 2}))
    assert estimate(config) == pytest.approx(2 * half, abs=0.11)


def test_describe_network_of_sampling_counts_guidance_and_cached_modulation():
    flags = {"batch_size": 8, "unet_model": "unet"}
    plain, guided = (estimate(configured(SampleConfig, **flags, label_memory=0, s=s)) for s in (1, 2))
    config = configured(SampleConfig, **flags, label_memory=100)
    cached = build.untrained_model(config).modulation_bytes(8, 256, 512) / GIB
    assert guided == pytest.approx(2 * plain, abs=0.11) and estimate(config) == pytest.approx(plain + cached, abs=0.11)
    assert "computed once for each chain" in describe_network(build.untrained_model(config), config, 64, 64, "fp32")[2]


def test_describe_labels_shows_shares_of_what_occurs():
    expected = ["  class   3  74.00 %  ####################", "  class   1  25.00 %  #######", "  class   4   1.00 %  "]
    assert describe_labels([0, 250, 0, 740, 10], width=20) == expected
