"""How a network is given its label map: computed, stored, or both halves of guidance in one batch."""

import pytest
import torch
from conftest import tiny_network

from guided_diffusion.diffusion.spade import (
    CachedModulation,
    GuidedModulation,
    LabelModulation,
    NullModulation,
    SPADEGroupNorm,
)

SIZE = (8, 16)


@pytest.fixture(scope="module", params=["unet", "spadeboth", "enconly"])
def network(request):
    return tiny_network(unet_model=request.param)[0].requires_grad_(False)


def inputs(n, labels=None):
    draw = torch.Generator().manual_seed(n)
    x, y = torch.randn(n, 3, *SIZE, generator=draw), torch.rand(labels or n, 5, *SIZE, generator=draw)
    return x, torch.tensor([0.0, 731.0, 5.5])[:n], y


def two_passes(model, x, t, y):
    y = y.expand(len(x), -1, -1, -1)
    return torch.cat([model(x, t, y), model(x, t, torch.zeros_like(y))])


@pytest.mark.parametrize("ready", ["cached_modulation", "label_modulation"])
@pytest.mark.parametrize("n, labels", [(1, 1), (3, 3), (3, 1)])
def test_both_halves_of_guidance_equal_two_passes(network, ready, n, labels):
    x, t, y = inputs(n, labels)
    make = getattr(network, ready)
    together = network(x, t, GuidedModulation(make(y), make(torch.zeros_like(y[:1]))))
    expected = two_passes(network, x, t, y)
    assert (expected[:n] - expected[n:]).abs().max() > 0.05
    torch.testing.assert_close(together, expected, rtol=0, atol=1e-5)


def test_both_halves_in_half_precision_and_other_memory_layouts(network):
    x, t, y = inputs(2)
    network.to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        empty = network.cached_modulation(torch.zeros_like(y[:1]))
        together = network(x, t, GuidedModulation(network.cached_modulation(y), empty))
        expected = two_passes(network, x, t, y)
    network.to(memory_format=torch.contiguous_format)
    assert empty.pairs[0][0].dtype == torch.bfloat16 and together.dtype == torch.float32
    exact = two_passes(network, x, t, y)
    assert (together - expected).square().mean() < 0.01 * exact.square().mean()


def test_an_encoder_without_spade_runs_once_for_both_halves(network):
    x, t, y = inputs(2)
    rows = []
    handles = [
        part.register_forward_hook(lambda _, inputs, output: rows.append(len(output)))
        for part in (network.input_blocks[-1], network.output_blocks[0])
    ]
    network(x, t, GuidedModulation(network.label_modulation(y), network.label_modulation(torch.zeros_like(y[:1]))))
    for handle in handles:
        handle.remove()
    assert rows == [4 if network.encoder_sees_labels else 2, 4]


def test_maps_of_some_rows():
    torch.manual_seed(0)
    layer, y, x = SPADEGroupNorm(32, 5, 2), torch.rand(4, 5, *SIZE), torch.randn(2, 32, 4, 8)
    rows = torch.tensor([False, True, False, True])
    stored = CachedModulation([LabelModulation(y).scale_shift(layer)])
    expected = layer(x, LabelModulation(y[rows]))
    for maps in (LabelModulation(y), stored):
        torch.testing.assert_close(layer(x, maps.rows(rows)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [(2, 4), (5, 6), (8, 16), (11, 3)])
@pytest.mark.parametrize("stride", [1, 2])
def test_the_empty_label_map_is_that_of_zeros(size, stride):
    torch.manual_seed(0)
    layer, y = SPADEGroupNorm(32, 5, stride), torch.zeros(1, 5, *size)
    found, expected = NullModulation(y + 1).scale_shift(layer), LabelModulation(y).scale_shift(layer)
    assert (expected[0] - expected[0].mean()).abs().max() > 1e-2  # the borders do differ
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_layers_are_counted_in_order(network):
    assert [spade.number for spade in network.spades] == list(range(len(network.spades)))
    assert len(network.spades) == sum(isinstance(module, SPADEGroupNorm) for module in network.modules())
