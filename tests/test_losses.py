"""The likelihood of pixels against closed forms (the variational terms: test_gaussian_diffusion)."""

import math

import pytest
import torch
from torch.distributions import Normal

from guided_diffusion.diffusion.losses import discretized_gaussian_log_likelihood

LEVELS = torch.arange(256, dtype=torch.float64) / 127.5 - 1  # the 8-bit pixel values


@pytest.mark.parametrize("mean, scale", [(0.1, 0.3), (-0.95, 0.1), (1.4, 0.002), (0.5, 1.0)])
def test_log_likelihood_gives_each_bin_its_share_of_the_gaussian(mean, scale):
    log_scale = torch.tensor(math.log(scale))
    log_likelihood = discretized_gaussian_log_likelihood(LEVELS, torch.full_like(LEVELS, mean), log_scale)
    cdf = Normal(torch.tensor(mean, dtype=torch.float64), scale).cdf(torch.cat([LEVELS - 1 / 255, LEVELS[-1:] + 1]))
    cdf[0], cdf[-1] = 0, 1  # the outer bins reach to infinity
    # The tanh form of the normal distribution function is off by up to 3e-4, and by less within one bin.
    torch.testing.assert_close(log_likelihood.exp(), cdf.diff(), rtol=0, atol=1.5e-4)
    assert log_likelihood.exp().sum().item() == pytest.approx(1, abs=1e-6)


def test_log_likelihood_of_impossible_pixels_is_finite():
    x, mean = torch.tensor([-1.0, 0.0, 1.0]), torch.tensor([1.0, 1.0, -1.0])
    log_likelihood = discretized_gaussian_log_likelihood(x, mean, torch.tensor(-10.0))
    torch.testing.assert_close(log_likelihood, torch.full((3,), math.log(1e-12)))
