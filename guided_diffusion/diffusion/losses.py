"""Likelihood terms of the variational bound (DDPM, arXiv 2006.11239; improved diffusion, arXiv 2102.09672)."""

import math

import torch


def mean_flat(x):
    """Mean over all but the batch dimension: (N, ...) -> (N,)."""
    return x.flatten(1).mean(1)


def normal_kl(mean1, logvar1, mean2, logvar2):
    """KL(N1 || N2) of diagonal Gaussians from their log variances, element by element, in nats."""
    return 0.5 * (-1 + logvar2 - logvar1 + (logvar1 - logvar2).exp() + (mean1 - mean2) ** 2 * (-logvar2).exp())


def discretized_gaussian_log_likelihood(x, mean, log_scale):
    """Log probability, in nats, of 8-bit pixels under a Gaussian integrated over each pixel's bin (DDPM, eq. 13).

    :param x: (N, 3, H, W), values k/127.5 - 1 for k in 0...255.
    :param mean: as x.
    :param log_scale: log standard deviation, as x.
    :return: as x; the two outer bins reach to infinity.
    """
    centred, inverse = x - mean, torch.exp(-log_scale)
    upper = _normal_cdf(inverse * (centred + 1 / 255))
    lower = _normal_cdf(inverse * (centred - 1 / 255))
    probability = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return probability.clamp(min=1e-12).log()


def _normal_cdf(x):
    # The tanh form of the family, kept so that likelihoods compare.
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def nats_to_bits(x):
    """Convert nats to bits."""
    return x / math.log(2)
