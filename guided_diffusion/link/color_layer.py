"""The colour layer: a coarse picture beside the label map, in some dozens of bytes (after SPIC, arXiv 2310.15737).

The picture in YCbCr, one orthonormal cosine transform (DCT-II) over the whole of it, a dead-zone quantiser with one
step, and the arithmetic coder of the label maps. How large a coefficient is expected to be follows from its frequency,
by a `ColorPrior` fitted to training pictures: coefficients that are all but surely zero are not coded at all.
"""

import functools
from dataclasses import dataclass

import numpy as np
import torch

from ..console import InputError
from .entropy_coding import ONE, coder

PLANES = 4  # of a layer, the last ones of the conditioning
RESIDUAL = 0.2  # of the range [-1, 1]: about the standard deviation of what a layer lacks
STEPS = 256  # numbers n of quantiser steps 2^(n/16), in grey levels of the transform at 128x256
TRAINED = range(88, 176)  # steps that networks are trained for: at 128x256 from 2 kB to 5 bytes
# Rows: Y, Cb and Cr of RGB (ITU-T T.871).
YCBCR = np.array([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])
_POWERS = [(i, j) for i in range(4) for j in range(4 - i)]  # of the prior's ten terms u^i v^j
_UNIT, _WEIGHT = 64, 4096  # integers stand for 1/64 octave, and for 1/4096 in a prior
_THRESHOLD = 0.83  # steps from which on a coefficient is not zero: a dead zone of 1.66 steps
_LEAST = 0.02  # coefficients that are less often than this not zero are not coded
_SETTLED = 128  # twice the count of coefficients that a prior's probabilities stand for
_MOST = 2**12  # steps of one coefficient


@functools.cache
def _cosines(n):
    """Return the orthonormal DCT-II of n values, as a matrix (n, n)."""
    matrix = np.cos(np.pi * (np.arange(n) + 0.5) * np.arange(n)[:, None] / n) * np.sqrt(2 / n)
    matrix[0] /= np.sqrt(2)
    return matrix


def spectrum(picture):
    """Return the transform (3, H, W) of a picture (H, W, 3) uint8: Y, Cb, Cr by vertical and horizontal frequency."""
    planes = np.moveaxis((picture.astype(np.float64) - 128) @ YCBCR.T, 2, 0)  # (3, H, W)
    return _cosines(planes.shape[1]) @ planes @ _cosines(planes.shape[2]).T


def from_spectrum(values):
    """Undo `spectrum`: return (H, W, 3) uint8."""
    planes = _cosines(values.shape[1]).T @ values @ _cosines(values.shape[2])
    picture = np.moveaxis(planes, 0, 2) @ np.linalg.inv(YCBCR).T + 128
    return picture.round().clip(0, 255).astype(np.uint8)


@functools.cache
def _terms(height, width):
    """Return u^i v^j of u, v = log2(1 + frequency), (10, H, W) int64, in 1/64: integers are equal on any machine."""
    u, v = (np.round(_UNIT * np.log2(1 + np.arange(side))).astype(np.int64) for side in (height, width))
    return np.stack([u[:, None] ** i * v**j * _UNIT // _UNIT ** (i + j) for i, j in _POWERS])


@dataclass(frozen=True)
class ColorPrior:
    """How large coefficients are expected to be: log2 of their mean magnitude, a cubic in the log frequencies.

    :param weights: of Y, Cb and Cr: ten integers each, in 1/4096.
    """

    weights: tuple

    @classmethod
    def fit(cls, pictures):
        """Fit a prior to an iterable of pictures (H, W, 3) uint8 of one size."""
        total = count = 0
        for picture in pictures:
            total, count = total + np.abs(spectrum(picture)), count + 1
        mean = total / count  # (3, H, W)
        height, width = mean.shape[1:]
        # Low frequencies count most: of them the layer is made.
        trust = (1 + np.hypot(np.arange(height)[:, None], np.arange(width))).reshape(-1, 1) ** -0.5  # (HW, 1)
        terms = _terms(height, width).reshape(len(_POWERS), -1).T / _UNIT * trust  # (HW, 10)
        logs = np.log2(mean + 1e-3).reshape(3, -1).T * trust  # (HW, 3)
        weights = np.linalg.lstsq(terms, logs, rcond=None)[0].T
        return cls(tuple(tuple(row) for row in np.round(_WEIGHT * weights).astype(int).tolist()))

    @classmethod
    def of(cls, model):
        """Return the prior that a network carries in its weights, as a buffer (3, 10); None without a colour layer."""
        if not model.layer_channels:
            return None
        return cls(tuple(tuple(map(int, row)) for row in model.color_prior.tolist()))

    def levels(self, step, height, width):
        """Return 4 log2 of the expected magnitudes in quantiser steps, (3, H, W) int64."""
        logs = np.tensordot(np.array(self.weights), _terms(height, width), 1) * 16 // (_WEIGHT * _UNIT)
        return (logs - _exponent(step, height, width)) // 4


def _exponent(step, height, width):
    """Return 16 log2 of a quantiser step: the transform grows with sqrt(HW), the step's error in the picture not."""
    return step + round(8 * np.log2(height * width / 2**15))


@functools.cache
def _chances(level):
    """Return the probabilities (in 1/65536) of a coefficient that is not zero, and of each further step of one."""
    decay = 2.0 ** (-level / 4)  # of a Laplace density, per step
    chances = np.exp(-_THRESHOLD * decay), np.exp(-decay)
    return tuple(int(np.clip(round(ONE * chance), 32, ONE - 32)) for chance in chances)


def _coded(levels):
    """Return the mask of the coefficients that are coded."""
    return levels >= next(level for level in range(-99, 99) if _chances(level)[0] >= _LEAST * ONE)


def _quantise(values, step, levels):
    """Return the coefficients in whole steps, (3, H, W) int64."""
    steps = values / 2.0 ** (_exponent(step, *values.shape[1:]) / 16)
    sizes = np.floor(np.abs(steps) + 1 - _THRESHOLD).clip(max=_MOST)
    return np.where(_coded(levels), np.sign(steps) * sizes, 0).astype(np.int64)


def _restore(numbers, step, levels):
    """Return coefficients from whole steps: the mean of the Laplace density over each step's interval."""
    decay = 2.0 ** (-np.maximum(levels, -20) / 4)  # of those that are coded
    inside = 1 / decay - 1 / np.expm1(decay)  # from the interval's lower end, in 0...1/2
    magnitude = np.abs(numbers) - 1 + _THRESHOLD + inside
    return np.sign(numbers) * magnitude * 2.0 ** (_exponent(step, *numbers.shape[1:]) / 16)


def layer_planes(picture, step):
    """Return the planes (4, H, W) float32 of a layer (H, W, 3) uint8 for the network: in [-1, 1], and a constant.

    The constant tells the step, (step + 4) / 256. Planes of zeros stand for a layer that was not sent, or was lost.
    """
    planes = torch.from_numpy(picture).permute(2, 0, 1).float() / 127.5 - 1  # (3, H, W)
    return torch.cat([planes, torch.full_like(planes[:1], (step + 4) / STEPS)])


def received_planes(body, size, prior):
    """Return the planes (1, 4, H, W) of a message's colour part: the step's number and coded layer, or nothing."""
    if not body:
        return torch.zeros(1, PLANES, *size)
    return layer_planes(decode_color(body[1:], body[0], size, prior), body[0])[None]


def is_sent(y):
    """Tell of conditionings (N, C, H, W) whether their layers are there: bool (N, 1, 1, 1)."""
    return y[:, -1:, :1, :1] > 0


def residual(image, y):
    """Return what the network makes of a picture (N, 3, H, W): what its layer lacks, at unit scale.

    :param y: (N, C, H, W) conditioning, whose last planes are the layer's, or these alone.
    """
    return (image - y[:, -PLANES:-1]) / RESIDUAL


def from_residual(values, y):
    """Undo `residual`, within the valid range."""
    return (y[:, -PLANES:-1] + RESIDUAL * values).clamp(-1, 1)


def coarse(picture, step, prior):
    """Return what `decode_color` will make of a picture (H, W, 3) uint8, of the same form, without coding it."""
    levels = prior.levels(step, *picture.shape[:2])
    return from_spectrum(_restore(_quantise(spectrum(picture), step, levels), step, levels))


def encode_color(picture, step, prior):
    """Code the colour layer of a picture (H, W, 3) uint8 with quantiser step number `step` in 0...255."""
    levels = prior.levels(step, *picture.shape[:2])
    code, finish = coder()
    _walk(_quantise(spectrum(picture), step, levels), levels, code)
    return finish()


def decode_color(data, step, size, prior):
    """Undo `encode_color`, to the picture (H, W, 3) uint8 of a size (H, W). Raises InputError for damaged bytes."""
    levels, numbers = prior.levels(step, *size), np.zeros((3, *size), np.int64)
    code, finish = coder(data)
    if not _walk(numbers, levels, code) or finish() != data:
        raise InputError("the colour layer is damaged; send it again")
    return from_spectrum(_restore(numbers, step, levels))


def _walk(numbers, levels, code):
    """Code the coefficients, or fill them in with a decoder's `code`; return False where no encoder has been."""
    nodes = {level: [[chance, _SETTLED, None] for chance in _chances(level)] for level in np.unique(levels).tolist()}
    for place in map(tuple, np.argwhere(_coded(levels)).tolist()):
        number, size = int(numbers[place]), 0
        some, more = nodes[int(levels[place])]
        while code(some if size == 0 else more, abs(number) > size):
            size += 1
            if size > _MOST:
                return False
        negative = size and code([ONE // 2, 2, None], number < 0)
        numbers[place] = -size if negative else size
    return True
