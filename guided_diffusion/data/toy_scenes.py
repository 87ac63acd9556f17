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

from ..console import InputError, bar_options
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
        self.scale = FOCAL * self.height  # pixels per metre at a distance of 1 m
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
        s = self.scale / d
        return self.vanishing + s * (x - self.camera_x), self.horizon + s * (CAMERA_HEIGHT - y)

    def pick(self, colours, spread=8.0):
        """One of the colours, each channel moved by up to ±spread."""
        return np.array(colours[self.rng.integers(len(colours))]) + self.rng.uniform(-spread, spread, 3)

    def fill(self, points, d, colour, ident=None, light=1.0, shape="polygon"):
        """Polygon (or ellipse in a box) in pixels, lit and in the haze of distance d; ident None leaves the ids."""
        clear = math.exp(-d / HAZE_DISTANCE)
        mixed = zip(colour, self.tint, self.sky_low, strict=True)
        seen = tuple(min(255, max(0, int(c * t * light * clear + h * (1 - clear)))) for c, t, h in mixed)
        getattr(self.paint, shape)(points, fill=seen)
        if ident is not None:
            getattr(self.mark, shape)(points, fill=ident)

    def rect(self, x, y, d, colour, ident=None, light=1.0, haze=None):
        """Rectangle in metres: two of x, y and d are pairs (from, to), the third is a number."""
        spans = [span if isinstance(span, tuple) else (span,) for span in (x, y, d)]
        a, b, c, e = (self.at(*corner) for corner in itertools.product(*spans))
        self.fill([a, c, e, b], haze or spans[2][0], colour, ident, light)

    def bar(self, x, y, d, colour, ident=None, light=1.0):
        """Upright rectangle between pairs x and y in metres, at least one final pixel wide and high."""
        (x0, y1), (x1, y0) = (self.at(*corner, d) for corner in zip(x, y, strict=True))
        x1, y1 = max(x1, x0 + SUPERSAMPLE), max(y1, y0 + SUPERSAMPLE)
        self.fill([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], d, colour, ident, light)

    def oval(self, x, y, d, rx, ry, colour, ident=None, light=1.0):
        """Upright ellipse about (x, y, d) in metres, at least one final pixel wide and high."""
        (px, py), rx, ry = self.at(x, y, d), *(max(r * (self.scale / d), SUPERSAMPLE / 2) for r in (rx, ry))
        self.fill((px - rx, py - ry, px + rx, py + ry), d, colour, ident, light, "ellipse")


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
    street.rect((-2000, 2000), 0, (1, 4 * FAR), (104, 134, 70), TERRAIN, haze=20)
    while x < 8 * street.front:
        width, d, top = rng.uniform(8, 16), rng.uniform(1.1, 1.6) * FAR, street.house_height * rng.uniform(0.7, 1.3)
        if rng.random() < 0.55:
            street.rect((x, x + width), (0, top), d, street.pick(WALLS), BUILDING)
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
            street.rect((side * r, side * (street.front + 0.2)), 0, band, slab, SIDEWALK, shade)
            street.rect((side * r, side * (r + 0.3)), 0, band, slab, light=shade * 1.16)
        street.rect((-r, r), 0, band, road, ROAD)
        street.rect((sun * r * 0.72, sun * r), 0, band, road, light=0.86)
    for d, side in itertools.product(np.arange(3, 32, 2.0), (-1, 1)):
        street.rect((side * (r + 0.3), side * street.front), 0, (d, d * 1.012 + 0.03), slab, light=0.78)
    for d in np.arange(rng.uniform(2, 6), 60, 7.0):
        street.rect((-0.1, 0.1), 0, (d, d + 3.5), white)
    for x in (0.4 - r, r - 0.4) if rng.random() < 0.6 else ():
        street.rect((x - 0.07, x + 0.07), 0, (2, 60), white, haze=12)
    d = rng.uniform(8, 18)
    for x in np.arange(0.5 - r, r - 0.6, 1.1) if rng.random() < 0.3 else ():
        street.rect((x, x + 0.6), 0, (d, d + 3), white)


def draw_building(street, side, d0, d1):
    """One house: roof, the gable wall that faces the camera, the front along the street and its windows."""
    rng, x, top = street.rng, side * street.front, street.house_height * street.rng.uniform(0.75, 1.25)
    wall, roof, shade = street.pick(WALLS), street.pick(ROOFS), 0.84 if side == street.sun else 1.06
    if rng.random() < 0.6:  # pitched
        eave, ridge, *far = (street.at(x + dx, y, d) for d in (d0, d1) for dx, y in ((0, top), (side * 3, top + 2.2)))
        street.fill([eave, ridge, street.at(x + side * 6, top, d0)], d0, wall, BUILDING, 0.92)
        street.fill([eave, *far, ridge], d0, roof, BUILDING, shade)
    street.rect((x, x + side * 30), (0, top), d0, wall, BUILDING, 0.92)
    street.rect(x, (0, top), (d0, d1), wall, BUILDING, shade)
    street.rect(x, (top - 0.35, top), (d0, d1), wall, light=shade * 0.8)
    floor, bays, width = rng.uniform(2.8, 3.4), int((d1 - d0) / rng.uniform(2.2, 3.2)), rng.uniform(0.42, 0.6)
    lowest = (0.15, 0.8, 0.8, GLASS) if rng.random() < 0.5 else (0.0, 0.7, 0.35, DOOR)  # shop windows, or doors
    step = (d1 - d0) / bays
    for i, j in itertools.product(range(int((top - 0.3) / floor)), range(bays)):
        low, high, share, colour = (0.3, 0.85, width, GLASS) if i else lowest
        a = d0 + step * (j + 0.5 - share / 2)
        seen, light = (LAMPLIGHT, 1.15) if rng.random() < street.lamps else (colour, 1.0)
        street.rect(x, ((i + low) * floor, (i + high) * floor), (a, a + step * share), seen, light=light)


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
    rng, green = street.rng, street.pick([(62, 108, 46)])
    street.oval(x, y, d, 0.75 * radius, 0.7 * radius, green, VEGETATION, 0.86)
    for factor, count, reach, shift in ((0.8, 7, 0.6, 0.0), (1.0, 6, 0.5, 0.16), (1.25, 5, 0.42, 0.3)):
        for angle in rng.uniform(0, 2) + np.arange(count) * 2 * math.pi / count:
            size = radius * rng.uniform(0.36, 0.52) * (1.3 - 0.35 * factor)
            cx = x + radius * (reach * math.cos(angle) + street.sun * shift * 0.6)
            cy = y - radius * (reach * math.sin(angle) * 0.9 - shift)
            street.oval(cx, cy, d, size, size, green, VEGETATION, factor * rng.uniform(0.94, 1.06))


def draw_tree(street, x, d):
    radius = street.rng.uniform(1.3, 2.1)
    middle = radius + street.rng.uniform(2.0, 2.8)
    street.oval(x, 0, d, 0.9, 0.16, (110, 106, 100))  # shadow
    street.bar((x - 0.14, x + 0.14), (0, middle), d, (92, 70, 52), VEGETATION)
    draw_crown(street, x, middle, d, radius)


def draw_lamp(street, x, d):
    steel, top, arm = (104, 108, 112), street.rng.uniform(5.0, 6.5), x - math.copysign(1.3, x)  # over the road
    street.bar((x - 0.07, x + 0.07), (0, top), d, steel, POLE)
    street.bar((min(x, arm), max(x, arm)), (top - 0.12, top), d, steel, POLE)


def draw_sign(street, x, d):
    """Traffic sign on a pole: a disc, a triangle or a square, with a white dot."""
    colour, kind, y, r = street.pick(SIGNS), street.rng.integers(3), 2.6, 0.48
    street.bar((x - 0.06, x + 0.06), (0, y), d, (140, 144, 146), POLE)
    if kind == 0:
        street.oval(x, y, d, r, r, colour, SIGN, 1.1)
    else:
        corners = ((-1, 1), (1, 1), (0, -1)) if kind == 1 else ((-1, 1), (1, 1), (1, -1), (-1, -1))
        street.fill([street.at(x + i * r, y + j * r, d) for i, j in corners], d, colour, SIGN, 1.1)
    street.oval(x, y + 0.2 * r, d, 0.4 * r, 0.4 * r, (238, 238, 234))


def draw_car(street, x, d, oncoming):
    """A car as two boxes in perspective, its near end at distance d; the id covers body, glass and wheels."""
    ident, colour, length = CAR * 1000 + next(street.things), street.pick(CAR_PAINT, 10), street.rng.uniform(3.8, 4.5)
    w, sill, deck, roof, end = 0.9, 0.3, 0.9, street.rng.uniform(1.42, 1.6), d + length
    near = math.copysign(1.0, street.camera_x - x)  # the flank that the camera sees
    flank, glass, tyre = x + near * w, (46, 56, 70), (28, 28, 30)

    def panel(low, high, light, paint=colour):  # between two lines across the car, each (half width, y, distance)
        corners = ((-1, low), (1, low), (1, high), (-1, high))
        street.fill([street.at(x + k * half, y, t) for k, (half, y, t) in corners], d, paint, ident, light)

    street.rect((x - w - 0.25, x + w + 0.25), 0, (d - 0.15, end), (52, 52, 56), haze=d)  # shadow
    street.rect(flank, (sill, deck), (d, end), colour, ident, 0.92 if near == street.sun else 0.76)
    for t in (d + 0.75, end - 0.8):  # wheels
        (a, y), (b, _) = (street.at(flank, 0.33, t + half) for half in (-0.34, 0.34))
        rx, ry = (max(r, SUPERSAMPLE / 2) for r in (abs(a - b) / 2, 0.33 * (street.scale / t)))
        street.fill(((a + b) / 2 - rx, y - ry, (a + b) / 2 + rx, y + ry), d, tyre, ident, shape="ellipse")
    panel((w, deck, d), (w, deck, end), 1.15)
    outline = ((0.06, deck, d + 0.3), (0.2, roof, d + 0.8), (0.2, roof, end - 1.5), (0.06, deck, end - 0.9))
    street.fill([street.at(flank - near * k, y, t) for k, y, t in outline], d, glass, ident)  # side windows
    panel((0.7, roof, d + 0.8), (0.7, roof, end - 1.5), 1.2)
    panel((0.86, deck, d + 0.3), (0.72, roof, d + 0.8), 0.9)
    panel((0.74, deck + 0.05, d + 0.35), (0.64, roof - 0.1, d + 0.75), 1.0, glass)
    panel((w, sill, d), (w, deck, d), 1.0)
    panel((w, sill - 0.06, d), (w, sill + 0.12, d), 0.55)
    lamp = (250, 246, 220) if oncoming else (214, 32, 30)
    for k in (-1, 1):
        street.rect((x + k * w, x + k * (w - 0.24)), (0, sill - 0.06), d, tyre, ident)
        street.rect((x + k * 0.56, x + k * 0.84), (0.61, 0.79), d, lamp, light=1.2)
    street.rect((x - 0.26, x + 0.26), (0.48, 0.6), d, (232, 232, 226))  # number plate


def draw_person(street, x, d, riding=False):
    """A pedestrian, or a cyclist seen along the street on a narrow bicycle."""
    ident, bicycle = (label * 1000 + next(street.things) for label in (RIDER if riding else PERSON, BICYCLE))
    shirt, trousers, stride = street.pick(SHIRTS), street.pick(TROUSERS), street.rng.uniform(0.1, 0.28)
    hip, foot = (1.1, 0.0875) if riding else (0.85, 0.0)
    street.oval(x, 0, d, 0.34, 0.07, (90, 88, 86))  # shadow
    for k in (-1, 1):
        leg = ((x - 0.13, hip), (x + 0.13, hip), (x + k * stride + 0.08, foot), (x + k * stride - 0.08, foot))
        street.fill([street.at(*corner, d) for corner in leg], d, trousers, ident, 1.0 + 0.1 * k)
    street.bar((x - 0.28, x + 0.28), (hip + 0.05, hip + 0.58), d, shirt, ident, 0.8)  # arms
    street.bar((x - 0.2, x + 0.2), (hip - 0.06, hip + 0.58), d, shirt, ident, 1.05)
    street.oval(x, hip + 0.74, d, 0.14, 0.17, street.pick(SKIN), ident)
    street.oval(x, hip + 0.82, d, 0.13, 0.09, (60, 46, 36), ident)  # hair
    if riding:
        street.oval(x, 0.36, d, 0.1, 0.36, (30, 30, 34), bicycle)
        street.bar((x - 0.34, x + 0.34), (0.98, 1.06), d, (30, 30, 34), bicycle)


def place_things(street):
    """(distance, drawer, x, ...) of the cars, parked ones where the road is wide, and of what is on the pavements."""
    rng, r, density = street.rng, street.half_road, street.rng.uniform(0.1, 1.0)
    rows, lane = (4, 0.3 * r) if r > 4.3 else (2, 0.48 * r)
    cars = [(lane, 7.5, density * 0.6), (-lane, 6.0, density * 0.8), (r - 1.15, 5.5, density), (1.15 - r, 5.5, density)]
    things = []
    for x, start, chance in cars[:rows]:
        stops = start + rng.uniform(0, 6) + np.cumsum(rng.uniform(5.4, 10.4, 6)) - 5.4
        things += [(d, draw_car, x + rng.uniform(-0.12, 0.12), x < 0) for d in stops if rng.random() < chance]
    for side in (-1, 1):
        trees, lamps, riders = rng.random(3) < (0.7, 0.7, 0.35)  # which of them this side has
        stops = np.arange(rng.uniform(8, 15), 65, rng.uniform(8, 14)) if trees else ()
        things += [(d, draw_tree, side * (r + 0.9)) for d in stops if rng.random() < 0.8]
        stops = np.arange(rng.uniform(7, 16), 60, 16) if lamps else ()
        things += [(d, draw_lamp, side * (r + 0.45)) for d in stops]
        things += [(d, draw_person, side * (r + 0.1), True) for d in rng.uniform(7, 18, int(riders))]
        things += [(d, draw_sign, side * (r + 0.6)) for d in rng.uniform(6.5, 24, rng.integers(0, 3))]
        walkers = rng.uniform(6.5, 30, rng.integers(0, 4))
        things += [(d, draw_person, side * rng.uniform(r + 0.9, street.front - 0.4)) for d in walkers]
    return things


def draw_scene(seed, height=128, width=256):
    """Draw one street scene; a function of (seed, height, width) alone.

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
        for split, k, number in tqdm(scenes, desc="toy scenes", unit="scene", disable=not progress, **bar_options()):
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
