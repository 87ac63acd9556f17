"""Classical picture codecs under a byte budget: what generation is compared with.

"jpeg", "webp" and "avif" count the whole file; "jpeg-bare", "webp-bare" and "avif-bare" what `payload` leaves of it,
for links whose two ends have agreed on the rest. A JPEG XL file is a bare codestream already.
"""

import functools
import io
import re
from typing import NamedTuple

import numpy as np
from PIL import Image, features

from ..console import InputError
from ..link.source_coding import pillow_jxl

SCALES = (1, 2, 4, 8)  # the picture is coded at 1/scale of its size and enlarged by the receiver
NEAR = 12  # qualities around the best so far among which slow settings look
_JPEG = {"optimize": True, "subsampling": "4:2:0"}
_STANDARD = {"optimize": False, "subsampling": "4:2:0"}  # Huffman tables of the standard, which need not be sent
_AVIF = {"subsampling": "4:2:0", "max_threads": 1}
_JXL = {"num_threads": 1, "use_container": False}
# Pillow's options: what is tried at every scale, and what has a last word at the best scale because it is slow. Higher
# efforts of JPEG XL are tuned for the eye: on street scenes of 64x128, effort 3 beats 7 by 0.3-0.9 dB at equal bytes.
SEARCHED = {
    "jpeg": (_JPEG, _JPEG | {"progressive": True}, _JPEG | {"subsampling": "4:4:4"}),
    "jpeg-bare": (_STANDARD, _JPEG, _JPEG | {"progressive": True}, _JPEG | {"subsampling": "4:4:4"}),
    "webp": ({"method": 6},),
    "avif": (_AVIF | {"speed": 6},),
    "jxl": (_JXL | {"effort": 3},),
}
LAST_WORD = {"avif": _AVIF | {"speed": 4}, "jxl": _JXL | {"effort": 9}}
QUALITIES = {"jpeg": (1, 95), "webp": (0, 100), "avif": (0, 99), "jxl": (0, 99)}  # above, pictures are lossless
_HUFFMAN, _SCAN, _END = 0xC4, 0xDA, 0xD9  # JPEG markers


class Coded(NamedTuple):
    """A picture within a budget: the bytes that are sent and counted, and what the receiver sees: (H, W, 3) uint8."""

    data: bytes
    scale: int
    quality: int
    picture: np.ndarray


def base(codec):
    """Return the name of a codec of `CODECS` without "-bare"."""
    return codec.partition("-")[0]


def check_installed(codec):
    """Raise InputError unless a codec of `CODECS` is installed; all but JPEG XL come with Pillow."""
    if not (pillow_jxl if codec == "jxl" else base(codec) == "jpeg" or features.check(base(codec))):
        package = "pip install pillow-jxl-plugin" if codec == "jxl" else "install a Pillow that has it"
        raise InputError(f"--baseline {codec}: not installed; {package}, or leave it out")


def encode(codec, picture, quality, options):
    """Return the file of a Pillow picture."""
    buffer = io.BytesIO()
    picture.save(buffer, base(codec).upper(), quality=quality, **options)
    return buffer.getvalue()


def payload(codec, data):
    """Return what is sent of a codec's file: all of it, or of a bare one what follows from nothing agreed before.

    - webp-bare: the VP8 frame (RFC 6386), with its own tag and size.
    - avif-bare: the payload of the box "mdat", an AV1 stream that a decoder takes as it is, sequence header included.
    - jpeg-bare: entropy-coded data and Huffman tables (DHT segments) other than the standard's. All else follows from
      quality, scale and mode, which are not counted (3 bytes at most, in the codec's favour).
    """
    if codec == "webp-bare":
        return data[20 : 20 + int.from_bytes(data[16:20], "little")]
    if codec == "avif-bare":
        place = 0
        while data[place + 4 : place + 8] != b"mdat":
            place += int.from_bytes(data[place : place + 4], "big")
        return data[place + 8 : place + int.from_bytes(data[place : place + 4], "big")]
    if codec == "jpeg-bare":
        kept = (part for marker, part in _jpeg_parts(data) if marker in (None, _HUFFMAN))
        return b"".join(part for part in kept if part not in _standard_tables())
    return data


def _jpeg_parts(data):
    """Yield (marker, bytes) of each segment of a JPEG file, and after a scan's header (None, entropy-coded data)."""
    place = 2
    while (marker := data[place + 1]) != _END:
        end = place + 2 + int.from_bytes(data[place + 2 : place + 4], "big")
        yield marker, data[place:end]
        place = end
        if marker == _SCAN:  # 0xff is followed by 0, or by a restart marker, inside of the data
            place = re.compile(b"\xff[^\x00\xd0-\xd7]", re.DOTALL).search(data, end).start()
            yield None, data[end:place]


@functools.cache
def _standard_tables():
    data = encode("jpeg", Image.new("RGB", (8, 8)), 50, _STANDARD)
    return {part for marker, part in _jpeg_parts(data) if marker == _HUFFMAN}


def decode(data, height, width):
    """Decode a file and enlarge it (bicubic) to (height, width, 3) uint8."""
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC))


@functools.lru_cache
def container_bytes(codec):
    """Return what a codec costs before it says anything: the bytes of a flat grey 8x8 picture at the lowest quality."""
    flat = Image.new("RGB", (8, 8), (128, 128, 128))
    return len(payload(codec, encode(codec, flat, QUALITIES[base(codec)][0], SEARCHED[base(codec)][0])))


def _error(picture, original):
    return np.square(np.asarray(picture, np.float64) - original).mean()


def _fitting(codec, small, budget, options, low, high):
    """Return (quality, file) of the highest quality in low...high that fits, by bisection; None where none does.

    Size grows with quality but for a few bytes, so a step off the true best is possible, a file over budget is not.
    """
    best, quality = None, low  # where the lowest does not fit, none does
    while low <= high:
        data = encode(codec, small, quality, options)
        if len(payload(codec, data)) <= budget:
            low, best = quality + 1, (quality, data)
        else:
            high = quality - 1
        quality = (low + high) // 2
    return best


def best_within(codec, picture, budget_bytes):
    """Return the `Coded` with the best PSNR whose `payload` fits a budget, or None where not even the smallest does.

    Searches every scale of `SCALES` (Lanczos down, bicubic up) and the quality; slow settings at the best scale only.

    :param codec: of `CODECS`, installed.
    :param picture: (H, W, 3) uint8.
    """
    (height, width), (low, high) = picture.shape[:2], QUALITIES[base(codec)]
    smaller, best, least = {}, None, np.inf

    def consider(scale, options):
        nonlocal best, least
        found = _fitting(codec, smaller[scale], budget_bytes, options, low, high)
        if found:
            shown = decode(found[1], height, width)
            error = _error(shown, picture)
            if error < least:
                best, least = Coded(payload(codec, found[1]), scale, found[0], shown), error

    for scale in SCALES:
        size = max(1, round(width / scale)), max(1, round(height / scale))
        smaller[scale] = Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS)
        # What this scale would give without any coding loss: where that is beaten already, coding it is in vain.
        if _error(smaller[scale].resize((width, height), Image.Resampling.BICUBIC), picture) < least:
            for options in SEARCHED.get(codec, SEARCHED[base(codec)]):
                consider(scale, options)
    if best:
        low, high = max(low, best.quality - NEAR), min(high, best.quality + NEAR)
    if base(codec) in LAST_WORD:
        consider(best.scale if best else SCALES[-1], LAST_WORD[base(codec)])  # it may fit where no other did
    return best
