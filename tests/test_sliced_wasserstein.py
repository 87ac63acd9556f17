"""The sliced Wasserstein distance against naive loops."""

import numpy as np
import pytest
import torch

from guided_diffusion.evaluation.sliced_wasserstein import (
    DIRECTIONS,
    PATCHES,
    descriptors,
    laplacian_pyramid,
    sliced_wasserstein,
)
from guided_diffusion.random_streams import generator


@pytest.fixture
def pictures():
    return torch.rand(3, 3, 66, 80, generator=torch.Generator().manual_seed(0)) * 2 - 1


def blurred(plane):
    """The binomial filter on one plane (H, W), mirrored at the borders."""
    line = np.array([1, 4, 6, 4, 1]) / 16
    padded, out = np.pad(plane, 2, mode="reflect"), np.zeros_like(plane)
    for i, j in np.ndindex(out.shape):
        out[i, j] = (padded[i : i + 5, j : j + 5] * np.outer(line, line)).sum()
    return out


def test_pyramid_equals_its_definition(pictures):
    bands = laplacian_pyramid(pictures)
    assert {short: tuple(band.shape[2:]) for short, band in bands.items()} == {66: (66, 80), 33: (33, 40), 17: (17, 20)}
    plane, found = pictures[1, 2].numpy().astype(np.float64), {}
    for short in (66, 33):
        smaller = blurred(plane)[::2, ::2]
        spread = np.zeros_like(plane)
        spread[::2, ::2] = smaller
        found[short], plane = plane - 4 * blurred(spread), smaller
    found[17] = plane
    for short, band in found.items():
        np.testing.assert_allclose(bands[short][1, 2], band, atol=1e-5)


def test_a_flat_picture_has_no_detail():
    fine, coarse = laplacian_pyramid(torch.full((1, 3, 32, 40), 0.5)).values()
    assert fine.abs().max() < 1e-6 and (coarse - 0.5).abs().max() < 1e-6
    assert [*laplacian_pyramid(torch.zeros(1, 3, 12, 20))] == [12]


def test_patches_are_cut_at_the_pictures_own_places(pictures):
    band = torch.arange(16.0 * 20).reshape(1, 1, 16, 20)  # below 32: the only band, and it shows where it was cut
    found = descriptors(band)[16]
    assert found.shape == (1, PATCHES, 1, 7, 7)
    corners = found[0, :, 0, 0, 0].long()
    assert torch.equal(found[0, :, 0], torch.stack([band[0, 0, c // 20 :, c % 20 :][:7, :7] for c in corners]))
    assert (corners // 20).unique().tolist() == [*range(10)] and (corners % 20).unique().tolist() == [*range(14)]
    whole, last = descriptors(pictures), descriptors(pictures[2:], first=2)
    assert all(torch.equal(whole[short][2:], last[short]) for short in whole)
    assert not torch.equal(descriptors(band, first=1)[16], found)


def naive_distance(first, second, units):
    """The mean |difference| of sorted projections, both sets in units of a set's channels."""
    mean, deviation = units.mean((0, 1, 3, 4), keepdim=True), units.std((0, 1, 3, 4), keepdim=True)
    rows = [((x - mean) / deviation).reshape(-1, 3 * 49).double().numpy() for x in (first, second)]
    directions = torch.randn(DIRECTIONS, 3 * 49, generator=generator(0, "swd directions")).double().numpy()
    values = []
    for direction in directions / np.linalg.norm(directions, axis=1, keepdims=True):
        a, b = (np.sort(x @ direction) for x in rows)
        values.append(np.abs(a - b).mean())
    return 1000 * np.mean(values)


def test_distance_equals_its_definition():
    draw = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 4, 16, 3, 7, 7, generator=draw)
    first, rows = 0.8 * first + 0.1, [1, 1, 2, 3]  # a picture drawn twice is in both sets twice
    found = sliced_wasserstein(first, second, torch.tensor([[1.0, 1, 1, 1], [0, 2, 1, 1]]))
    expected = [naive_distance(first, second, second), naive_distance(first[rows], second[rows], second)]
    assert found.tolist() == pytest.approx(expected, rel=1e-4) and expected[0] != pytest.approx(expected[1], rel=1e-3)
    assert sliced_wasserstein(second, second, torch.ones(1, 4)).tolist() == [0]


def test_lost_contrast_of_the_detail_shows(pictures):
    patches = descriptors(pictures)[66]
    assert sliced_wasserstein(patches / 2, patches, torch.ones(1, 3)) > 100
