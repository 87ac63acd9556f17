"""Figures: colours, layouts, and files that are whole or not there."""

import numpy as np
import pytest
import torch
from PIL import Image

from guided_diffusion.data.semantics import encode_semantics
from guided_diffusion.evaluation.panels import (
    colour_labels,
    palette,
    picture_grid,
    save_picture,
    show_semantics,
    to_uint8,
)

K = 35
LABEL = torch.tensor([[7, 8, 11], [23, 26, 34]])[None, None]  # (1, 1, 2, 3)
ROAD, CAR = (128, 64, 128), (0, 0, 142)


# -- colours ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ident", "colour"), [(7, ROAD), (11, (70, 70, 70)), (23, (70, 130, 180)), (26, CAR), (0, (0, 0, 0))]
)
def test_cityscapes_colours(ident, colour):
    assert tuple(palette(35)[ident]) == colour


@pytest.mark.parametrize("num_classes", [1, 35, 36, 151, 183, 256])
def test_palettes_have_a_colour_per_class(num_classes):
    colours = palette(num_classes)
    assert colours.shape == (num_classes, 3) and colours.dtype == np.uint8
    if num_classes != 35:
        assert len(np.unique(colours, axis=0)) == num_classes


def test_to_uint8_is_the_inverse_of_the_range_and_clips():
    values = torch.arange(256) / 127.5 - 1
    pictures = values.reshape(1, 1, 16, 16).expand(2, 3, 16, 16)
    array = to_uint8(pictures)
    assert array.shape == (2, 16, 16, 3) and array.dtype == np.uint8
    np.testing.assert_array_equal(array[1, :, :, 2].ravel(), np.arange(256))
    assert to_uint8(torch.tensor([-3.0, 3.0]).reshape(1, 1, 1, 2).expand(1, 3, 1, 2)).tolist() == [
        [[[0] * 3, [255] * 3]]
    ]


def test_to_uint8_keeps_channels_and_pixels_in_place():
    picture = torch.rand(1, 3, 4, 5) * 2 - 1
    array = to_uint8(picture)
    assert array[0, 1, 3, 2] == round(float((picture[0, 2, 1, 3] + 1) * 127.5))


def test_colour_labels():
    coloured = colour_labels(LABEL, K)
    assert coloured.shape == (1, 2, 3, 3) and coloured.dtype == np.uint8
    assert tuple(coloured[0, 0, 0]) == ROAD and tuple(coloured[0, 1, 1]) == CAR
    np.testing.assert_array_equal(colour_labels(LABEL + 100, K), np.broadcast_to(palette(K)[34], (1, 2, 3, 3)))


@pytest.mark.parametrize("one_hot", [True, False])
def test_clean_semantics_show_the_labels(one_hot):
    y = encode_semantics(LABEL, None, None, K, one_hot=one_hot)
    np.testing.assert_array_equal(show_semantics(y, K, one_hot), colour_labels(LABEL, K))


@pytest.mark.parametrize("one_hot", [True, False])
def test_noisy_semantics_show_the_nearest_label(one_hot):
    y = encode_semantics(LABEL, None, None, K, one_hot=one_hot)
    y = y + 0.4 * (2 * torch.rand(y.shape, generator=torch.Generator().manual_seed(0)) - 1)
    np.testing.assert_array_equal(show_semantics(y, K, one_hot), colour_labels(LABEL, K))


@pytest.mark.parametrize("one_hot", [True, False])
def test_edges_are_drawn_in_white(one_hot):
    edge = torch.tensor([[0, 1.0, 2.0], [0.5, 0, -1.0]])[None, None]
    shown = show_semantics(encode_semantics(LABEL, None, edge, K, one_hot=one_hot), K, one_hot)[0]
    plain = colour_labels(LABEL, K)[0]
    assert (shown[0, 1:] == 255).all()
    np.testing.assert_array_equal(shown[[0, 1, 1], [0, 1, 2]], plain[[0, 1, 1], [0, 1, 2]])
    np.testing.assert_allclose(shown[1, 0], (plain[1, 0] + 255.0) / 2, atol=1)


# -- grids ------------------------------------------------------------------------------------------------------------


def flat(colour, height=100, width=200):
    return np.full((height, width, 3), colour, np.uint8)


def test_grid_shape_and_places():
    grid = picture_grid([[flat(10), flat(20)], [flat(30), None]], ["", ""], gap=4)
    assert grid.dtype == np.uint8 and grid.shape == (18 + 2 * 104 + 4, 2 * 204 + 4, 3)
    expected = np.full_like(grid, 255)
    for value, top, left in ((10, 20, 4), (20, 20, 208), (30, 124, 4)):
        expected[top : top + 100, left : left + 200] = value
    np.testing.assert_array_equal(grid, expected)


def test_captions_stand_above_their_columns():
    grid = picture_grid([[flat(0), flat(0)]], ["", "regenerated"])
    head = grid[:18] < 128
    assert head[:, 208:].any() and not head[:, :200].any()


@pytest.mark.parametrize(("width", "zoom"), [(16, 12), (64, 3), (128, 2), (192, 1), (512, 1)])
def test_small_pictures_are_enlarged(width, zoom):
    grid = picture_grid([[flat(0, 8, width)]], ["x"], gap=2)
    assert grid.shape == (18 + 8 * zoom + 4, width * zoom + 4, 3)


def test_enlarging_keeps_pixels_sharp():
    checks = (np.indices((4, 96)).sum(0) % 2 * 255).astype(np.uint8)[..., None].repeat(3, axis=2)
    tile = picture_grid([[checks]], [""], gap=0)[18:]
    np.testing.assert_array_equal(tile, checks.repeat(2, axis=0).repeat(2, axis=1))


# -- files ------------------------------------------------------------------------------------------------------------


def test_saved_picture_reads_back(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    path = tmp_path / "new" / "folder" / "a.b.png"
    save_picture(picture, path)
    np.testing.assert_array_equal(np.asarray(Image.open(path)), picture)
    assert [p.name for p in path.parent.iterdir()] == ["a.b.png"]


@pytest.mark.parametrize("num_classes", [35, 183])
def test_saved_ids_read_back_as_ids_and_as_colours(tmp_path, num_classes):
    ids = np.arange(num_classes, dtype=np.uint8).reshape(1, -1).repeat(2, axis=0)
    save_picture(ids, tmp_path / "ids.png", palette(num_classes))
    image = Image.open(tmp_path / "ids.png")
    assert image.mode == "P"
    np.testing.assert_array_equal(np.asarray(image), ids)
    np.testing.assert_array_equal(np.asarray(image.convert("RGB"))[0], palette(num_classes))


def test_a_failed_write_leaves_the_earlier_picture(tmp_path, monkeypatch):
    path = tmp_path / "panel.png"
    save_picture(flat(10), path)
    before = path.read_bytes()

    def fills_the_disk(image, file, name):
        file.write(b"half a pict")
        raise OSError(28, "No space left on device")

    Image.init()
    monkeypatch.setitem(Image.SAVE, "PNG", fills_the_disk)
    with pytest.raises(OSError, match="No space left"):
        save_picture(flat(20), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["panel.png"]
