"""Classical picture codecs under a byte budget: what generation is compared with."""

import functools
import io
from typing import NamedTuple

import numpy as np
from PIL import Image, features

from ..console import InputError
from ..config import CODECS

SCALES = (1, 2, 4, 8)  # the picture is coded at 1/scale of its size and enlarged by the receiver

# Pillow's options: what is tried at every scale, and what has a last word at the best scale because it is slow. Higher
# efforts of JPEG XL are tuned for the eye: on street scenes of 64x128, effort 3 beats 7 by 0.3-0.9 dB at equal bytes.
_SEARCHED = {
    "jpeg": (
        {"optimize": True, "subsampling": "4:2:0"},
        {"optimize": True, "progressive": True, "subsampling": "4:2:0"},
        {"optimize": True, "subsampling": "4:4:4"},
    ),
    "webp": ({"method": 6},),
    "avif": ({"speed": 6, "subsampling": "4:2:0", "max_threads": 1},),
    "jxl": ({"effort": 3, "num_threads": 1, "use_container": False},),
}
_LAST_WORD = {
    "avif": ({"speed": 4, "subsampling": "4:2:0", "max_threads": 1},),
    "jxl": ({"effort": 9, "num_threads": 1, "use_container": False},),
}
_HIGHEST = {
    "jpeg": 95,
    "webp": 100,
    "avif": 99,
    "jxl": 99,
}  # qualities are 0 (jpeg: 1) to this; above, pictures are lossless
_NEAR = 12


class Coded(NamedTuple):
    """A picture coded within a budget: the file, 1/scale it was coded at, quality, and what the receiver sees.

    `picture` is (H, W, 3) uint8 at full size; `container_bytes` is what the codec spends on a flat grey picture.
    """

    data: bytes
    scale: int
    quality: int
    picture: np.ndarray
    container_bytes: int


def available(codec):
    """Tell whether a codec of `CODECS` is installed; AVIF and WebP come with Pillow, JPEG XL with pillow-jxl-plugin."""
    if codec not in CODECS:
        raise InputError(f"--baseline {codec}: unknown; choose from {', '.join(CODECS)}")
    if codec == "jxl":
        try:
            import pillow_jxl  # noqa: F401  (registers itself with Pillow)
        except ImportError:
            return False
        return True
    return codec == "jpeg" or bool(features.check(codec))


def _encode(codec, picture, quality, variant):
    buffer = io.BytesIO()
    picture.save(buffer, codec.upper(), quality=quality, **variant)
    return buffer.getvalue()


@functools.lru_cache
def container_bytes(codec):
    """Return the size in bytes of a flat grey 8x8 picture at the lowest quality: what a file costs before it says anything."""
    check_installed(codec)
    return len(_encode(codec, Image.new("RGB", (8, 8), (128, 128, 128)), _lowest(codec), _SEARCHED[codec][0]))


def _lowest(codec):
    return 1 if codec == "jpeg" else 0


def check_installed(codec):
    """Raise InputError unless a codec of `CODECS` is installed."""
    if not available(codec):
        package = "pip install pillow-jxl-plugin" if codec == "jxl" else "install a Pillow that has it"
        raise InputError(f"--baseline {codec}: not installed; {package}, or leave it out")


def decode(codec, data, height, width):
    """Decode a file of `best_within` and enlarge it (bicubic) to (height, width, 3) uint8.

    :raises InputError: damaged data, another format, or a picture larger than height x width.
    """
    check_installed(codec)
    try:
        with Image.open(io.BytesIO(data), formats=[codec.upper()]) as image:
            if image.width > width or image.height > height:
                raise InputError(
                    f"{codec} picture of {image.width}x{image.height} where at most {width}x{height} was agreed"
                )
            image = image.convert("RGB")
    except InputError:
        raise
    except Exception as error:  # decoders raise many kinds for damaged data
        reason = str(error).split("\n")[0][:100]
        raise InputError(f"{codec} data of {len(data)} bytes cannot be decoded ({reason}); it was damaged") from None
    return np.asarray(_resized(image, width, height, Image.Resampling.BICUBIC))


def _resized(image, width, height, method):
    return image if image.size == (width, height) else image.resize((width, height), method)


def _psnr(picture, original):
    """PSNR in dB of uint8 pictures; infinite for equal ones."""
    error = np.square(picture.astype(np.float64) - original).mean()
    return 10 * np.log10(255**2 / error) if error else np.inf


def _fitting(codec, small, budget, variant, around=None):
    """Return (quality, data) of the highest quality that fits, by bisection; None where none does.

    Size grows with quality but for a few bytes, so a step off the true best is possible, a file over budget is not.

    :param around: look only within _NEAR of this quality.
    """
    low, high = _lowest(codec), _HIGHEST[codec]
    if around is not None:
        low, high = max(low, around - _NEAR), min(high, around + _NEAR)
    data = _encode(codec, small, low, variant)
    if len(data) > budget:
        return None
    best = (low, data)
    while low < high:
        middle = (low + high + 1) // 2
        data = _encode(codec, small, middle, variant)
        if len(data) <= budget:
            low, best = middle, (middle, data)
        else:
            high = middle - 1
    return best


def best_within(codec, picture, budget_bytes, score=None):
    """Return the `Coded` with the best score whose whole file fits a budget, or None where not even the smallest does.

    Searches every scale of `SCALES` (Lanczos down, bicubic up) and the quality by bisection; slow settings at the best
    scale only.

    :param codec: of `CODECS`.
    :param picture: (H, W, 3) uint8.
    :param budget_bytes: the size that the file may have.
    :param score: function of (decoded, original), both (H, W, 3) uint8; larger is better. None: PSNR.
    :raises InputError: an unknown codec, or one that is not installed.
    """
    check_installed(codec)
    score = score or _psnr
    height, width = picture.shape[:2]
    whole = Image.fromarray(picture)
    best, best_score = None, -np.inf

    def consider(scale, variant, around=None):
        nonlocal best, best_score
        found = _fitting(codec, smaller[scale], budget_bytes, variant, around)
        if found:
            decoded = decode(codec, found[1], height, width)
            value = score(decoded, picture)
            if best is None or value > best_score:
                best, best_score = Coded(found[1], scale, found[0], decoded, container_bytes(codec)), value

    smaller = {}
    for scale in SCALES:
        size = max(1, round(width / scale)), max(1, round(height / scale))
        smaller[scale] = _resized(whole, *size, Image.Resampling.LANCZOS)
        # What this scale would give without any coding loss: where that is beaten already, coding it is in vain.
        ceiling = score(np.asarray(_resized(smaller[scale], width, height, Image.Resampling.BICUBIC)), picture)
        if best is None or ceiling > best_score:
            for variant in _SEARCHED[codec]:
                consider(scale, variant)
    scale, around = (best.scale, best.quality) if best else (SCALES[-1], None)  # another setting may fit where none did
    for variant in _LAST_WORD.get(codec, ()):
        consider(scale, variant, around)
    return best
