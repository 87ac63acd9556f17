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
    """A picture coded within a budget: the file, 1/scale it was coded at, quality, and what the receiver sees.

    `picture` is (H, W, 3) uint8 at full size.
    """

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


@functools.lru_cache
def container_bytes(codec):
    """Return what a file costs before it says anything: the bytes of a flat grey 8x8 picture at the lowest quality."""
    check_installed(codec)
    flat = Image.new("RGB", (8, 8), (128, 128, 128))
    return len(encode(codec, flat, QUALITIES[codec][0], SEARCHED[codec][0]))


def decode(codec, data, height, width):
    """Decode a file and enlarge it (bicubic) to (height, width, 3) uint8."""
    with Image.open(io.BytesIO(data), formats=[codec.upper()]) as image:
        return np.asarray(_resized(image.convert("RGB"), width, height, Image.Resampling.BICUBIC))


def _resized(image, width, height, method):
    return image if image.size == (width, height) else image.resize((width, height), method)


def _psnr(picture, original):
    """PSNR in dB of uint8 pictures; infinite for equal ones."""
    error = np.square(picture.astype(np.float64) - original).mean()
    return 10 * np.log10(255**2 / error) if error else np.inf


def _fitting(codec, small, budget, options, low, high):
    """Return (quality, data) of the highest quality in low...high that fits, by bisection; None where none does.

    Size grows with quality but for a few bytes, so a step off the true best is possible, a file over budget is not.
    """
    data = encode(codec, small, low, options)
    if len(data) > budget:
        return None
    best = low, data
    while low < high:
        middle = (low + high + 1) // 2
        data = encode(codec, small, middle, options)
        if len(data) <= budget:
            low, best = middle, (middle, data)
        else:
            high = middle - 1
    return best


def best_within(codec, picture, budget_bytes):
    """Return the `Coded` with the best PSNR whose whole file fits a budget, or None where not even the smallest does.

    Searches every scale of `SCALES` (Lanczos down, bicubic up) and the quality; slow settings at the best scale only.

    :param codec: of `CODECS`.
    :param picture: (H, W, 3) uint8.
    """
    check_installed(codec)
    height, width = picture.shape[:2]
    low, high = QUALITIES[codec]
    smaller, best, best_psnr = {}, None, -np.inf

    def consider(scale, options):
        nonlocal best, best_psnr
        found = _fitting(codec, smaller[scale], budget_bytes, options, low, high)
        if found:
            decoded = decode(codec, found[1], height, width)
            value = _psnr(decoded, picture)
            if best is None or value > best_psnr:
                best, best_psnr = Coded(found[1], scale, found[0], decoded), value

    for scale in SCALES:
        size = max(1, round(width / scale)), max(1, round(height / scale))
        smaller[scale] = _resized(Image.fromarray(picture), *size, Image.Resampling.LANCZOS)
        # What this scale would give without any coding loss: where that is beaten already, coding it is in vain.
        uncoded = np.asarray(_resized(smaller[scale], width, height, Image.Resampling.BICUBIC))
        if best is None or _psnr(uncoded, picture) > best_psnr:
            for options in SEARCHED[codec]:
                consider(scale, options)
    if best:
        low, high = max(low, best.quality - NEAR), min(high, best.quality + NEAR)
    if codec in LAST_WORD:
        consider(best.scale if best else SCALES[-1], LAST_WORD[codec])  # it may fit where no other did
    return best
