"""What a dry run says: labels, parameters, memory."""

import pytest
import torch
from torch import nn

from guided_diffusion import create_model_and_diffusion, model_and_diffusion_defaults
from guided_diffusion.diffusion.unet import ResBlock
from guided_diffusion.evaluation.memory import (
    activation_elements,
    describe_label_memory,
    describe_labels,
    describe_network,
    memory_estimate,
    parameter_count,
)

H, W = 16, 32
FLAGS = {
    "num_channels": 32,
    "channel_mult": "1,2",
    "num_res_blocks": 1,
    "num_classes": 4,
    "attention_resolutions": "32",
}


def create(**flags):
    return create_model_and_diffusion(**{**model_and_diffusion_defaults(), **FLAGS, **flags})[0]


def meta_model(**flags):
    with torch.device("meta"):
        return create(**flags)


def naive_elements(model):
    """Sizes of what every layer and every residual block returns in a real forward pass."""
    layers, blocks, inside, handles = 0, 0, {}, []

    def note(name):
        def hook(module, _, output):
            nonlocal layers, blocks
            if isinstance(module, ResBlock):
                blocks += output.numel()
                return
            layers += output.numel()
            for block_name in block_names:
                if name.startswith(block_name + "."):
                    inside[block_name] = inside.get(block_name, 0) + output.numel()

        return hook

    block_names = [name for name, module in model.named_modules() if isinstance(module, ResBlock)]
    for name, module in model.named_modules():
        leaf = not list(module.children()) and not isinstance(module, nn.Identity)
        if leaf or isinstance(module, ResBlock):
            handles.append(module.register_forward_hook(note(name)))
    with torch.no_grad():
        model(torch.zeros(1, 3, H, W), torch.zeros(1), torch.zeros(1, model.label_channels, H, W))
    for handle in handles:
        handle.remove()
    return layers, blocks + max(inside.values())


# -- counts -----------------------------------------------------------------------------------------------------------


def test_parameter_count():
    assert parameter_count(nn.Sequential(nn.Linear(3, 4), nn.Conv2d(2, 5, 3))) == 3 * 4 + 4 + 5 * 2 * 9 + 5
    assert parameter_count(meta_model()) == sum(v.numel() for v in create().state_dict().values())


@pytest.mark.parametrize("flags", [{}, {"resblock_updown": True, "unet_model": "spadeboth"}])
def test_activations_against_a_real_forward_pass(flags):
    everything, checkpointed = activation_elements(meta_model(**flags), H, W)
    assert (everything, checkpointed) == naive_elements(create(**flags))
    assert checkpointed < everything


def test_measuring_leaves_the_model_as_it_was():
    model = meta_model()
    names = [name for name, _ in model.named_modules()]
    activation_elements(model, H, W)
    assert [name for name, _ in model.named_modules()] == names
    assert not any(module._forward_hooks for module in model.modules())


def test_activations_grow_with_the_picture():
    small, large = (activation_elements(meta_model(), h, w)[0] for h, w in ((16, 32), (32, 64)))
    assert small * 3.9 < large < small * 4  # the time embedding stays


# -- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ema_count", [None, 1])
def test_memory_grows_with_the_batch(ema_count):
    one, four = (memory_estimate(meta_model(), H, W, batch, "fp32", ema_count) for batch in (1, 4))
    assert four["activations"] == pytest.approx(4 * one["activations"]) and one["activations"] > 0
    assert four["weights"] == one["weights"]


@pytest.mark.parametrize(("ema_count", "copies"), [(None, 1), (1, 5), (3, 7)])
def test_memory_of_weights(ema_count, copies):
    # In training: weights, gradients, two moments of AdamW, and the averages.
    model = meta_model()
    need = memory_estimate(model, H, W, 1, "bf16", ema_count)
    assert need["weights"] == pytest.approx(copies * 4 * parameter_count(model) / 2**30)


def test_checkpointing_takes_less():
    plain, saving = (memory_estimate(meta_model(use_checkpoint=c), H, W, 2, "fp32", 1) for c in (False, True))
    assert saving["activations"] < 0.7 * plain["activations"]
    assert saving["weights"] == plain["weights"]


def test_sampling_takes_less_than_training():
    model = meta_model()
    training, sampling = (memory_estimate(model, H, W, 2, "fp32", ema_count) for ema_count in (1, None))
    assert sampling["activations"] < training["activations"] and sampling["weights"] < training["weights"]


@pytest.mark.parametrize(("s", "factor"), [(1.0, 1), (2.0, 2)])
def test_sampling_counts_label_maps_that_are_kept(s, factor):
    model = meta_model()
    kept = model.modulation_bytes(2, H, W) / 2**30
    plain, exact, beyond = (
        memory_estimate(model, H, W, 2, "fp32", None, s, limit)["activations"] for limit in (0.0, kept, 0.99 * kept)
    )
    assert exact - plain == pytest.approx(kept) and beyond == plain
    assert plain == pytest.approx(factor * memory_estimate(model, H, W, 2, "fp32", None)["activations"])
    line = describe_label_memory(model, H, W, 2, "fp32", kept)
    assert line == f"label maps of 2 pictures: {kept:.2g} GiB of scales and shifts, computed once for each chain"
    assert "more than --label_memory 0, so computed at every step" in describe_label_memory(model, H, W, 2, "bf16", 0)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_halves_the_activations(precision):
    half, full = (memory_estimate(meta_model(), H, W, 2, p, 1) for p in (precision, "fp32"))
    assert half["activations"] == pytest.approx(full["activations"] / 2)


# -- texts ------------------------------------------------------------------------------------------------------------


def test_describe_labels():
    assert describe_labels([0, 250, 0, 740, 10], width=20) == [
        "  class   3  74.00 %  ####################",
        "  class   1  25.00 %  #######",
        "  class   4   1.00 %  ",
    ]


def test_describe_labels_of_nothing():
    assert describe_labels([0, 0]) == []


def test_describe_network():
    parameters, memory = describe_network(create, 16, 32, 4, "bf16", ema_count=1)
    assert parameters == f"parameters: {parameter_count(create()):,}"
    assert (
        memory.startswith("memory estimate: ")
        and "optimizer and averages" in memory
        and "batch 4, 16x32, bf16" in memory
    )
    assert "optimizer" not in describe_network(create, 16, 32, 4, "bf16")[1]


def test_describe_network_allocates_nothing():
    devices = []

    def note():
        model = create()
        devices.append(next(model.parameters()).device.type)
        return model

    describe_network(note, H, W, 1, "fp32")
    assert devices == ["meta"]
