"""Single pictures and id maps: reading, resizing, edges; arrays and tensors of their pixels; writing.

Sizes are (width, height) in pixels, as in Pillow. The resizing rule is that of guided diffusion (arXiv 2105.05233):
halve by averaging while the picture is at least twice too large, then one bicubic step.
"""

from contextlib import contextmanager
from pathlib import Path

import blobfile as bf
import numpy as np
import torch
from PIL import Image, ImageFilter

from ..console import InputError
from ..files import atomic_write
from .pairing import is_remote

# Modes whose pixels are one integer; of "P" the index counts, not the colour
ID_MODES = ("1", "L", "P", "I", "I;16", "I;16B")


@contextmanager
def _opened(path):
    """Yield the Pillow image of a local or remote file; any failure becomes an InputError that names the file."""
    try:
        with bf.BlobFile(path, "rb") if is_remote(path) else open(path, "rb") as file, Image.open(file) as image:
            yield image
    except Exception as error:  # Pillow raises a dozen kinds for files that are cut off or damaged
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{path} cannot be read as a picture ({reason}); replace or remove it") from error


def read_picture(path):
    """Read a picture as an 8-bit RGB Pillow image; InputError if it is unreadable."""
    with _opened(path) as image:
        return image.convert("RGB")


def read_ids(path):
    """Read a label or instance map as a Pillow image of ids; InputError if it is unreadable or a colour picture."""
    with _opened(path) as image:
        ids = image.copy()
    if ids.mode not in ID_MODES:
        raise InputError(f"{path} is a colour picture (mode {ids.mode}); use the dataset's id files, one id per pixel")
    return ids.convert("I") if ids.mode == "I;16B" else ids  # Pillow does not resize big-endian pixels


def picture_size(path):
    """Return (width, height) from the file's header alone; InputError if it is unreadable."""
    with _opened(path) as image:
        return image.size


def fitted_size(size, short):
    """Return the size with the same aspect whose short side is `short`, after the halvings of `resize_picture`."""
    while min(size) >= 2 * short:
        size = (size[0] // 2, size[1] // 2)
    scale = short / min(size)
    return round(size[0] * scale), round(size[1] * scale)


def resize_picture(picture, size):
    """Halve by BOX while the short side is at least twice that of `size`, then BICUBIC to `size`."""
    while min(picture.size) >= 2 * min(size):
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    return picture.resize(size, Image.Resampling.BICUBIC)


def edge_pixels(picture):
    """Edge map of an 8-bit RGB picture: FIND_EDGES of its grey form.

    Pillow copies the frame of one pixel from the grey picture unfiltered; published weights expect that.

    :return: uint8 array (H, W).
    """
    return np.asarray(picture.convert("L").filter(ImageFilter.FIND_EDGES))  # (H, W)


def centred(pixels):
    """8-bit pixels, an array of any shape -> float32 tensor in [-1, 1]."""
    # Bytes are put in order before they become four times as many
    values = np.ascontiguousarray(pixels).astype(np.float32)
    values /= 127.5
    values -= 1.0
    return torch.from_numpy(values)


def eight_bit(images):
    """Round pictures (N, 3, H, W) in [-1, 1] as their files do."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255) / 127.5 - 1


def to_uint8(images):
    """Turn pictures (N, 3, H, W) in [-1, 1] into (N, H, W, 3) uint8 arrays."""
    scaled = ((images.detach().float().cpu() + 1) * 127.5).round().clamp(0, 255)
    return scaled.to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def from_uint8(picture):
    """Turn an (H, W, 3) uint8 array into (1, 3, H, W) in [-1, 1]."""
    return centred(picture).permute(2, 0, 1)[None]


def save_picture(picture, path, palette=None):
    """Write a uint8 array (H, W, 3), or ids (H, W) with a palette (K, 3), as PNG, by a temporary name."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(picture)
    if palette is not None:
        image.putpalette(np.asarray(palette, dtype=np.uint8).flatten().tolist())
    with atomic_write(path, "wb") as f:
        image.save(f, format="PNG")
