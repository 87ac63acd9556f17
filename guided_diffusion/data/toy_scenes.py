"""Toy street scenes in the Cityscapes layout, so that everything runs without a download.

A scene is a street in metres (x to the right, y up from the road, d ahead of the camera) seen through a pinhole camera.
Every shape is painted at twice the size asked for, into the picture and into the map of instance ids; then the picture
is averaged down and the map subsampled. The layout does not depend on the size: one seed is one street at all sizes.
"""

import itertools
import math
import os
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from ..console import InputError
from .pairing import CITYSCAPES

ROAD, SIDEWALK, BUILDING, POLE, SIGN, VEGETATION, TERRAIN, SKY = 7, 8, 11, 17, 20, 21, 22, 23
PERSON, RIDER, CAR, BICYCLE = 24, 25, 26, 33

SUPERSAMPLE, CAMERA_HEIGHT, FOCAL = 2, 2.0, 1.15  # pixels; m; focal length in picture heights
FAR, HAZE_DISTANCE = 85.0, 150.0  # m: where the street ends; over which a colour fades to 1/e into the haze
VAL_OFFSET, SEED_STRIDE = 500_000, 1_000_000  # seed of scene k: seed * stride (+ offset in val) + k

LIGHTS = [  # day, overcast, low sun, dusk: sky above, sky at the horizon, RGB factors, clouds, share of lit windows
    ((84, 140, 214), (190, 214, 236), (1.0, 1.0, 0.98), 0.5, 0.02),
    ((158, 168, 180), (204, 208, 212), (0.9, 0.91, 0.93), 0.35, 0.05),
    ((112, 128, 184), (246, 184, 130), (1.02, 0.93, 0.84), 0.45, 0.15),
    ((62, 76, 132), (186, 150, 160), (0.68, 0.68, 0.77), 0.3, 0.4),
]
WALLS = [(168, 104, 84), (186, 132, 104), (206, 186, 150), (216, 204, 178), (176, 172, 166), (150, 128, 110)]
ROOFS = [(140, 72, 56), (112, 74, 62), (92, 90, 94)]
CAR_PAINT = [(178, 34, 38), (36, 66, 140), (226, 226, 226), (42, 44, 48), (150, 154, 160), (208, 166, 44), (44, 98, 84)]
SHIRTS = [(160, 50, 54), (52, 74, 128), (70, 70, 76), (196, 170, 70), (96, 130, 96), (200, 200, 196)]
TROUSERS, SKIN = [(48, 52, 70), (70, 62, 54), (40, 40, 44)], [(224, 180, 150), (170, 122, 92), (112, 80, 62)]
SIGNS = [(34, 78, 176), (200, 36, 40), (236, 196, 40)]
GLASS, DOOR, LAMPLIGHT = (62, 76, 96), (84, 62, 48), (255, 224, 140)
GRAIN = {SKY: 1.0, VEGETATION: 4.0, TERRAIN: 3.5}  # noise in grey levels, 2 elsewhere; an edge filter amplifies it


class Street:
    """One street: its random stream, its layout (metres), its light, and the picture and id map it is painted on."""

    def __init__(self, rng, height, width):
        self.rng, self.height, self.width = rng, height * SUPERSAMPLE, width * SUPERSAMPLE
        self.horizon, self.vanishing = rng.uniform(0.38, 0.5) * self.height, rng.uniform(0.4, 0.6) * self.width
        self.half_road, self.camera_x = rng.uniform(3.4, 5.2), rng.uniform(-0.4, 1.8)
        self.front = self.half_road + rng.uniform(2.2, 4.0)  # where the pavements end and the houses stand
        self.house_height = rng.uniform(6.5, 13.0)  # mean
        top, low, tint, clouds, self.lamps = LIGHTS[rng.choice(4, p=[0.5, 0.2, 0.18, 0.12])]
        brightness, hue = rng.uniform(0.9, 1.08), rng.uniform(-10, 10, 3)
        self.sky_top, self.sky_low = np.array(top) * brightness + hue, np.array(low) * brightness + hue / 2
        self.tint, self.clouds = np.array(tint) * brightness, clouds * rng.uniform(0.3, 1.0)
        self.sun = rng.choice([-1, 1])  # the sun's side
        self.image = Image.new("RGB", (self.width, self.height))
        self.ids = Image.new("I", (self.width, self.height), SKY)
        self.paint, self.mark = ImageDraw.Draw(self.image), ImageDraw.Draw(self.ids)
        self.things = itertools.count()

    def at(self, x, y, d):
        """Point (x, y, d) in metres -> (column, row) in pixels."""
        s = self.scale(d)
        return self.vanishing + s * (x - self.camera_x), self.horizon + s * (CAMERA_HEIGHT - y)

    def scale(self, d):  # pixels per metre at distance d
        return FOCAL * self.height / d

    def lit(self, colour, d, factor=1.0):
        """Colour of a surface at distance d: light, then haze."""
        clear = math.exp(-d / HAZE_DISTANCE)
        mixed = zip(colour, self.tint, self.sky_low, strict=True)
        return tuple(min(255, max(0, int(c * t * factor * clear + h * (1 - clear)))) for c, t, h in mixed)

    def pick(self, colours, spread=8.0):
        """One of the colours, each channel moved by up to ±spread."""
        return np.array(colours[self.rng.integers(len(colours))]) + self.rng.uniform(-spread, spread, 3)

    def fill(self, points, colour, ident=None, shape="polygon"):
        """Polygon (or the ellipse in a box) in pixels; without ident it changes the colour only."""
        getattr(self.paint, shape)(points, fill=colour)
        if ident is not None:
            getattr(self.mark, shape)(points, fill=ident)

    def oval(self, x, y, rx, ry, colour, ident=None):
        """Ellipse about (x, y) in pixels, at least one final pixel wide and high."""
        rx, ry = max(rx, SUPERSAMPLE / 2), max(ry, SUPERSAMPLE / 2)
        self.fill((x - rx, y - ry, x + rx, y + ry), colour, ident, "ellipse")

    def bar(self, x0, y0, x1, y1, colour, ident=None):
        """Upright rectangle between two pixel corners, at least one final pixel wide and high."""
        x1, y1 = max(x1, x0 + SUPERSAMPLE), max(y1, y0 + SUPERSAMPLE)
        self.fill([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], colour, ident)

    def rect(self, x, y, d, colour, ident=None):
        """Rectangle in metres: two of x, y and d are pairs (from, to), the third is a number."""
        spans = (span if isinstance(span, tuple) else (span,) for span in (x, y, d))
        a, b, c, e = (self.at(*corner) for corner in itertools.product(*spans))
        self.fill([a, c, e, b], colour, ident)


def draw_background(street):
    """Sky with soft clouds, the ground up to the horizon, and the houses and trees behind the far end of the street."""
    rows = np.linspace(0, 1, 48)[:, None, None]
    sky = street.sky_top * (1 - rows) + street.sky_low * rows + np.zeros((48, 96, 1))  # (48, 96, 3)
    seeds = Image.fromarray(street.rng.integers(0, 256, (7, 9), dtype=np.uint8))
    cover = np.asarray(seeds.resize((96, 48), Image.Resampling.BICUBIC))[..., None] / 255  # (48, 96, 1)
    sky += (street.sky_low * 0.4 + 150 - sky) * street.clouds * np.clip(2 * cover - 0.9, 0, 1)
    small = Image.fromarray(np.clip(sky, 0, 255).astype(np.uint8))
    street.image.paste(small.resize((street.width, int(street.horizon) + 2), Image.Resampling.BILINEAR), (0, 0))
    rng, x = street.rng, -8 * street.front
    street.rect((-2000, 2000), 0, (1, 4 * FAR), street.lit((104, 134, 70), 20), TERRAIN)
    while x < 8 * street.front:
        width, d, top = rng.uniform(8, 16), rng.uniform(1.1, 1.6) * FAR, street.house_height * rng.uniform(0.7, 1.3)
        if rng.random() < 0.55:
            street.rect((x, x + width), (0, top), d, street.lit(street.pick(WALLS), d), BUILDING)
        else:
            draw_crown(street, x + width / 2, 4, d, width / 3)
        x += width


def draw_ground(street):
    """Pavements with slabs and kerbs, the road in bands that fade with distance, and its lane marks and crossings."""
    rng, r, sun, tone = street.rng, street.half_road, street.sun, street.rng.uniform(-10, 10, 2)
    road, slab, white = np.array((94, 94, 97)) + tone[0], np.array((170, 163, 155)) + tone[1], (228, 228, 222)
    for band in itertools.pairwise(np.geomspace(1.0, 1.5 * FAR, 24)):
        for side in (-1, 1):
            shade = 0.86 if side == sun else 1.0  # the houses on the sun's side shade their pavement
            street.rect((side * r, side * (street.front + 0.2)), 0, band, street.lit(slab, band[0], shade), SIDEWALK)
            street.rect((side * r, side * (r + 0.3)), 0, band, street.lit(slab, band[0], shade * 1.16))
        street.rect((-r, r), 0, band, street.lit(road, band[0]), ROAD)
        street.rect((sun * r * 0.72, sun * r), 0, band, street.lit(road, band[0], 0.86))
    for d, side in itertools.product(np.arange(3, 32, 2.0), (-1, 1)):
        street.rect((side * (r + 0.3), side * street.front), 0, (d, d * 1.012 + 0.03), street.lit(slab, d, 0.78))
    for d in np.arange(rng.uniform(2, 6), 60, 7.0):
        street.rect((-0.1, 0.1), 0, (d, d + 3.5), street.lit(white, d))
    for x in (0.4 - r, r - 0.4) if rng.random() < 0.6 else ():
        street.rect((x - 0.07, x + 0.07), 0, (2, 60), street.lit(white, 12))
    d = rng.uniform(8, 18)
    for x in np.arange(0.5 - r, r - 0.6, 1.1) if rng.random() < 0.3 else ():
        street.rect((x, x + 0.6), 0, (d, d + 3), street.lit(white, d))


def draw_building(street, side, d0, d1):
    """One house: roof, the gable wall that faces the camera, the front along the street and its windows."""
    rng, x, top = street.rng, side * street.front, street.house_height * street.rng.uniform(0.75, 1.25)
    wall, roof, shade = street.pick(WALLS), street.pick(ROOFS), 0.84 if side == street.sun else 1.06
    gable = street.lit(wall, d0, 0.92)
    if rng.random() < 0.6:  # pitched
        eave, ridge, *far = (street.at(x + dx, y, d) for d in (d0, d1) for dx, y in ((0, top), (side * 3, top + 2.2)))
        street.fill([eave, ridge, street.at(x + side * 6, top, d0)], gable, BUILDING)
        street.fill([eave, *far, ridge], street.lit(roof, d0, shade), BUILDING)
    street.rect((x, x + side * 30), (0, top), d0, gable, BUILDING)
    street.rect(x, (0, top), (d0, d1), street.lit(wall, d0, shade), BUILDING)
    street.rect(x, (top - 0.35, top), (d0, d1), street.lit(wall, d0, shade * 0.8))
    floor, bays, width = rng.uniform(2.8, 3.4), int((d1 - d0) / rng.uniform(2.2, 3.2)), rng.uniform(0.42, 0.6)
    lowest = (0.15, 0.8, 0.8, GLASS) if rng.random() < 0.5 else (0.0, 0.7, 0.35, DOOR)  # shop windows, or doors
    step = (d1 - d0) / bays
    for i, j in itertools.product(range(int((top - 0.3) / floor)), range(bays)):
        low, high, share, colour = (0.3, 0.85, width, GLASS) if i else lowest
        a = d0 + step * (j + 0.5 - share / 2)
        colour = street.lit(LAMPLIGHT, a, 1.15) if rng.random() < street.lamps else street.lit(colour, a)
        street.rect(x, ((i + low) * floor, (i + high) * floor), (a, a + step * share), colour)


def draw_buildings(street):
    """Both rows of houses, far to near, with a garden of trees here and there."""
    for side in (-1, 1):
        starts = 1.2 + np.concatenate([[0.0], np.cumsum(street.rng.uniform(7, 14, 8))])  # about FAR metres
        for d0, d1 in reversed(list(itertools.pairwise(starts))):
            if d0 < 8 or street.rng.random() > 0.14:
                draw_building(street, side, d0, d1)
            else:
                for d in (d1 - 1, (d0 + d1) / 2, d0 + 1):
                    draw_tree(street, side * (street.front + street.rng.uniform(2.0, 3.5)), d)


def draw_crown(street, x, y, d, radius):
    """Leaves: dark ovals first, then lighter ones towards the sun."""
    rng, (px, py), r, green = street.rng, street.at(x, y, d), radius * street.scale(d), street.pick([(62, 108, 46)])
    street.oval(px, py, 0.75 * r, 0.7 * r, street.lit(green, d, 0.86), VEGETATION)
    for factor, count, reach, shift in ((0.8, 7, 0.6, 0.0), (1.0, 6, 0.5, 0.16), (1.25, 5, 0.42, 0.3)):
        for angle in rng.uniform(0, 2) + np.arange(count) * 2 * math.pi / count:
            size = r * rng.uniform(0.36, 0.52) * (1.3 - 0.35 * factor)
            cx = px + r * (reach * math.cos(angle) + street.sun * shift * 0.6)
            cy = py + r * (reach * math.sin(angle) * 0.9 - shift)
            street.oval(cx, cy, size, size, street.lit(green, d, factor * rng.uniform(0.94, 1.06)), VEGETATION)


def draw_tree(street, x, d):
    radius, s, (px, base) = street.rng.uniform(1.3, 2.1), street.scale(d), street.at(x, 0, d)
    middle = radius + street.rng.uniform(2.0, 2.8)
    street.oval(px, base, 0.9 * s, 0.16 * s, street.lit((110, 106, 100), d))  # shadow
    street.bar(px - 0.14 * s, base - middle * s, px + 0.14 * s, base, street.lit((92, 70, 52), d), VEGETATION)
    draw_crown(street, x, middle, d, radius)


def draw_lamp(street, x, d):
    s, steel, (px, base) = street.scale(d), street.lit((104, 108, 112), d), street.at(x, 0, d)
    top, arm = base - street.rng.uniform(5.0, 6.5) * s, px - math.copysign(1.3, x) * s
    street.bar(px - 0.07 * s, top, px + 0.07 * s, base, steel, POLE)
    street.bar(min(px, arm), top, max(px, arm), top + 0.12 * s, steel, POLE)


def draw_sign(street, x, d):
    """Traffic sign on a pole: a disc, a triangle or a square, with a white dot."""
    s, (px, base), colour = street.scale(d), street.at(x, 0, d), street.lit(street.pick(SIGNS), d, 1.1)
    y, r, kind = base - 2.6 * s, 0.48 * s, street.rng.integers(3)
    street.bar(px - 0.06 * s, y, px + 0.06 * s, base, street.lit((140, 144, 146), d), POLE)
    if kind == 0:
        street.oval(px, y, r, r, colour, SIGN)
    else:
        lower = [(px, y + r)] if kind == 1 else [(px + r, y + r), (px - r, y + r)]
        street.fill([(px - r, y - r), (px + r, y - r), *lower], colour, SIGN)
    street.oval(px, y - 0.2 * r, 0.4 * r, 0.4 * r, street.lit((238, 238, 234), d))


def draw_car(street, x, d, oncoming):
    """A car as two boxes in perspective, its near end at distance d; the id covers body, glass and wheels."""
    ident, colour, length = CAR * 1000 + next(street.things), street.pick(CAR_PAINT, 10), street.rng.uniform(3.8, 4.5)
    w, sill, deck, roof, end = 0.9, 0.3, 0.9, street.rng.uniform(1.42, 1.6), d + length
    near = math.copysign(1.0, street.camera_x - x)  # the flank that the camera sees
    flank, glass, tyre = x + near * w, street.lit((46, 56, 70), d), street.lit((28, 28, 30), d)

    def panel(low, high, light):  # between two lines across the car, each (half width, y, distance)
        corners = ((-1, low), (1, low), (1, high), (-1, high))
        points = [street.at(x + k * half, y, t) for k, (half, y, t) in corners]
        street.fill(points, street.lit(colour, d, light) if light else glass, ident)

    street.rect((x - w - 0.25, x + w + 0.25), 0, (d - 0.15, end), street.lit((52, 52, 56), d))  # shadow
    street.rect(flank, (sill, deck), (d, end), street.lit(colour, d, 0.92 if near == street.sun else 0.76), ident)
    for t in (d + 0.75, end - 0.8):
        (a, y), (b, _) = (street.at(flank, 0.33, t + half) for half in (-0.34, 0.34))
        street.oval((a + b) / 2, y, abs(a - b) / 2, 0.33 * street.scale(t), tyre, ident)
    panel((w, deck, d), (w, deck, end), 1.15)
    outline = ((0.06, deck, d + 0.3), (0.2, roof, d + 0.8), (0.2, roof, end - 1.5), (0.06, deck, end - 0.9))
    street.fill([street.at(flank - near * k, y, t) for k, y, t in outline], glass, ident)  # side windows
    panel((0.7, roof, d + 0.8), (0.7, roof, end - 1.5), 1.2)
    panel((0.86, deck, d + 0.3), (0.72, roof, d + 0.8), 0.9)
    panel((0.74, deck + 0.05, d + 0.35), (0.64, roof - 0.1, d + 0.75), None)
    panel((w, sill, d), (w, deck, d), 1.0)
    panel((w, sill - 0.06, d), (w, sill + 0.12, d), 0.55)
    lamp = street.lit((250, 246, 220) if oncoming else (214, 32, 30), d, 1.2)
    for k in (-1, 1):
        street.rect((x + k * w, x + k * (w - 0.24)), (0, sill - 0.06), d, tyre, ident)
        street.rect((x + k * 0.56, x + k * 0.84), (0.61, 0.79), d, lamp)
    street.rect((x - 0.26, x + 0.26), (0.48, 0.6), d, street.lit((232, 232, 226), d))  # number plate


def draw_person(street, x, d, riding=False):
    """A pedestrian, or a cyclist seen along the street on a narrow bicycle."""
    s, lift, (px, base) = street.scale(d), 0.25 if riding else 0.0, street.at(x, 0, d)
    ident, bicycle = (label * 1000 + next(street.things) for label in (RIDER if riding else PERSON, BICYCLE))
    shirt, trousers, tyre = street.pick(SHIRTS), street.pick(TROUSERS), street.lit((30, 30, 34), d)
    hip, foot, stride = base - (0.85 + lift) * s, base - 0.35 * lift * s, street.rng.uniform(0.1, 0.28) * s
    street.oval(px, base, 0.34 * s, 0.07 * s, street.lit((90, 88, 86), d))  # shadow
    for k in (-1, 1):
        shoe = px + k * stride
        leg = [(px - 0.13 * s, hip), (px + 0.13 * s, hip), (shoe + 0.08 * s, foot), (shoe - 0.08 * s, foot)]
        street.fill(leg, street.lit(trousers, d, 1.0 + 0.1 * k), ident)
    for half, low, light in ((0.28, -0.05, 0.8), (0.2, 0.06, 1.05)):  # arms, body
        street.bar(px - half * s, hip - 0.58 * s, px + half * s, hip + low * s, street.lit(shirt, d, light), ident)
    street.oval(px, hip - 0.74 * s, 0.14 * s, 0.17 * s, street.lit(street.pick(SKIN), d), ident)
    street.oval(px, hip - 0.82 * s, 0.13 * s, 0.09 * s, street.lit((60, 46, 36), d), ident)  # hair
    if riding:
        street.oval(px, base - 0.36 * s, 0.1 * s, 0.36 * s, tyre, bicycle)
        street.bar(px - 0.34 * s, base - 1.06 * s, px + 0.34 * s, base - 0.98 * s, tyre, bicycle)


def place_things(street):
    """(distance, drawer, x, ...) of the cars, parked ones where the road is wide, and of what is on the pavements."""
    rng, r, density = street.rng, street.half_road, street.rng.uniform(0.1, 1.0)
    parking, lane = r > 4.3, r * (0.3 if r > 4.3 else 0.48)
    rows = [(lane, 7.5, density * 0.6), (-lane, 6.0, density * 0.8), (r - 1.15, 5.5, density), (1.15 - r, 5.5, density)]
    things = []
    for x, start, chance in rows if parking else rows[:2]:
        stops = start + rng.uniform(0, 6) + np.cumsum(rng.uniform(5.4, 10.4, 6)) - 5.4
        things += [(d, draw_car, x + rng.uniform(-0.12, 0.12), x < 0) for d in stops if rng.random() < chance]
    for side in (-1, 1):
        trees, lamps, riders = rng.random(3) < (0.7, 0.7, 0.35)  # which of them this side has
        if trees:
            rows = np.arange(rng.uniform(8, 15), 65, rng.uniform(8, 14))
            things += [(d, draw_tree, side * (r + 0.9)) for d in rows if rng.random() < 0.8]
        if lamps:
            things += [(d, draw_lamp, side * (r + 0.45)) for d in np.arange(rng.uniform(7, 16), 60, 16)]
        if riders:
            things.append((rng.uniform(7, 18), draw_person, side * (r + 0.1), True))
        things += [(d, draw_sign, side * (r + 0.6)) for d in rng.uniform(6.5, 24, rng.integers(0, 3))]
        walkers = rng.uniform(6.5, 30, rng.integers(0, 4))
        things += [(d, draw_person, side * rng.uniform(r + 0.9, street.front - 0.4)) for d in walkers]
    return things


def draw_scene(seed, height=128, width=256):
    """Draw one street scene; a function of (seed, height, width) alone.

    :param seed: integer >= 0.
    :param height, width: size in pixels. The street is fitted to the height; 2:1 shows it best.
    :return: image (H, W, 3) uint8; label (H, W) uint8, Cityscapes ids; instance (H, W) int32, label * 1000 + k for
        the countable classes (person, rider, car, bicycle; k from 0 per class) and the label id elsewhere.
    """
    street = Street(np.random.default_rng(seed), height, width)
    for draw in (draw_background, draw_ground, draw_buildings):
        draw(street)
    for d, draw, x, *kind in sorted(place_things(street), key=lambda thing: -thing[0]):
        draw(street, x, d, *kind)

    instance = np.array(street.ids, dtype=np.int32)[::SUPERSAMPLE, ::SUPERSAMPLE].copy()  # (H, W)
    label = np.where(instance >= 1000, instance // 1000, instance).astype(np.uint8)
    for thing in (PERSON, RIDER, CAR, BICYCLE):  # k from 0, without gaps where something is hidden
        instance[label == thing] = thing * 1000 + np.unique(instance[label == thing], return_inverse=True)[1]
    grain = np.array([GRAIN.get(k, 2.0) for k in range(256)])[label][..., None]
    noise = grain * street.rng.standard_normal((height, width, 1))  # last, since it depends on the size
    image = np.rint(np.asarray(street.image.reduce(SUPERSAMPLE)) + noise)
    return np.clip(image, 0, 255).astype(np.uint8), label, instance


def write_toy_scenes(data_dir, train=200, val=16, height=128, width=256, seed=0, progress=True):
    """Write a toy data set in the Cityscapes layout, all of it or nothing.

    :param data_dir: folder to create; it may be there if it is empty.
    :param train, val: number of scenes per split, below 500,000; the two splits share no scene.
    :param height, width, seed: as in `draw_scene`; other seeds give other scenes.
    """
    target = Path(data_dir).resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{data_dir}: exists and is not an empty folder; name a new folder or remove it first")
    scenes = [("train", k, k) for k in range(train)] + [("val", k, VAL_OFFSET + k) for k in range(val)]
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as temporary:
        root = Path(temporary) / "scenes"  # one level down: the temporary folder itself is closed to other users
        for split, k, number in tqdm(scenes, desc="toy scenes", unit="scene", disable=not progress):
            image, label, instance = draw_scene(seed * SEED_STRIDE + number, height, width)
            for array, files in zip((image, label, instance.astype(np.uint16)), CITYSCAPES, strict=True):
                path = root / files.folder.format(split) / f"toytown/toytown_{k:06d}_000000{files.endings[0]}"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(path)
        try:
            os.replace(root, target)
        except OSError:
            if not (target / "leftImg8bit").is_dir():  # else another process drew them meanwhile
                raise
