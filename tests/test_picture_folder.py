"""Pictures whose labels an extractor reads."""

import numpy as np
import pytest
import torch
from PIL import Image

from guided_diffusion.console import InputError
from guided_diffusion.data.datasets import SceneDataset
from guided_diffusion.data.picture_folder import PictureFolder, find_pictures


def darkness(image):
    """Class 1 where a picture (1, 3, H, W) is dark, else 0."""
    return (image.mean(1, keepdim=True) < 0).long()


def test_a_data_sets_split_gives_the_same_pictures_as_with_its_labels(scenes):
    plain = SceneDataset("cityscapes", str(scenes), 16, is_train=False)
    folder = PictureFolder("cityscapes", str(scenes), 16, False, darkness)
    assert [pair.image for pair in folder.pairs] == [pair.image for pair in plain.pairs]
    assert [pair.stem for pair in folder.pairs] == [pair.stem for pair in plain.pairs]
    ours, theirs = folder.batch([1, 2]), plain.batch([1, 2])
    assert torch.equal(ours["image"], theirs["image"]) and torch.equal(ours["image_edge"], theirs["image_edge"])
    assert torch.equal(ours["label"], darkness(ours["image"])) and ours["label"].dtype == torch.int64
    assert torch.equal(ours["instance"], ours["label"].int())
    assert folder.sample_size(0) == plain.sample_size(0) == tuple(ours["label"].shape[2:])
    assert folder.class_counts(0).sum() == 16 * 32


def test_any_folder_of_pictures_will_do(tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("b.png", "deep/a.jpg", "c.txt"):
        (tmp_path / name).write_bytes(b"")
    for name, size in (("b.png", (40, 20)), ("deep/a.jpg", (60, 30))):
        Image.fromarray(np.full((size[1], size[0], 3), 200, np.uint8)).save(tmp_path / name)
    folder = PictureFolder("cityscapes", str(tmp_path), 16, False, darkness, no_instance=True)
    assert [pair.stem for pair in folder.pairs] == ["b", "deep/a"]
    sample = folder.item(1)
    assert sample["image"].shape == (3, 16, 32) and "instance" not in sample and not folder.has_instances
    assert PictureFolder("ade20k", str(tmp_path), 16, False, darkness).item(0)["image"].shape == (3, 16, 16)


def test_a_folder_without_pictures_is_named(tmp_path):
    with pytest.raises(InputError, match=f"--data_dir {tmp_path}: no pictures"):
        find_pictures("cityscapes", str(tmp_path), False)
    with pytest.raises(InputError, match="--extractor reads local folders"):
        find_pictures("cityscapes", "gs://bucket/pictures", False)


def test_a_damaged_picture_is_named(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"a\.png cannot be read as a picture"):
        PictureFolder("cityscapes", str(tmp_path), 16, False, darkness).item(0)
