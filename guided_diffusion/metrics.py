"""Measures on pictures (N, 3, H, W) in [-1, 1], per picture."""

import torch


def psnr(regenerated, original):
    """Peak signal-to-noise ratio in dB, (N,), from the mean square error over all pixels and channels; peak-to-peak 2."""
    error = (regenerated.float() - original.float()).flatten(1).square().mean(1)
    return 10 * torch.log10(4 / error)


def colour_error(regenerated, original):
    """How far the mean of each channel is off, (N, 3), in units of the [0, 1] range: the tints of a short training."""
    return (regenerated.float().mean((2, 3)) - original.float().mean((2, 3))).abs() / 2
