"""The cache of resized scenes: the same samples, and a file that is whole, of these sources, or built anew."""

import errno
import fcntl
import io
import os
import pickle
import shutil
import signal
import threading
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from test_image_datasets import equal, load, make_ade20k, make_cityscapes, make_coco, refuse, rows, save

from guided_diffusion import build
from guided_diffusion.config import SampleConfig, TrainConfig, parse_config
from guided_diffusion.console import InputError
from guided_diffusion.data import cache as caching
from guided_diffusion.data.datasets import SceneDataset


@pytest.fixture
def city(tmp_path):
    return make_cityscapes(tmp_path / "city")


def opened(root, folder, size=8, **options):
    return SceneDataset("cityscapes", root, size, num_classes=35, cache_dir=folder, **options)


def reads(monkeypatch):
    """List that notes which scenes are read from their files from now on."""
    seen, read = [], SceneDataset._read

    def noting(self, index, position=None):
        seen.append(index)
        return read(self, index, position)

    monkeypatch.setattr(SceneDataset, "_read", noting)
    return seen


def same(one, other):
    return len(one) == len(other) and all(equal(one[k], other[k]) for k in range(len(one)))


# ---- the same samples


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("options", [{}, {"is_train": False}, {"deterministic": True}, {"random_flip": False}])
def test_batches_are_those_of_the_files(city, tmp_path, monkeypatch, options, workers):
    make_cityscapes(city, split="val", count=4)
    options = {"num_workers": workers, "seed": 3, **options}
    plain = rows(islice(load(city, **options), 10))
    batches = load(city, cache_dir=tmp_path / "cache", **options)
    seen = reads(monkeypatch)
    kept = rows(islice(batches, 10))
    assert kept.keys() == plain.keys() and all(equal(kept[position], plain[position]) for position in plain)
    assert not seen  # by this process; workers cannot read what was cut off below
    for pair in batches.dataset.pairs:
        for path in pair[:3]:
            os.truncate(path, 0)
    assert all(equal(row, plain[position]) for position, row in rows(islice(batches, 2)).items())


@pytest.mark.parametrize(("mode", "make", "val"), [("coco", make_coco, "val"), ("ade20k", make_ade20k, "validation")])
def test_squares(tmp_path, monkeypatch, mode, make, val):
    make(tmp_path / "data")
    make(tmp_path / "data", split=val)
    for options in ({"is_train": False}, {"deterministic": True}, {"random_crop": False}):
        plain, kept = (
            load(tmp_path / "data", mode, image_size=16, stop=9, **options, cache_dir=folder)
            for folder in ("", tmp_path / "cache")
        )
        with monkeypatch.context() as patch:
            seen = reads(patch)
            kept = rows(kept)
            assert not seen
        assert all(equal(kept[position], row) for position, row in rows(plain).items())
    assert len(list((tmp_path / "cache").glob("*.cache"))) == 2


def test_random_crops_are_cut_from_the_files(tmp_path):
    make_coco(tmp_path / "data")
    plain, kept = (load(tmp_path / "data", "coco", stop=6, cache_dir=folder) for folder in ("", tmp_path / "cache"))
    kept = rows(kept)
    assert all(equal(kept[position], row) for position, row in rows(plain).items())
    assert not (tmp_path / "cache").exists()


def test_pictures_of_several_sizes_and_kinds_of_ids(tmp_path):
    make_cityscapes(tmp_path / "city", count=3, size=(32, 16))
    make_cityscapes(tmp_path / "city", count=1, size=(50, 21))
    plain = SceneDataset("cityscapes", tmp_path / "city", 8, augment=True)
    ids = np.random.default_rng(5).integers(0, 2, (16, 32))
    kinds = [ids.astype(bool), ids.astype(np.int32) * 70000, None]
    for pair, kind in zip(plain.pairs[1:], kinds, strict=False):
        if kind is not None:
            Image.fromarray(kind).save(tmp_path / "ids.tiff")
            os.replace(tmp_path / "ids.tiff", pair.instance)
    palette = Image.fromarray(ids.astype(np.uint8) + 7)
    palette.putpalette(bytes(range(256)) * 3)
    palette.save(plain.pairs[2].label)
    kept = SceneDataset("cityscapes", tmp_path / "city", 8, augment=True, cache_dir=tmp_path / "cache")
    assert same(plain, kept) and len({plain[k]["label"].shape for k in range(3)}) == 2
    assert plain[2]["instance"].max() == 70000
    assert all(equal(plain.item(k, position), kept.item(k, position)) for k in range(3) for position in range(8))


def test_labels_alone_and_no_instance(tmp_path, city):
    make_cityscapes(tmp_path / "bare", images=False, instances=False)
    assert same(opened(tmp_path / "bare", ""), opened(tmp_path / "bare", tmp_path / "cache"))
    assert same(opened(city, "", no_instance=True), opened(city, tmp_path / "cache", no_instance=True))
    assert same(opened(city, ""), opened(city, tmp_path / "cache"))
    assert len(list((tmp_path / "cache").glob("*.cache"))) == 3


def test_bad_files_fail_as_without_a_cache(city, tmp_path, capsys):
    pairs = opened(city, "").pairs
    os.truncate(pairs[1].image, 100)
    save(Path(pairs[2].label), np.full((16, 32), 40, np.uint8))
    save(Path(pairs[3].label), np.zeros((16, 30), np.uint8))
    plain, kept = opened(city, ""), opened(city, tmp_path / "cache")
    assert "2 of its scenes could not be read" in capsys.readouterr().err
    for k, words in ((1, "cannot be read"), (2, "has id 40"), (3, "30x16")):
        refuse(lambda k=k: plain[k], words)
        refuse(lambda k=k: kept[k], words)
    for way in ({}, {"cache_dir": tmp_path / "cache"}):
        batches = list(load(city, on_bad_image="skip", deterministic=True, num_classes=35, batch_size=1, **way))
        assert [batch["path"][0] for batch in batches] == [pairs[k].image for k in (0, 4, 4, 4, 4)]
        assert len(batches[1]["skipped"]) == 3
    image = np.zeros((16, 32, 3), np.uint8)
    save(Path(pairs[1].image), image)  # repaired: seen at the next start
    assert torch.equal(opened(city, tmp_path / "cache")[1]["image"], torch.full((3, 8, 16), -1.0))


# ---- built once, of these sources


def test_it_is_built_once_with_a_bar(city, tmp_path, monkeypatch, capsys):
    opened(city, tmp_path / "cache")
    said = capsys.readouterr().err
    assert "building the cache" in said and "5/5" in said and "built the cache" in said and " MB" in said
    seen = reads(monkeypatch)
    kept = opened(city, tmp_path / "cache", augment=True, seed=9)
    assert kept[3]["label"].shape == (1, 8, 16) and not seen and not capsys.readouterr().err
    opened(city, tmp_path / "cache", size=16)  # another file
    assert sorted(seen) == list(range(5))
    assert sorted(path.name for path in (tmp_path / "cache").glob("*.cache")) == [
        "city_cityscapes_train_16.cache",
        "city_cityscapes_train_8.cache",
    ]


def change(path):
    """Change one pixel of a picture; its file keeps its size."""
    data = np.array(Image.open(path))
    size = os.path.getsize(path)
    for turn in range(1000):
        data[0, 0] = turn % 30
        data[0, 1] = turn // 30
        buffer = io.BytesIO()
        Image.fromarray(data).save(buffer, "PNG")
        if buffer.tell() == size and buffer.getvalue() != Path(path).read_bytes():
            Path(path).write_bytes(buffer.getvalue())
            return
    raise AssertionError("no such file")


@pytest.mark.parametrize(
    ("alter", "why"),
    [
        (lambda pairs: save(Path(pairs[2].image), np.zeros((16, 32, 3), np.uint8)), "has changed"),
        (lambda pairs: change(pairs[2].label), "has changed"),
        (lambda pairs: [os.remove(path) for path in pairs[4][:3]], "list of files"),
        (lambda pairs: [shutil.copy(path, path.replace("_0", "_1")) for path in pairs[4][:3]], "list of files"),
    ],
    ids=["other size", "same size", "removed", "added"],
)
def test_other_contents_are_built_anew(city, tmp_path, capsys, alter, why):
    opened(city, tmp_path / "cache")
    alter(opened(city, "").pairs)
    capsys.readouterr()
    kept = opened(city, tmp_path / "cache")
    said = capsys.readouterr().err
    assert why in said and "building the cache" in said and same(opened(city, ""), kept)


def test_new_dates_and_another_place_are_no_other_contents(city, tmp_path, monkeypatch, capsys):
    opened(city, tmp_path / "cache")
    moved = tmp_path / "scratch" / "city"
    shutil.copytree(city, moved, copy_function=shutil.copyfile)  # new dates
    seen = reads(monkeypatch)
    capsys.readouterr()
    kept = opened(moved, tmp_path / "cache")
    assert "15 of its 15 source files have new dates" in capsys.readouterr().err
    opened(moved, tmp_path / "cache")
    assert not capsys.readouterr().err  # the dates were noted
    assert not seen and torch.equal(kept[2]["image"], opened(city, "")[2]["image"])


def test_another_pillow_and_another_format_are_built_anew(city, tmp_path, monkeypatch, capsys):
    opened(city, tmp_path / "cache")
    monkeypatch.setattr("guided_diffusion.data.datasets.PIL.__version__", "0.1")
    opened(city, tmp_path / "cache")
    assert "made with another Pillow" in capsys.readouterr().err


# ---- damage


def cache_file(folder):
    (path,) = folder.glob("*.cache")
    return path


def test_a_file_that_was_cut_off_is_built_anew(city, tmp_path, capsys):
    plain = opened(city, "")
    opened(city, tmp_path / "cache")
    path = cache_file(tmp_path / "cache")
    whole = path.read_bytes()
    for length in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        capsys.readouterr()
        assert same(plain, opened(city, tmp_path / "cache"))
        assert "damaged or cut off" in capsys.readouterr().err and path.read_bytes() == whole
    start = caching.FOOTER.unpack(whole[-caching.FOOTER.size :])[1]
    path.write_bytes(whole[: start + 5] + b"?" + whole[start + 6 :])  # the index
    assert same(plain, opened(city, tmp_path / "cache"))


@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_arrays_are_one_line(city, tmp_path, workers):
    opened(city, tmp_path / "cache")
    path = cache_file(tmp_path / "cache")
    kept = opened(city, tmp_path / "cache")
    offset = kept.cache._scenes[3][1][1][3]
    with open(path, "r+b") as f:
        f.seek(offset)
        byte = f.read(1)[0]
        f.seek(offset)
        f.write(bytes([byte ^ 1]))
    batches = load(city, cache_dir=tmp_path / "cache", deterministic=True, batch_size=1, num_workers=workers)
    assert [len(next(batches)["path"]) for _ in range(3)] == [1, 1, 1]
    refuse(lambda: next(batches), path, "damaged (scene 4)", "delete it")
    path.unlink()
    assert same(opened(city, ""), opened(city, tmp_path / "cache"))


def test_no_room_leaves_nothing(city, tmp_path, monkeypatch):
    written, calls = caching._written, []

    def filling(f, arrays):
        calls.append(1)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return written(f, arrays)

    monkeypatch.setattr(caching, "_written", filling)
    refuse(
        lambda: opened(city, tmp_path / "cache"),
        "--cache_dir",
        tmp_path / "cache",
        "No space left on device",
        "make room",
    )
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]
    assert same(opened(city, ""), opened(city, tmp_path / "cache"))


def test_folders_that_cannot_hold_a_cache(city, tmp_path):
    (tmp_path / "file").write_text("")
    refuse(lambda: opened(city, tmp_path / "file" / "cache"), "--cache_dir", "is a file")
    refuse(lambda: opened(city, "gs://bucket/cache"), "--cache_dir gs://bucket/cache", "remote")


# ---- several processes


def test_a_second_process_waits_and_then_takes_what_is_there(city, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(caching, "WAIT_S", 0.01)
    opened(city, tmp_path / "cache")
    path = cache_file(tmp_path / "cache")
    whole = path.read_bytes()
    path.unlink()
    seen = reads(monkeypatch)
    with open(f"{path}.lock", "a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        found = []
        waiting = threading.Thread(target=lambda: found.append(opened(city, tmp_path / "cache")))
        waiting.start()
        waiting.join(0.3)
        assert waiting.is_alive() and not seen
        path.write_bytes(whole)
    waiting.join(20)
    assert not seen and same(opened(city, ""), found[0])
    assert capsys.readouterr().err.count("waiting for another process") == 1


def test_a_builder_that_was_killed_keeps_nobody_waiting(city, tmp_path, monkeypatch):
    def dying(f, arrays):
        f.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    if not (child := os.fork()):
        monkeypatch.setattr(caching, "_written", dying)
        try:
            opened(city, tmp_path / "cache")
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert list((tmp_path / "cache").glob("*.tmp"))
    assert same(opened(city, ""), opened(city, tmp_path / "cache"))
    assert sorted(path.suffix for path in (tmp_path / "cache").iterdir()) == [".cache", ".lock"]


def test_without_locks_two_builders_are_harmless(city, tmp_path, monkeypatch):
    def refusing(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(caching.fcntl, "flock", refusing)
    found = []
    threads = [threading.Thread(target=lambda: found.append(opened(city, tmp_path / "cache"))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 3 and all(same(opened(city, ""), kept) for kept in found)
    assert sorted(path.suffix for path in (tmp_path / "cache").iterdir()) == [".cache", ".lock"]


def test_spawned_workers_map_the_file_themselves(city, tmp_path, capsys):
    kept = opened(city, tmp_path / "cache")
    packed = pickle.dumps(kept)
    assert len(packed) < 20_000 and equal(pickle.loads(packed)[2], kept[2])
    save(Path(kept.pairs[2].image), np.zeros((16, 32, 3), np.uint8))
    opened(city, tmp_path / "cache")  # another run builds it anew meanwhile
    refuse(lambda: pickle.loads(packed)[2], cache_file(tmp_path / "cache"), "built anew", "start the run again")
    assert kept[2]["image"].max() > -1  # what was mapped stays


def test_threads_keep_the_order_and_hand_on_errors():
    def half(k):
        if k == 70:
            raise InputError("70")
        return k / 2

    assert list(caching._in_threads(half, range(60))) == [k / 2 for k in range(60)]
    refuse(lambda: list(caching._in_threads(half, range(90))), "70")


def test_facts_of_remote_files_come_from_blobfile(monkeypatch):
    monkeypatch.setattr(caching.bf, "stat", lambda path: SimpleNamespace(size=len(path), mtime=1.5))
    assert caching._facts("gs://bucket/a.png") == (17, 1_500_000_000)

    def gone(path):
        raise FileNotFoundError(path)

    monkeypatch.setattr(caching.bf, "stat", gone)
    assert caching._facts("gs://bucket/a.png") == (-1, 0)


# ---- the flag


def test_training_takes_the_same_batches_from_the_cache(make_loop, tmp_path, monkeypatch):
    plain = make_loop("plain", seed=2, preview_items=1)
    kept = make_loop("kept", seed=2, preview_items=1, cache_dir=tmp_path / "cache")
    expected = rows(islice(plain.loader(5), 6))
    seen = reads(monkeypatch)
    found = rows(islice(kept.loader(5), 6))
    assert list(found) == list(range(5, 17)) and all(equal(found[position], row) for position, row in expected.items())
    assert not seen
    assert [path.name for path in (tmp_path / "cache").glob("*.cache")] == ["scenes_cityscapes_train_16.cache"]


def test_data_sets_of_sampling_and_of_dry_runs(scenes, tmp_path):
    line = ["--data_dir", str(scenes), "--cache_dir", str(tmp_path / "cache"), "--image_size", "16"]
    for config_class, extra, there in ((TrainConfig, ["--dry_run", "True"], False), (SampleConfig, [], True)):
        config, _ = parse_config(config_class, "", line + extra)
        assert (build.data_set(config, False).cache is not None) == there == (tmp_path / "cache").exists()
