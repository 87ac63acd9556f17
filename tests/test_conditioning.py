"""A label map made ready for a chain, against the plain denoiser: both passes, everything computed at every step."""

import pytest
import torch
from conftest import tiny_network

from guided_diffusion import InputError
from guided_diffusion.diffusion.conditioning import Conditioning
from guided_diffusion.diffusion.gaussian_diffusion import create_gaussian_diffusion, guide, guided_denoiser
from guided_diffusion.diffusion.spade import CachedModulation, LabelModulation, NullModulation

SIZE = (8, 16)


def normals(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", params=["unet", "enconly"])
def parts(request):
    model, diffusion = tiny_network(unet_model=request.param)
    return (
        model.requires_grad_(False),
        diffusion,
        (normals(3, 5, *SIZE, seed=7) > 0.8).float(),
        normals(3, 3, *SIZE, seed=8),
    )


@pytest.mark.parametrize("cache_bytes", [0, 900_000, 2**31])  # the second: too little for the empty label map
@pytest.mark.parametrize("s", [1.0, 2.5])
def test_equals_the_plain_denoiser(parts, s, cache_bytes):
    model, diffusion, y, x = parts
    t = torch.tensor([999, 500, 0])
    plain = guided_denoiser(model, diffusion, y, s)(x, t)
    condition = Conditioning(model, y, s, cache_bytes)
    torch.testing.assert_close(condition.denoiser(diffusion, s, 3)(x, t), plain, rtol=0, atol=2e-5)
    rows = torch.tensor([True, False, True])
    torch.testing.assert_close(
        condition.denoiser(diffusion, s, 2, rows)(x[rows], t[rows]), plain[rows], rtol=0, atol=2e-5
    )


def test_the_bound_counts_bytes_of_the_precision(parts):
    model, _, y, _ = parts
    for limit, kinds in (
        (4, (CachedModulation, CachedModulation)),
        (3, (CachedModulation, NullModulation)),
        (2, (LabelModulation, NullModulation)),
    ):
        found = Conditioning(model, y, 2.0, model.modulation_bytes(limit, *SIZE))
        assert (type(found.modulation), type(found.null)) == kinds and found.is_cached == (limit >= 3)
    needed = model.modulation_bytes(3 + 1, *SIZE)
    with torch.autocast("cpu", torch.bfloat16):
        half = Conditioning(model, y, 2.0, needed // 2)
    tensors = [tensor for maps in (half.modulation, half.null) for pair in maps.pairs for tensor in pair]
    assert half.is_cached and sum(tensor.nbytes for tensor in tensors) == needed // 2


def test_guidance_of_a_function_without_variance():
    diffusion = create_gaussian_diffusion(diffusion_steps=10, noise_schedule="cosine")
    condition = Conditioning(lambda x, timesteps, y: x * y[:, :3], normals(1, 3, *SIZE), 2.0)
    x, y = normals(2, 3, *SIZE, seed=1), normals(1, 3, *SIZE)
    assert not condition.is_cached
    torch.testing.assert_close(condition.denoiser(diffusion, 2.0, 2)(x, torch.zeros(2, dtype=torch.int64)), 2 * x * y)


def test_guide_is_the_formula_and_keeps_the_variance():
    output, baseline = normals(2, 6, 4, 4), normals(2, 6, 4, 4, seed=1)
    guided = guide(output, baseline, 3.0)
    torch.testing.assert_close(guided[:, :3], baseline[:, :3] + 3 * (output - baseline)[:, :3], rtol=0, atol=1e-5)
    assert torch.equal(guided[:, 3:], output[:, 3:])


def test_bad_arguments(parts):
    model, diffusion, y, _ = parts
    with pytest.raises(InputError, match=r"--s 0\.5: the guidance scale must be at least 1"):
        Conditioning(model, y, 0.5)
    with pytest.raises(InputError, match="made ready for 2"):
        Conditioning(model, y, 2.0).denoiser(diffusion, 1.0, 3)
    for cache_bytes in (0, 2**31):
        with pytest.raises(InputError, match="conditioning y: expected"):
            Conditioning(model, y[:, 1:], 1.0, cache_bytes)
