"""Figures from tensors: label colours, picture rows with captions."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..data.pictures import save_picture, to_uint8  # noqa: F401

# Colours of the Cityscapes ids (as the data set's own tools show them); further ids get spread-out hues.
_CITYSCAPES = {
    0: (0, 0, 0),
    1: (0, 0, 0),
    2: (0, 0, 0),
    3: (0, 0, 0),
    4: (0, 0, 0),
    5: (111, 74, 0),
    6: (81, 0, 81),
    7: (128, 64, 128),
    8: (244, 35, 232),
    9: (250, 170, 160),
    10: (230, 150, 140),
    11: (70, 70, 70),
    12: (102, 102, 156),
    13: (190, 153, 153),
    14: (180, 165, 180),
    15: (150, 100, 100),
    16: (150, 120, 90),
    17: (153, 153, 153),
    18: (153, 153, 153),
    19: (250, 170, 30),
    20: (220, 220, 0),
    21: (107, 142, 35),
    22: (152, 251, 152),
    23: (70, 130, 180),
    24: (220, 20, 60),
    25: (255, 0, 0),
    26: (0, 0, 142),
    27: (0, 0, 70),
    28: (0, 60, 100),
    29: (0, 0, 90),
    30: (0, 0, 110),
    31: (0, 80, 100),
    32: (0, 0, 230),
    33: (119, 11, 32),
    34: (0, 0, 142),
}


def palette(num_classes):
    """Return label colours, (num_classes, 3) uint8: those of Cityscapes for 35 classes, spread-out ones otherwise."""
    if num_classes == 35:
        return np.array([_CITYSCAPES[k] for k in range(35)], dtype=np.uint8)
    k = np.arange(num_classes)[:, None]
    # Odd multipliers walk through all 8-bit values, so that neighbouring ids look different.
    return ((k * np.array([[37, 91, 151]]) + np.array([[60, 120, 30]])) % 256).astype(np.uint8)


def colour_labels(label, num_classes):
    """Turn label maps (N, 1, H, W) into (N, H, W, 3) uint8 arrays; ids outside the palette are clipped."""
    ids = label[:, 0].detach().cpu().clamp(0, num_classes - 1).numpy()
    return palette(num_classes)[ids]


def show_semantics(y, num_classes, one_hot=True):
    """Show conditioning (N, C, H, W), clean or noisy: the strongest class's colour, with the edge plane drawn in white.

    :return: (N, H, W, 3) uint8.
    """
    y = y.detach().float().cpu()
    classes = num_classes if one_hot else 1
    label = y[:, :classes].argmax(1, keepdim=True) if one_hot else y[:, :1].round().long()
    colours = colour_labels(label, num_classes).astype(np.float32)
    if y.shape[1] > classes:
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
        draw.text((gap + column * (width + gap), 2), caption, fill="black", font=font)
    for i, row in enumerate(rows):
        for column, picture in enumerate(row):
            if picture is not None:
                tile = Image.fromarray(picture).resize((width, height), Image.NEAREST)
                canvas.paste(tile, (gap + column * (width + gap), head + gap // 2 + i * (height + gap)))
    return np.asarray(canvas)
