"""A label map made ready for a chain, against the plain denoiser: both passes, everything computed at every step."""

import pytest
import torch
from conftest import normals, tiny_network

from guided_diffusion.diffusion.conditioning import Conditioning
from guided_diffusion.diffusion.gaussian_diffusion import create_gaussian_diffusion, guided_denoiser
from guided_diffusion.diffusion.spade import CachedModulation, LabelModulation, NullModulation

SIZE = (8, 16)


@pytest.fixture(scope="module", params=["unet", "enconly"])
def parts(request):
    model, diffusion = tiny_network(unet_model=request.param)
    y = (normals(3, 5, *SIZE, seed=7) > 0.8).float()
    return model.requires_grad_(False), diffusion, y, normals(3, 3, *SIZE, seed=8)


@pytest.mark.parametrize("cache_bytes", [0, 900_000, 2**31])  # the second: too little for the null conditioning
@pytest.mark.parametrize("s", [1.0, 2.5])
def test_conditioning_equals_the_plain_denoiser(parts, s, cache_bytes):
    model, diffusion, y, x = parts
    t = torch.tensor([999, 500, 0])
    plain = guided_denoiser(model, diffusion, y, s)(x, t)
    condition = Conditioning(model, y, s, cache_bytes)
    torch.testing.assert_close(condition.denoiser(diffusion, 3)(x, t), plain, rtol=0, atol=2e-5)
    rows = torch.tensor([0, 2])
    found = condition.denoiser(diffusion, 2, rows)(x[rows], t[rows])
    torch.testing.assert_close(found, plain[rows], rtol=0, atol=2e-5)


def test_conditioning_keeps_what_fits_in_bytes_of_the_precision(parts):
    model, _, y, _ = parts
    cached, label, null = CachedModulation, LabelModulation, NullModulation
    for limit, kinds in ((4, (cached, cached)), (3, (cached, null)), (2, (label, null))):
        found = Conditioning(model, y, 2.0, model.modulation_bytes(limit, *SIZE))
        assert (type(found.modulation), type(found.null)) == kinds
    needed = model.modulation_bytes(3 + 1, *SIZE)
    with torch.autocast("cpu", torch.bfloat16):
        half = Conditioning(model, y, 2.0, needed // 2)
    tensors = [tensor for form in (half.modulation, half.null) for pair in form.pairs for tensor in pair]
    assert sum(tensor.nbytes for tensor in tensors) == needed // 2


@pytest.mark.parametrize("cache_bytes", [0, 2**31])
def test_conditioning_of_survivors_has_its_index_on_the_device(cache_bytes, monkeypatch):
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)  # it does not know this device
    model, diffusion = (part.to("meta") for part in tiny_network())
    condition = Conditioning(model, torch.zeros(3, 5, *SIZE, device="meta"), 1.0, cache_bytes)
    x, t, seen = torch.zeros(2, 3, *SIZE, device="meta"), torch.zeros(2, dtype=torch.int64, device="meta"), []
    model.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[2]))
    condition.denoiser(diffusion, 2, torch.tensor([0, 2]))(x, t)
    index = seen[0].chosen if cache_bytes else seen[0].y[:, 0, 0, 0]
    assert index.device.type == "meta" and index.shape == (2,)


def test_guidance_of_a_function_without_variance():
    diffusion = create_gaussian_diffusion(diffusion_steps=10, noise_schedule="cosine")
    x, y = normals(2, 3, *SIZE, seed=1), normals(1, 3, *SIZE)
    condition = Conditioning(lambda x, timesteps, y: x * y[:, :3], y, 2.0)
    torch.testing.assert_close(condition.denoiser(diffusion, 2)(x, torch.zeros(2, dtype=torch.int64)), 2 * x * y)
