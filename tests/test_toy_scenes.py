"""Toy street scenes: what a scene holds, and what is written."""

import numpy as np
import pytest
from PIL import Image

from guided_diffusion.console import InputError
from guided_diffusion.data import toy_scenes
from guided_diffusion.data.toy_scenes import draw_scene, write_toy_scenes

ROAD, SIDEWALK, BUILDING, POLE, SIGN, VEGETATION, SKY, PERSON, RIDER, CAR = 7, 8, 11, 17, 20, 21, 23, 24, 25, 26
KNOWN = {ROAD, SIDEWALK, BUILDING, POLE, SIGN, VEGETATION, 22, SKY, PERSON, RIDER, CAR, 33}


@pytest.fixture(scope="module")
def scenes():
    return [draw_scene(seed) for seed in range(24)]


def test_draw_scene_same_seed_same_scene_and_other_seed_other_scene(scenes):
    for first, again in zip(scenes[3], draw_scene(3), strict=True):
        np.testing.assert_array_equal(first, again)
    for a, b in zip(scenes[3], scenes[4], strict=True):
        assert (a != b).mean() > 0.01


@pytest.mark.parametrize("size", [(32, 32), (32, 200), (200, 32), (65, 97)])
def test_draw_scene_any_size_from_32(size):
    image, label, instance = draw_scene(1, *size)
    assert image.shape == (*size, 3) and label.shape == instance.shape == size
    assert set(np.unique(label)) <= KNOWN


def test_draw_scene_all_classes_are_present(scenes):
    pixels = np.bincount(np.concatenate([label.ravel() for _, label, _ in scenes]), minlength=256)
    assert set(np.flatnonzero(pixels)) == KNOWN
    for label in (ROAD, SIDEWALK, BUILDING, VEGETATION, SKY, CAR):
        assert pixels[label] > 0.01 * pixels.sum()
    for _, label, _ in scenes:
        assert {ROAD, SIDEWALK, BUILDING, SKY} <= set(np.unique(label))


def test_draw_scene_instances_agree_with_labels(scenes):
    for _, label, instance in scenes:
        thing = instance >= 1000
        np.testing.assert_array_equal(thing, (label >= 24) & (label <= 33))
        np.testing.assert_array_equal(instance[thing] // 1000, label[thing])
        np.testing.assert_array_equal(instance[~thing], label[~thing])
        for k in np.unique(label[thing]):  # numbered from 0 without gaps
            ids = np.unique(instance[label == k]) - 1000 * int(k)
            np.testing.assert_array_equal(ids, np.arange(len(ids)))
    assert max(len(np.unique(instance[label == CAR])) for _, label, instance in scenes) >= 3


def test_write_toy_scenes_files_and_pixels(tmp_path):
    target = tmp_path / "deeper" / "toy"
    write_toy_scenes(target, train=3, val=2, height=48, width=96, seed=4, progress=False)
    expected, largest = set(), 0
    seeds = {("train", k): 4_000_000 + k for k in range(3)} | {("val", k): 4_500_000 + k for k in range(2)}
    for (split, k), seed in seeds.items():
        stem = f"{split}/toytown/toytown_{k:06d}_000000"
        names = f"leftImg8bit/{stem}_leftImg8bit.png", f"gtFine/{stem}_gtFine_labelIds.png"
        names += (f"gtFine/{stem}_gtFine_instanceIds.png",)
        files = [Image.open(target / name) for name in names]
        assert [file.mode for file in files] == ["RGB", "L", "I;16"]
        for written, drawn in zip(files, draw_scene(seed, 48, 96), strict=True):
            np.testing.assert_array_equal(np.asarray(written), drawn)
        expected |= set(names)
        largest = max(largest, int(np.asarray(files[2]).max()))
    assert {path.relative_to(target).as_posix() for path in target.rglob("*.png")} == expected
    assert [path.name for path in target.parent.iterdir()] == ["toy"]
    assert largest > 20_000  # beyond 8 bits


def test_write_toy_scenes_refuses_a_folder_in_use(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for occupied in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(InputError, match="new folder") as error:
            write_toy_scenes(occupied, train=1, val=1, progress=False)
        assert str(occupied) in str(error.value) and "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_write_toy_scenes_leaves_nothing_after_a_failure(tmp_path, monkeypatch):
    calls = []

    def fail_at_third(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise RuntimeError("no paint left")
        return draw_scene(*arguments)

    monkeypatch.setattr(toy_scenes, "draw_scene", fail_at_third)
    with pytest.raises(RuntimeError, match="no paint left"):
        write_toy_scenes(tmp_path / "toy", train=4, val=1, height=32, width=64, progress=False)
    assert list(tmp_path.iterdir()) == []
