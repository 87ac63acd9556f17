"""Sliced Wasserstein distance (SWD) of Laplacian-pyramid patches (Karras et al., arXiv 1710.10196, section 5).

It needs no trained weights, and sees the fine texture to which a small segmenter's features are blind.
"""

import math

import torch
import torch.nn.functional as F

from ..random_streams import generator

COARSEST = 16  # the levels' short side is halved down to this
PATCH, PATCHES = 7, 128  # pixels a side; patches of each picture and level
DIRECTIONS = 128
_LINE = torch.tensor([1.0, 4, 6, 4, 1]) / 16


def laplacian_pyramid(images):
    """Split pictures (N, C, H, W) into bands: dict from short side to (N, C, h, w), the finest first.

    A band is what a picture loses when it is halved and enlarged again by the binomial filter 1 4 6 4 1 (Burt and
    Adelson 1983); the last, whose short side is at least 16 and below 32, is the small picture itself.
    """
    bands = {}
    while (short := min(images.shape[2:])) >= 2 * COARSEST:
        smaller = _blur(images)[:, :, ::2, ::2]
        spread = torch.zeros_like(images)
        spread[:, :, ::2, ::2] = smaller
        bands[short] = images - 4 * _blur(spread)  # three of four pixels of `spread` are zero
        images = smaller
    return bands | {min(images.shape[2:]): images}


def _blur(images):
    kernel = torch.outer(_LINE, _LINE).expand(images.shape[1], 1, 5, 5)
    return F.conv2d(F.pad(images, (2, 2, 2, 2), mode="reflect"), kernel, groups=images.shape[1])


def descriptors(images, first=0):
    """Cut patches out of the bands of pictures (N, C, H, W): dict from short side to (N, 128, C, 7, 7).

    :param first: the first picture's number in its set; where patches lie follows from it alone. So both sets of
        pictures are cut at the same places, and equal sets have distance 0.
    """
    found = {}
    for short, band in laplacian_pyramid(images).items():
        windows, own = band.unfold(2, PATCH, 1).unfold(3, PATCH, 1), []  # (N, C, h - 6, w - 6, 7, 7)
        for k, picture in enumerate(windows, first):
            stream = generator(0, "swd patches", k, short)
            rows, columns = (torch.randint(side, (PATCHES,), generator=stream) for side in picture.shape[1:3])
            own.append(picture[:, rows, columns].transpose(0, 1))  # (128, C, 7, 7)
        found[short] = torch.stack(own)
    return found


def sliced_wasserstein(regenerated, original, weights):
    """Return 1000 times the SWD of two sets' patches (n, P, C, 7, 7), for each row of `weights` (R, n): (R,).

    Patches are projected on random unit directions; the distance is the mean over directions of the 1-D Wasserstein
    distance. That of weighted samples is the integral of |F - G| over their distribution functions, which for equal
    weights is the mean |difference| of the sorted values.

    Both sets are normalised, per channel, to mean 0 and standard deviation 1 of the *originals'* patches. The paper's
    published code normalises each set by its own, which makes the measure blind to lost contrast (docs/link.md).

    :param weights: how often each picture counts: ones, or a bootstrap's counts (see `metrics.resamples`).
    """
    (n, patches, *shape), signs = original.shape, torch.tensor([1.0, -1.0])
    stream = generator(0, "swd directions")
    directions = F.normalize(torch.randn(DIRECTIONS, math.prod(shape), generator=stream))
    axes = {"dim": (0, 1, 3, 4), "keepdim": True}  # all but the channels
    both = (torch.cat([regenerated, original]) - original.mean(**axes)) / original.std(**axes).clamp(min=1e-6)
    both, total = both.flatten(2).flatten(0, 1), torch.zeros(len(weights))  # (2 n P, C * 49)
    for direction in directions:
        values, order = (both @ direction).sort()
        source = order // patches  # picture: 0...n-1 of the first set, then of the second
        signed = weights[:, source % n] * signs[source // n]
        total += signed.cumsum(1)[:, :-1].abs() @ values.diff()
    return 1000 * total / (DIRECTIONS * patches * weights.sum(1))
