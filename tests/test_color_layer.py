"""The colour layer: transform, prior, coder, and the planes that the network sees."""

import itertools
import math

import numpy as np
import pytest
import torch

from guided_diffusion.console import InputError
from guided_diffusion.data.toy_scenes import draw_scene
from guided_diffusion.link.color_layer import (
    ColorPrior,
    coarse,
    decode_color,
    encode_color,
    from_residual,
    from_spectrum,
    layer_planes,
    received_planes,
    residual,
    spectrum,
)


@pytest.fixture(scope="module")
def pictures():
    """Twelve street scenes, (32, 64, 3) uint8."""
    return [draw_scene(seed, 32, 64)[0] for seed in range(12)]


@pytest.fixture(scope="module")
def prior(pictures):
    return ColorPrior.fit(pictures[:8])


def psnr(first, second):
    return 10 * math.log10(255**2 / np.square(first.astype(float) - second).mean())


def test_spectrum_is_the_orthonormal_transform_of_ycbcr(pictures):
    picture = pictures[0][:4, :6].astype(float)
    found = spectrum(picture.astype(np.uint8))
    luma = picture @ [0.299, 0.587, 0.114] - 128
    for v in range(4):
        for u in range(6):
            scale = math.sqrt((1 if v == 0 else 2) / 4) * math.sqrt((1 if u == 0 else 2) / 6)
            waves = [
                math.cos(math.pi * (y + 0.5) * v / 4) * math.cos(math.pi * (x + 0.5) * u / 6) * luma[y, x]
                for y in range(4)
                for x in range(6)
            ]
            assert found[0, v, u] == pytest.approx(scale * sum(waves), abs=1e-9)
    assert np.square(found[0]).sum() == pytest.approx(np.square(luma).sum())


def test_from_spectrum_is_the_inverse(pictures):
    assert np.array_equal(from_spectrum(spectrum(pictures[0])), pictures[0])


def test_fit_finds_how_magnitudes_fall_with_frequency(pictures, prior):
    mean = np.mean([np.abs(spectrum(picture)) for picture in pictures[:8]], axis=0)
    levels = prior.levels(0, 32, 64)
    low = np.s_[:, :8, :16]
    assert np.abs(levels[low] / 4 - 2 - np.log2(mean[low])).mean() < 0.7  # octaves; step 0 is a quarter at 32x64
    assert np.array_equal(prior.levels(12, 32, 64), levels - 3)


@pytest.mark.parametrize("step", [0, 112, 144, 176, 255])
def test_decode_color_gives_what_coarse_says(pictures, prior, step):
    data = encode_color(pictures[9], step, prior)
    assert np.array_equal(decode_color(data, step, (32, 64), prior), coarse(pictures[9], step, prior))


def test_layer_of_the_smallest_step_is_decoded(prior):
    white = np.full((128, 256, 3), 255, np.uint8)
    assert decode_color(encode_color(white, 1, prior), 1, (128, 256), prior).shape == white.shape


def test_smaller_steps_cost_more_and_come_nearer(pictures, prior):
    cases = itertools.product(pictures[8:], (128, 152, 176))
    found = [(encode_color(p, step, prior), psnr(coarse(p, step, prior), p)) for p, step in cases]
    sizes, nearness = np.array([(len(data), near) for data, near in found]).reshape(4, 3, 2).mean(0).T
    assert (np.diff(sizes) < 0).all() and (np.diff(nearness) < 0).all()
    assert sizes[2] < 40 and nearness[0] > nearness[2] + 3


def test_bytes_are_those_of_the_prior_s_density(pictures, prior):
    step, coded = 136, []  # 2^(136/16), and a quarter of it at 32x64
    for picture in pictures[8:]:
        decay = 2.0 ** (-prior.levels(step, 32, 64) / 4.0)
        some = np.exp(-0.83 * decay)
        steps = np.abs(spectrum(picture)) / 2 ** (step / 16 - 2)
        sizes = np.where(some >= 0.02, np.floor(steps + 0.17), 0)
        more = np.exp(-decay)
        bits = np.where(
            sizes > 0, -np.log2(some) + 1 - (sizes - 1) * np.log2(more) - np.log2(1 - more), -np.log2(1 - some)
        )
        coded.append((len(encode_color(picture, step, prior)), bits[some >= 0.02].sum() / 8))
    measured, ideal = np.mean(coded, axis=0)
    assert measured == pytest.approx(ideal, rel=0.05)  # a little less where the counts adapt


def test_decode_color_refuses_damaged_bytes_or_gives_some_picture(pictures, prior):
    data, draws, refused = encode_color(pictures[3], 136, prior), np.random.default_rng(0), 0
    for _ in range(200):
        bad = bytearray(data)
        bad[draws.integers(len(bad))] ^= 1 << draws.integers(8)
        bad = bytes(bad[: draws.integers(1, len(bad) + 1)])
        try:
            assert decode_color(bad, 136, (32, 64), prior).shape == (32, 64, 3)
        except InputError:
            refused += 1
    assert refused > 100


def test_planes_tell_picture_and_step_and_residual_is_undone(pictures, prior):
    layer = coarse(pictures[0], 152, prior)
    planes = layer_planes(layer, 152)[None]
    assert planes.shape == (1, 4, 32, 64) and (planes[0, 3] == 156 / 256).all()
    image = torch.from_numpy(pictures[0]).permute(2, 0, 1)[None] / 127.5 - 1
    values = residual(image, planes)
    assert 0.1 < values.std() < 3
    assert torch.allclose(from_residual(values, planes), image, atol=1e-6)
    body = bytes([152]) + encode_color(pictures[0], 152, prior)
    assert torch.equal(received_planes(body, (32, 64), prior), planes)
    assert not received_planes(b"", (32, 64), prior).any()
