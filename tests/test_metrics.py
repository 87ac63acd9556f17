"""Measures on pictures against closed forms."""

import math

import pytest
import torch

from guided_diffusion.metrics import colour_error, psnr


@pytest.fixture
def pictures():
    return torch.rand(3, 3, 8, 16, generator=torch.Generator().manual_seed(0)) * 1.5 - 1


@pytest.mark.parametrize(("difference", "decibels"), [(2.0, 0.0), (0.2, 20.0), (0.02, 40.0), (2 / 255, 48.1308)])
def test_psnr_of_a_constant_difference(difference, decibels):
    low = torch.full((1, 3, 4, 4), -1.0)
    assert float(psnr(low + difference, low)) == pytest.approx(decibels, abs=1e-3)


def test_psnr_of_known_noise(pictures):
    noise = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(1))
    expected = [10 * math.log10(4 / float((0.1 * noise[k]).double().square().mean())) for k in range(3)]
    assert psnr(pictures + 0.1 * noise, pictures).tolist() == pytest.approx(expected, abs=1e-3)


def test_psnr_is_per_picture(pictures):
    off = pictures.clone()
    off[1] += 0.2
    values = psnr(off, pictures)
    assert values.shape == (3,)
    assert values[0] == math.inf and values[2] == math.inf and float(values[1]) == pytest.approx(20, abs=1e-3)


def test_psnr_takes_half_precision():
    low = torch.full((1, 3, 4, 4), -1.0, dtype=torch.bfloat16)
    assert psnr(low + 2, low).dtype == torch.float32


def test_colour_error_of_a_tint(pictures):
    tint = torch.tensor([0.1, -0.3, 0.0])[None, :, None, None]
    expected = torch.tensor([0.05, 0.15, 0.0]).expand(3, 3)  # of the [0, 1] range
    torch.testing.assert_close(colour_error(pictures + tint, pictures), expected, atol=1e-6, rtol=0)


def test_colour_error_sees_the_mean_alone(pictures):
    assert colour_error(pictures.flip(3), pictures).max() < 1e-6
    black, white = torch.full((1, 3, 2, 2), -1.0), torch.ones(1, 3, 2, 2)
    assert colour_error(black, white).tolist() == [[1.0, 1.0, 1.0]]
