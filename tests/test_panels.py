"""Figures: colours, layouts, and files that are whole or not there."""

import numpy as np
import pytest
import torch

from guided_diffusion.data.semantics import encode_semantics
from guided_diffusion.evaluation.metrics import colour_error
from guided_diffusion.evaluation.panels import palette, picture_grid, preview_panel, show_semantics

K = 35
LABEL = torch.tensor([[7, 8, 11], [23, 26, 34]])[None, None]  # (1, 1, 2, 3)
ROAD, CAR = (128, 64, 128), (0, 0, 142)


def test_palette_has_the_cityscapes_colours():
    colours = {7: ROAD, 11: (70, 70, 70), 23: (70, 130, 180), 26: CAR, 0: (0, 0, 0)}
    assert all(tuple(palette(35)[k]) == colour for k, colour in colours.items())
    assert len({*map(tuple, palette(20).tolist())}) == 20


@pytest.mark.parametrize("noise", [0, 0.4])
@pytest.mark.parametrize("one_hot", [True, False])
def test_show_semantics_of_clean_and_noisy_planes(one_hot, noise):
    y = encode_semantics(LABEL, None, None, K, one_hot=one_hot)
    y = y + noise * (2 * torch.rand(y.shape, generator=torch.Generator().manual_seed(0)) - 1)
    np.testing.assert_array_equal(show_semantics(y, K, one_hot), palette(K)[LABEL[:, 0]])
    assert (show_semantics(y[:, :1] * 0 + 99, K, False) == palette(K)[34]).all()  # no id is outside


@pytest.mark.parametrize("one_hot", [True, False])
def test_show_semantics_draws_edges_in_white(one_hot):
    edge = torch.tensor([[0, 1.0, 2.0], [0.5, 0, -1.0]])[None, None]
    shown = show_semantics(encode_semantics(LABEL, None, edge, K, one_hot=one_hot), K, one_hot)[0]
    plain = palette(K)[LABEL[0, 0]]
    assert (shown[0, 1:] == 255).all()
    np.testing.assert_array_equal(shown[[0, 1, 1], [0, 1, 2]], plain[[0, 1, 1], [0, 1, 2]])
    np.testing.assert_allclose(shown[1, 0], (plain[1, 0] + 255.0) / 2, atol=1)


def flat(colour, height=100, width=200):
    return np.full((height, width, 3), colour, np.uint8)


def test_picture_grid_shape_and_places():
    grid = picture_grid([[flat(10), flat(20)], [flat(30), None]], ["", ""], gap=4)
    assert grid.dtype == np.uint8 and grid.shape == (18 + 2 * 104 + 4, 2 * 204 + 4, 3)
    expected = np.full_like(grid, 255)
    for value, top, left in ((10, 20, 4), (20, 20, 208), (30, 124, 4)):
        expected[top : top + 100, left : left + 200] = value
    np.testing.assert_array_equal(grid, expected)


@pytest.mark.parametrize(("width", "zoom"), [(16, 12), (64, 3), (128, 2), (192, 1), (512, 1)])
def test_picture_grid_enlarges_small_pictures(width, zoom):
    grid = picture_grid([[flat(0, 8, width)]], ["x"], gap=2)
    assert grid.shape == (18 + 8 * zoom + 4, width * zoom + 4, 3)


def test_preview_panel_shows_each_picture_and_the_colour_error():
    images, made = torch.rand(2, 2, 3, 2, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1
    y = encode_semantics(LABEL.repeat(2, 1, 1, 1), None, None, K)
    panel, error = preview_panel(images, y, made, K)
    assert panel.dtype == np.uint8 and panel.shape == (18 + 2 * (2 * 64 + 4) + 4, 3 * (3 * 64 + 4) + 4, 3)
    assert tuple(panel[21, 205]) == ROAD and error == pytest.approx(float(colour_error(made, images).mean()))
