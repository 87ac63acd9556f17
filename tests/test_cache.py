"""The cache of resized scenes: the same samples, and arrays that are whole, of these sources, or built anew."""

import errno
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_datasets import equal, load, make_cityscapes, make_coco, refuse, rows, save

from guided_diffusion import build
from guided_diffusion.config import SampleConfig, TrainConfig, parse_config
from guided_diffusion.data.datasets import SceneDataset


@pytest.fixture
def city(tmp_path):
    return make_cityscapes(tmp_path / "city")


def opened(root, folder, size=8, **options):
    return SceneDataset("cityscapes", root, size, num_classes=35, cache_dir=folder, **options)


def reads(monkeypatch):
    """List that notes which scenes are read from their files from now on."""
    seen, read = [], SceneDataset.read

    def noting(self, index, position=None):
        seen.append(index)
        return read(self, index, position)

    monkeypatch.setattr(SceneDataset, "read", noting)
    return seen


def same(one, other):
    return len(one) == len(other) and all(equal(one[k], other[k]) for k in range(len(one)))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("options", [{}, {"is_train": False}, {"deterministic": True, "no_instance": True}])
def test_cache_batches_are_those_of_the_files(city, tmp_path, monkeypatch, options, workers):
    make_cityscapes(city, split="val", count=4)
    options = {"num_workers": workers, "seed": 3, **options}
    plain = rows(islice(load(city, **options), 10))
    load(city, cache_dir=tmp_path / "cache", **options)
    seen = reads(monkeypatch)
    batches = load(city, cache_dir=tmp_path / "cache", **options)
    kept = rows(islice(batches, 10))
    assert kept.keys() == plain.keys() and all(equal(kept[position], plain[position]) for position in plain)
    assert not seen


def test_cache_random_crops_are_cut_from_the_files(tmp_path):
    make_coco(tmp_path / "data")
    plain, kept = (load(tmp_path / "data", "coco", cache_dir=folder) for folder in ("", tmp_path / "cache"))
    plain, kept = rows(islice(plain, 3)), rows(islice(kept, 3))
    assert all(equal(kept[position], row) for position, row in plain.items())
    assert not (tmp_path / "cache").exists()


def test_cache_pictures_of_several_sizes_and_kinds_of_ids(tmp_path):
    make_cityscapes(tmp_path / "city", count=4, size=(32, 16))
    make_cityscapes(tmp_path / "city", count=1, size=(50, 21))
    plain = SceneDataset("cityscapes", tmp_path / "city", 8, augment=True)
    ids = np.random.default_rng(5).integers(0, 2, (16, 32))
    palette = Image.fromarray(ids.astype(np.uint8) + 7)
    palette.putpalette(bytes(range(256)) * 3)
    palette.save(plain.pairs[2].label)
    Image.fromarray(ids.astype(bool)).save(plain.pairs[1].instance)
    kept = SceneDataset("cityscapes", tmp_path / "city", 8, augment=True, cache_dir=tmp_path / "cache")
    assert len({plain[k]["label"].shape for k in range(4)}) == 2 and same(plain, kept)
    assert all(equal(plain.item(k, position), kept.item(k, position)) for k in range(4) for position in range(8))


def test_cache_bad_files_end_its_building(city, tmp_path):
    pairs = opened(city, "").pairs
    wide = np.full((16, 32), 70000, np.int32)
    Image.fromarray(wide).save(tmp_path / "ids.tiff")
    os.replace(tmp_path / "ids.tiff", pairs[4].instance)
    refuse(lambda: opened(city, tmp_path / "cache"), pairs[4].label, "instance ids take more than 16 bits")
    save(Path(pairs[3].label), np.zeros((16, 30), np.uint8))
    refuse(lambda: opened(city, tmp_path / "cache"), pairs[3].image, "(30, 16)")
    os.truncate(pairs[2].image, 100)
    refuse(lambda: opened(city, tmp_path / "cache"), pairs[2].image, "cannot be read")
    assert not list((tmp_path / "cache").iterdir())


def test_cache_is_built_once_with_a_bar(city, tmp_path, monkeypatch, capsys):
    opened(city, tmp_path / "cache")
    told = capsys.readouterr().err
    assert "building the cache" in told and "5/5" in told
    seen = reads(monkeypatch)
    moved = tmp_path / "scratch" / "city"
    shutil.copytree(city, moved)  # which keeps the dates
    for root in (city, moved, f"{city}/"):
        kept = opened(root, tmp_path / "cache", augment=True, seed=9)
        assert kept[3]["label"].shape == (1, 8, 16) and not seen and not capsys.readouterr().err
    opened(city, tmp_path / "cache", size=16)
    assert sorted(seen) == list(range(5))
    opened(city, tmp_path / "cache", only="aachen")
    names = {path.name.removeprefix("city_cityscapes_train_") for path in (tmp_path / "cache").iterdir()}
    assert names > {"16", "8"} and len(names) == 3


def test_cache_of_other_contents_is_built_anew(city, tmp_path, monkeypatch, capsys):
    pairs = opened(city, "").pairs
    for alter in (
        lambda: None,
        lambda: save(Path(pairs[2].image), np.zeros((16, 32, 3), np.uint8)),
        lambda: os.utime(pairs[2].label, (1, 1)),
        lambda: [os.remove(path) for path in pairs[4][:3]],
        lambda: [shutil.copy(path, path.replace("_0", "_1")) for path in pairs[3][:3]],
        lambda: monkeypatch.setattr("guided_diffusion.data.cache.PIL.__version__", "0.1"),
    ):
        alter()
        kept = opened(city, tmp_path / "cache")
        assert "building the cache" in capsys.readouterr().err and same(opened(city, ""), kept)


@pytest.mark.parametrize("damaged", ["recipe.json", "image.npy"])
def test_cache_damaged_is_built_anew(city, tmp_path, capsys, damaged):
    opened(city, tmp_path / "cache")
    os.truncate(tmp_path / "cache/city_cityscapes_train_8" / damaged, 150)
    assert same(opened(city, ""), opened(city, tmp_path / "cache"))
    assert capsys.readouterr().err.count("building the cache") == 2


def test_cache_without_room_leaves_nothing(city, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        refuse(lambda: opened(city, tmp_path / "cache"), f"--cache_dir {tmp_path / 'cache'}", "No space left")
    assert not list((tmp_path / "cache").iterdir())
    (tmp_path / "file").write_text("")
    refuse(lambda: opened(city, tmp_path / "file" / "cache"), "--cache_dir", "Not a directory")


def test_cache_built_by_several_at_once_is_one(city, tmp_path):
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda _: opened(city, tmp_path / "cache"), range(3)))
    assert all(same(opened(city, ""), kept) for kept in found)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["city_cityscapes_train_8"]


def test_cache_dir_of_training_sampling_and_dry_runs(scenes, tmp_path):
    line = ["--data_dir", str(scenes), "--cache_dir", str(tmp_path / "cache"), "--image_size", "16"]
    for config_class, extra, there in ((TrainConfig, ["--dry_run", "True"], False), (SampleConfig, [], True)):
        config, _ = parse_config(config_class, "", line + extra)
        assert (build.data_set(config, False).cache is not None) == there == (tmp_path / "cache").exists()
