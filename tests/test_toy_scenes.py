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


def test_shapes_and_types(scenes):
    image, label, instance = scenes[0]
    assert (image.shape, image.dtype) == ((128, 256, 3), np.uint8)
    assert (label.shape, label.dtype) == ((128, 256), np.uint8)
    assert (instance.shape, instance.dtype) == ((128, 256), np.int32)


def test_same_seed_same_scene_and_other_seed_other_scene(scenes):
    for first, again in zip(scenes[3], draw_scene(3), strict=True):
        np.testing.assert_array_equal(first, again)
    for a, b in zip(scenes[3], scenes[4], strict=True):
        assert (a != b).mean() > 0.01


def test_does_not_touch_the_global_seed():
    np.random.seed(5)
    before = np.random.get_state()[1].copy()
    draw_scene(0, 32, 64)
    np.testing.assert_array_equal(before, np.random.get_state()[1])


def test_layout_does_not_depend_on_the_size(scenes):
    for seed in range(6):
        small, large = draw_scene(seed, 64, 128)[1], scenes[seed][1]
        assert (small == large[::2, ::2]).mean() > 0.93  # the rest: shape edges, and poles kept one pixel wide


@pytest.mark.parametrize("size", [(32, 32), (32, 200), (200, 32), (65, 97)])
def test_any_size_from_32(size):
    image, label, instance = draw_scene(1, *size)
    assert image.shape == (*size, 3) and label.shape == instance.shape == size
    assert set(np.unique(label)) <= KNOWN


@pytest.mark.parametrize("arguments", [(0, 31, 64), (0, 64, 31), (-1, 64, 64)])
def test_refuses_small_sizes_and_negative_seeds(arguments):
    with pytest.raises(InputError, match="at least 32x32"):
        draw_scene(*arguments)


def test_all_classes_are_present(scenes):
    pixels = np.bincount(np.concatenate([label.ravel() for _, label, _ in scenes]), minlength=256)
    assert set(np.flatnonzero(pixels)) == KNOWN
    for label in (ROAD, SIDEWALK, BUILDING, VEGETATION, SKY, CAR):
        assert pixels[label] > 0.01 * pixels.sum()
    for _, label, _ in scenes:
        assert {ROAD, SIDEWALK, BUILDING, SKY} <= set(np.unique(label))


def test_instances_agree_with_labels(scenes):
    for _, label, instance in scenes:
        thing = instance >= 1000
        np.testing.assert_array_equal(thing, (label >= 24) & (label <= 33))
        np.testing.assert_array_equal(instance[thing] // 1000, label[thing])
        np.testing.assert_array_equal(instance[~thing], label[~thing])
        for k in np.unique(label[thing]):  # numbered from 0 without gaps
            ids = np.unique(instance[label == k]) - 1000 * int(k)
            np.testing.assert_array_equal(ids, np.arange(len(ids)))
    assert max(len(np.unique(instance[label == CAR])) for _, label, instance in scenes) >= 3


def test_colours_fit_the_classes(scenes):
    def mean(label, picked=scenes):
        return np.concatenate([image[labels == label] for image, labels, _ in picked]).mean(axis=0)

    for scene in scenes:
        assert mean(SKY, [scene]).mean() > mean(ROAD, [scene]).mean() + 20
    green, road, sky, building = mean(VEGETATION), mean(ROAD), mean(SKY), mean(BUILDING)
    assert green[1] > green[0] + 10 and green[1] > green[2] + 10
    assert np.ptp(road) < 25
    assert sky[2] > sky[0]
    assert building[0] > building[2]
    assert mean(SIDEWALK).mean() > road.mean() + 20


def test_image_edges_lie_on_label_edges(scenes):
    image, label, _ = scenes[0]
    change = np.abs(np.diff(image.astype(float).mean(axis=2), axis=1))
    border = np.diff(label.astype(int), axis=1) != 0
    assert change[border].mean() > 4 * change[~border].mean()


def test_written_files(tmp_path):
    target = tmp_path / "deeper" / "toy"
    assert write_toy_scenes(target, train=3, val=2, height=48, width=96, seed=4, progress=False) == target
    names = {path.relative_to(target).as_posix() for path in target.rglob("*.png")}
    assert names == {
        f"{folder}/{split}/toytown/toytown_{k:06d}_000000_{kind}.png"
        for split, count in (("train", 3), ("val", 2))
        for k in range(count)
        for folder, kind in (
            ("leftImg8bit", "leftImg8bit"),
            ("gtFine", "gtFine_labelIds"),
            ("gtFine", "gtFine_instanceIds"),
        )
    }
    assert [path.name for path in target.parent.iterdir()] == ["toy"]


def test_written_pixels_survive(tmp_path):
    write_toy_scenes(tmp_path / "toy", train=4, val=1, seed=2, progress=False)
    largest = 0
    for split, k, seed in [("train", 0, 2_000_000), ("train", 3, 2_000_003), ("val", 0, 2_500_000)]:
        stem = f"{split}/toytown/toytown_{k:06d}_000000"
        image = Image.open(tmp_path / f"toy/leftImg8bit/{stem}_leftImg8bit.png")
        label = Image.open(tmp_path / f"toy/gtFine/{stem}_gtFine_labelIds.png")
        instance = Image.open(tmp_path / f"toy/gtFine/{stem}_gtFine_instanceIds.png")
        assert (image.mode, label.mode, instance.mode) == ("RGB", "L", "I;16")
        for written, drawn in zip((image, label, instance), draw_scene(seed), strict=True):
            np.testing.assert_array_equal(np.asarray(written), drawn)
        largest = max(largest, int(np.asarray(instance).max()))
    assert largest > 20_000  # beyond 8 bits


def test_progress_bar_goes_to_stderr(tmp_path, capsys):
    write_toy_scenes(tmp_path / "toy", train=1, val=0, height=32, width=64)
    captured = capsys.readouterr()
    assert "toy scenes" in captured.err and captured.out == ""


def test_refuses_a_folder_in_use(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for occupied in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(InputError, match="new folder") as error:
            write_toy_scenes(occupied, train=1, val=1, progress=False)
        assert str(occupied) in str(error.value) and "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_accepts_an_empty_folder(tmp_path):
    write_toy_scenes(str(tmp_path), train=1, val=1, height=32, width=64, progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gtFine", "leftImg8bit"]


def test_refuses_bad_counts(tmp_path):
    with pytest.raises(InputError, match="train=-1"):
        write_toy_scenes(tmp_path / "toy", train=-1, progress=False)


def test_nothing_is_left_after_a_failure(tmp_path, monkeypatch):
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


def test_two_processes_may_draw_at_once(tmp_path, monkeypatch):
    flags = {"train": 1, "val": 1, "height": 32, "width": 64, "progress": False}
    write_toy_scenes(tmp_path / "first", **flags)

    def overtaken(*arguments):
        if not (tmp_path / "toy").exists():
            (tmp_path / "first").rename(tmp_path / "toy")
        return draw_scene(*arguments)

    monkeypatch.setattr(toy_scenes, "draw_scene", overtaken)
    assert write_toy_scenes(tmp_path / "toy", **flags) == tmp_path / "toy"
    assert [path.name for path in tmp_path.iterdir()] == ["toy"] and len(list((tmp_path / "toy").rglob("*.png"))) == 6


def test_other_files_that_come_meanwhile_are_no_scenes(tmp_path, monkeypatch):
    def intruded(*arguments):
        (tmp_path / "toy" / "mine").mkdir(parents=True, exist_ok=True)
        return draw_scene(*arguments)

    monkeypatch.setattr(toy_scenes, "draw_scene", intruded)
    with pytest.raises(OSError, match="toy"):
        write_toy_scenes(tmp_path / "toy", train=1, val=0, height=32, width=64, progress=False)
    assert [path.name for path in (tmp_path / "toy").iterdir()] == ["mine"]
