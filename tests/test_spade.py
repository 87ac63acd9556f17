"""How a network is given its conditioning: computed, cached, or both halves of guidance in one batch; compiled."""

import pytest
import torch
from conftest import normals, tiny_network

from guided_diffusion.diffusion.conditioning import Conditioning
from guided_diffusion.diffusion.spade import GuidedModulation, LabelModulation, NullModulation, SPADEGroupNorm

SIZE = (8, 16)
PLACES = ["unet", "spadeboth", "enconly"]


@pytest.fixture(scope="module", params=PLACES)
def network(request):
    return tiny_network(unet_model=request.param)[0].requires_grad_(False)


def inputs(n, labels=None):
    draw = torch.Generator().manual_seed(n)
    x, y = torch.randn(n, 3, *SIZE, generator=draw), torch.rand(labels or n, 5, *SIZE, generator=draw)
    return x, torch.tensor([0.0, 731.0, 5.5])[:n], y


@pytest.mark.parametrize("is_cached", [True, False])
@pytest.mark.parametrize("labels", [3, 1])
def test_guided_modulation_equals_two_passes(network, is_cached, labels):
    (x, t, y), rows = inputs(3, labels), []
    halves = [network.label_modulation(maps) for maps in (y, torch.zeros_like(y[:1]))]
    if is_cached:
        halves = [network.cached_modulation(half) for half in halves]
    parts = (network.input_blocks[-1], network.output_blocks[0])
    handles = [part.register_forward_hook(lambda _, inputs, output: rows.append(len(output))) for part in parts]
    together = network(x, t, GuidedModulation(*halves))
    for handle in handles:
        handle.remove()
    y = y.expand(3, -1, -1, -1)
    expected = torch.cat([network(x, t, y), network(x, t, torch.zeros_like(y))])
    assert (expected[:3] - expected[3:]).abs().max() > 0.05
    torch.testing.assert_close(together, expected, rtol=0, atol=1e-5)
    assert rows == [6 if network.encoder_sees_labels else 3, 6]  # a plain encoder serves both halves


@pytest.mark.parametrize("size", [(2, 4), (5, 6), (8, 16), (11, 3)])
@pytest.mark.parametrize("stride", [1, 2])
def test_null_modulation_is_that_of_zeros(size, stride):
    torch.manual_seed(0)
    layer, y = SPADEGroupNorm(32, 5, stride), torch.zeros(1, 5, *size)
    found, expected = NullModulation(y + 1).scale_shift(layer), LabelModulation(y, [stride]).scale_shift(layer)
    assert (expected[0] - expected[0].mean()).abs().max() > 1e-2  # the borders do differ
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.fixture
def compiled():
    torch._dynamo.reset()
    yield lambda function: torch.compile(function, backend="aot_eager", fullgraph=True)
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("places", PLACES)
@pytest.mark.parametrize("use_checkpoint", [False, True])
def test_compile_has_no_graph_breaks_in_training(compiled, places, use_checkpoint):
    model = tiny_network(unet_model=places, use_checkpoint=use_checkpoint)[0].train()
    losses = (forward(*inputs(2)).square().mean() for forward in (model.forward, compiled(model.forward)))
    plain, found = (torch.autograd.grad(loss, list(model.parameters())) for loss in losses)
    torch.testing.assert_close(found, plain, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("places, cache_bytes", [("unet", 0), ("unet", 2**31), ("spadeboth", 0), ("enconly", 2**31)])
def test_compile_has_no_graph_breaks_in_guided_sampling(compiled, places, cache_bytes):
    model, diffusion = tiny_network(unet_model=places)
    model.requires_grad_(False)
    condition, x = Conditioning(model, inputs(3)[2], 2.0, cache_bytes), normals(2, 3, *SIZE)
    denoiser = condition.denoiser(diffusion, 2, torch.tensor([0, 2]))
    t = torch.tensor([3, 700])
    plain = denoiser(x, t)
    model.forward = compiled(model.forward)
    torch.testing.assert_close(denoiser(x, t), plain, rtol=0, atol=1e-5)
