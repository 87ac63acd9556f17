import io

import blobfile as bf
import numpy as np
import pytest
import torch
from PIL import Image
from test_datasets import refuse

from guided_diffusion.data import pictures


def noise(height, width, channels=3, seed=0):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("mode", ["1", "L", "P", "I", "I;16", "I;16B"])
def test_read_ids_of_every_integer_mode_survive_reading_and_nearest_resizing(tmp_path, mode):
    high = {"1": 2, "L": 256, "P": 256}.get(mode, 65536)
    ids = np.random.default_rng(1).integers(0, high, (8, 12))
    path = tmp_path / "ids.tiff"
    image = Image.fromarray(ids.astype({"1": "?", "I": "i4", "I;16": "<u2", "I;16B": ">u2"}.get(mode, "u1")))
    if mode == "P":
        image.putpalette(noise(1, 256).tobytes())
    image.save(path)
    with Image.open(path) as saved:
        assert saved.mode == mode
    read = pictures.read_ids(path)
    assert np.array_equal(np.asarray(read), ids)
    half = np.asarray(read.resize((6, 4), Image.Resampling.NEAREST))
    assert np.array_equal(half, ids[1::2, 1::2])  # nearest to the pixel centres


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA"])
def test_read_ids_colour_masks_are_refused(tmp_path, mode):
    Image.new(mode, (4, 4)).save(tmp_path / "mask.png")
    refuse(lambda: pictures.read_ids(tmp_path / "mask.png"), f"mask.png is a colour picture (mode {mode})")


@pytest.mark.parametrize("name", ["cut.png", "cut.jpg"])
def test_read_picture_files_cut_off_anywhere_or_damaged_are_one_line(tmp_path, name):
    path = tmp_path / name
    Image.fromarray(noise(24, 24)).save(path)
    whole = path.read_bytes()
    for length in range(0, len(whole) - 40, 37):
        path.write_bytes(whole[:length])
        refuse(lambda: pictures.read_picture(path), path, "cannot be read")


def test_read_picture_missing_file_and_text_file(tmp_path):
    refuse(lambda: pictures.read_picture(tmp_path / "none.png"), tmp_path, "cannot be read", "No such file")
    (tmp_path / "text.png").write_text("not a picture")
    refuse(lambda: pictures.picture_size(tmp_path / "text.png"), tmp_path / "text.png", "cannot be read")


def test_read_picture_remote_files_are_read_through_blobfile(monkeypatch):
    pixels = noise(3, 5)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    monkeypatch.setattr(bf, "BlobFile", lambda path, mode: io.BytesIO(buffer.getvalue()))
    assert np.array_equal(np.asarray(pictures.read_picture("gs://bucket/a.png")), pixels)
    assert pictures.picture_size("gs://bucket/a.png") == (5, 3)


def test_resize_picture_is_box_halving_then_bicubic():
    picture = Image.fromarray(noise(100, 220))
    assert pictures.fitted_size(picture.size, 20) == (44, 20)
    by_hand = picture.resize((110, 50), Image.Resampling.BOX).resize((55, 25), Image.Resampling.BOX)
    by_hand = by_hand.resize((44, 20), Image.Resampling.BICUBIC)
    assert np.array_equal(np.asarray(pictures.resize_picture(picture, (44, 20))), np.asarray(by_hand))


@pytest.mark.parametrize("size", [(2048, 1024), (640, 425), (425, 640), (33, 17), (31, 31), (7, 1)])
@pytest.mark.parametrize("short", [1, 16, 17, 64, 256])
def test_fitted_size_has_that_short_side_and_the_aspect(size, short):
    fitted = pictures.fitted_size(size, short)
    assert min(fitted) == short
    assert max(fitted) / short == pytest.approx(max(size) / min(size), rel=0.1, abs=0.6)
    assert pictures.resize_picture(Image.new("RGB", size), fitted).size == fitted


def test_edge_pixels_are_pillows_and_keep_the_frame():
    picture = Image.fromarray(noise(9, 7))
    edges, grey = pictures.edge_pixels(picture), np.asarray(picture.convert("L")).astype(int)
    mirrored = pictures.edge_pixels(picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    assert np.array_equal(mirrored, edges[:, ::-1])
    assert np.array_equal(edges[0], grey[0])  # unfiltered frame
    around = sum(grey[1 + dy : 8 + dy, 1 + dx : 6 + dx] for dy in (-1, 0, 1) for dx in (-1, 0, 1))
    assert np.array_equal(edges[1:-1, 1:-1], np.clip(9 * grey[1:-1, 1:-1] - around, 0, 255))  # Laplacian


def test_centred_takes_pixels_in_any_order():
    pixels = np.arange(256, dtype=np.uint8).reshape(2, 16, 8)
    for view in (pixels, pixels[..., ::-1], pixels.transpose(2, 0, 1)):
        found = pictures.centred(view)
        assert found.is_contiguous() and np.array_equal(found, np.asarray(view, np.float32) / np.float32(127.5) - 1)


def test_to_uint8_is_the_inverse_of_from_uint8_and_clips():
    pixels = noise(4, 6)
    picture = pictures.from_uint8(pixels)
    assert picture.shape == (1, 3, 4, 6) and np.array_equal(pictures.to_uint8(picture)[0], pixels)
    extremes = torch.tensor([-3.0, 3.0]).expand(1, 3, 1, 2)
    assert pictures.to_uint8(extremes).tolist() == [[[[0] * 3, [255] * 3]]]
    images = torch.rand(2, 3, 4, 6) * 3 - 1.5
    assert torch.equal(pictures.eight_bit(images), torch.cat([*map(pictures.from_uint8, pictures.to_uint8(images))]))


def test_save_picture_writes_pictures_and_ids_with_a_palette(tmp_path):
    pixels, palette = noise(4, 6), noise(1, 5)[0]
    pictures.save_picture(pixels, tmp_path / "deeper" / "a.png")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "deeper" / "a.png")), pixels)
    pictures.save_picture(pixels[..., 0] % 5, tmp_path / "ids.png", palette)
    saved = Image.open(tmp_path / "ids.png")
    assert saved.mode == "P" and np.array_equal(np.asarray(saved), pixels[..., 0] % 5)
    assert np.array_equal(np.asarray(saved.convert("RGB")), palette[pixels[..., 0] % 5])
