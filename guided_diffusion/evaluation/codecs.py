"""Classical picture codecs under a byte budget: what generation is compared with."""

import functools
import io
from typing import NamedTuple

import numpy as np
from PIL import Image, features

from ..console import InputError
from ..link.source_coding import pillow_jxl

SCALES = (1, 2, 4, 8)  # the picture is coded at 1/scale of its size and enlarged by the receiver
NEAR = 12  # qualities around the best so far among which slow settings look
_JPEG = {"optimize": True, "subsampling": "4:2:0"}
_AVIF = {"subsampling": "4:2:0", "max_threads": 1}
_JXL = {"num_threads": 1, "use_container": False}
# Pillow's options: what is tried at every scale, and what has a last word at the best scale because it is slow. Higher
# efforts of JPEG XL are tuned for the eye: on street scenes of 64x128, effort 3 beats 7 by 0.3-0.9 dB at equal bytes.
SEARCHED = {
    "jpeg": (_JPEG, _JPEG | {"progressive": True}, _JPEG | {"subsampling": "4:4:4"}),
    "webp": ({"method": 6},),
    "avif": (_AVIF | {"speed": 6},),
    "jxl": (_JXL | {"effort": 3},),
}
LAST_WORD = {"avif": _AVIF | {"speed": 4}, "jxl": _JXL | {"effort": 9}}
QUALITIES = {"jpeg": (1, 95), "webp": (0, 100), "avif": (0, 99), "jxl": (0, 99)}  # above, pictures are lossless


class Coded(NamedTuple):
    """A picture within a budget: the file, at 1/scale of its size, and what the receiver sees: (H, W, 3) uint8."""

    data: bytes
    scale: int
    quality: int
    picture: np.ndarray


def available(codec):
    """Tell whether a codec of `CODECS` is installed; AVIF and WebP come with Pillow, JPEG XL with pillow-jxl-plugin."""
    return bool(pillow_jxl) if codec == "jxl" else codec == "jpeg" or bool(features.check(codec))


def check_installed(codec):
    """Raise InputError unless a codec of `CODECS` is installed."""
    if not available(codec):
        package = "pip install pillow-jxl-plugin" if codec == "jxl" else "install a Pillow that has it"
        raise InputError(f"--baseline {codec}: not installed; {package}, or leave it out")


def encode(codec, picture, quality, options):
    """Return the file of a Pillow picture."""
    buffer = io.BytesIO()
    picture.save(buffer, codec.upper(), quality=quality, **options)
    return buffer.getvalue()


def decode(data, height, width):
    """Decode a file and enlarge it (bicubic) to (height, width, 3) uint8."""
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC))


@functools.lru_cache
def container_bytes(codec):
    """Return what a file costs before it says anything: the bytes of a flat grey 8x8 picture at the lowest quality."""
    flat = Image.new("RGB", (8, 8), (128, 128, 128))
    return len(encode(codec, flat, QUALITIES[codec][0], SEARCHED[codec][0]))


def _error(picture, original):
    return np.square(np.asarray(picture, np.float64) - original).mean()


def _fitting(codec, small, budget, options, low, high):
    """Return (quality, data) of the highest quality in low...high that fits, by bisection; None where none does.

    Size grows with quality but for a few bytes, so a step off the true best is possible, a file over budget is not.
    """
    best, quality = None, low  # where the lowest does not fit, none does
    while low <= high:
        data = encode(codec, small, quality, options)
        if len(data) <= budget:
            low, best = quality + 1, (quality, data)
        else:
            high = quality - 1
        quality = (low + high) // 2
    return best


def best_within(codec, picture, budget_bytes):
    """Return the `Coded` with the best PSNR whose whole file fits a budget, or None where not even the smallest does.

    Searches every scale of `SCALES` (Lanczos down, bicubic up) and the quality; slow settings at the best scale only.

    :param codec: of `CODECS`, installed.
    :param picture: (H, W, 3) uint8.
    """
    (height, width), (low, high) = picture.shape[:2], QUALITIES[codec]
    smaller, best, least = {}, None, np.inf

    def consider(scale, options):
        nonlocal best, least
        found = _fitting(codec, smaller[scale], budget_bytes, options, low, high)
        if found:
            shown = decode(found[1], height, width)
            error = _error(shown, picture)
            if error < least:
                best, least = Coded(found[1], scale, found[0], shown), error

    for scale in SCALES:
        size = max(1, round(width / scale)), max(1, round(height / scale))
        smaller[scale] = Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS)
        # What this scale would give without any coding loss: where that is beaten already, coding it is in vain.
        if _error(smaller[scale].resize((width, height), Image.Resampling.BICUBIC), picture) < least:
            for options in SEARCHED[codec]:
                consider(scale, options)
    if best:
        low, high = max(low, best.quality - NEAR), min(high, best.quality + NEAR)
    if codec in LAST_WORD:
        consider(best.scale if best else SCALES[-1], LAST_WORD[codec])  # it may fit where no other did
    return best
