"""Figures from tensors: label colours, picture rows with captions."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..data.pictures import save_picture, to_uint8
from ..link.color_layer import PLANES
from .metrics import colour_error

# Colours of the Cityscapes ids 0...34, as rrggbb (as the data set's own tools show them).
_CITYSCAPES = """
    000000 000000 000000 000000 000000 6f4a00 510051 804080 f423e8 faaaa0 e6968c 464646
    66669c be9999 b4a5b4 966464 96785a 999999 999999 faaa1e dcdc00 6b8e23 98fb98 4682b4
    dc143c ff0000 00008e 000046 003c64 00005a 00006e 005064 0000e6 770b20 00008e
"""


def palette(num_classes):
    """Return label colours, (num_classes, 3) uint8: those of Cityscapes for 35 classes, spread-out ones otherwise."""
    if num_classes == 35:
        return np.frombuffer(bytes.fromhex(_CITYSCAPES), np.uint8).reshape(35, 3)
    k = np.arange(num_classes)[:, None]
    # Odd multipliers walk through all 8-bit values, so that neighbouring ids look different.
    return ((k * np.array([[37, 91, 151]]) + np.array([[60, 120, 30]])) % 256).astype(np.uint8)


def show_semantics(y, num_classes, one_hot=True):
    """Show conditioning (N, C, H, W), clean or noisy: the strongest class's colour, with the edge plane drawn in white.

    :return: (N, H, W, 3) uint8.
    """
    y, classes = y.detach().float().cpu(), num_classes if one_hot else 1
    label = y[:, :classes].argmax(1) if one_hot else y[:, 0].round().long().clamp(0, num_classes - 1)  # (N, H, W)
    colours = palette(num_classes)[label.numpy()].astype(np.float32)
    if y.shape[1] - classes in (1, 1 + PLANES):  # an edge plane, and perhaps those of a colour layer
        edge = y[:, classes].clamp(0, 1).numpy()[..., None]  # (N, H, W, 1)
        colours = colours + (255 - colours) * edge
    return colours.round().astype(np.uint8)


def picture_grid(rows, captions, gap=4):
    """Lay pictures out in columns under captions.

    :param rows: list of rows, each a list of (H, W, 3) uint8 arrays or None for an empty place.
    :param captions: one text per column.
    :return: (height, width, 3) uint8.
    """
    height, width = next(picture.shape[:2] for row in rows for picture in row if picture is not None)
    # Small pictures are enlarged: a caption has to fit above them.
    zoom = -(-192 // width)
    height, width, head = height * zoom, width * zoom, 18
    canvas = Image.new("RGB", (len(captions) * (width + gap) + gap, head + len(rows) * (height + gap) + gap), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=12)
    for column, caption in enumerate(captions):
        left = gap + column * (width + gap)
        draw.text((left, 2), caption, fill="black", font=font)
        for i, row in enumerate(rows):
            if row[column] is not None:
                tile = Image.fromarray(row[column]).resize((width, height), Image.NEAREST)
                canvas.paste(tile, (left, head + gap // 2 + i * (height + gap)))
    return np.asarray(canvas)


def write_panel(results, rows, columns):
    """Write panel.png of a `ResultsFolder`, a line for each of some rows of its table.

    :param columns: caption -> kind of picture file, or a function from a row's name to a picture (H, W, 3) uint8.
    """
    lines = []
    for name in (row["name"] for row in rows):
        lines.append([kind(name) if callable(kind) else results.pixels(kind, name) for kind in columns.values()])
    path = results.file("", "panel")
    if lines:
        save_picture(picture_grid(lines, list(columns)), path)
    else:
        path.unlink(missing_ok=True)  # of other rows


def preview_panel(images, y, regenerated, num_classes, one_hot=True):
    """Show what a network in training makes of some scenes: original, label map and edges, regenerated.

    :param images, regenerated: (N, 3, H, W) in [-1, 1].
    :param y: (N, C, H, W) conditioning.
    :return: the panel (height, width, 3) uint8, and the mean colour error (see `metrics.colour_error`).
    """
    columns = to_uint8(images), show_semantics(y, num_classes, one_hot), to_uint8(regenerated)
    panel = picture_grid(list(zip(*columns, strict=True)), ["original", "label map and edges", "regenerated"])
    return panel, float(colour_error(regenerated, images).mean())
