"""The resized scenes of a data set in memory-mapped arrays, made once: no later run decodes and resizes them again.

A cache is a folder with an array per kind (image.npy, ...), in which the pixels of all scenes lie one after the other,
and with recipe.json: what the arrays were made from, and where each scene begins. It gets its name when it is whole.
"""

import contextlib
import hashlib
import itertools
import json
import os
import re
import secrets
import shutil
from concurrent.futures import ThreadPoolExecutor

import blobfile as bf
import numpy as np
import PIL
from numpy.lib.format import open_memmap
from tqdm import tqdm

from ..console import InputError, bar_options, log

KINDS = {"image": ((3,), np.uint8), "edge": ((), np.uint8), "label": ((), np.uint8), "instance": ((), np.uint16)}


class ArrayCache:
    """A cache that was built, mapped into memory; pickled for spawned workers as its folder."""

    def __init__(self, folder):
        self.folder = folder
        with open(os.path.join(folder, "recipe.json")) as f:
            self.recipe = json.load(f)
        self._scenes = self.recipe.pop("scenes")  # [first pixel, height, width] of each
        self._arrays = {kind: open_memmap(os.path.join(folder, f"{kind}.npy"), "r") for kind in self.recipe["kinds"]}

    def __reduce__(self):
        return ArrayCache, (self.folder,)

    def arrays(self, index):
        """Return a scene's arrays by kind, read-only: image (3, H, W), others (H, W)."""
        return {kind: _scene(array, *self._scenes[index]) for kind, array in self._arrays.items()}


def _scene(array, first, height, width):
    return array[..., first : first + height * width].reshape(*array.shape[:-1], height, width)


def open_cache(dataset):
    """Return the `ArrayCache` of a `SceneDataset`; build it first where there is none, or one of other contents."""
    root, split = os.fspath(dataset.data_dir), "train" if dataset.is_train else "val"
    name = f"{os.path.basename(os.path.abspath(root))}_{dataset.dataset_mode}_{split}_{dataset.image_size}"
    name += "_no_instance" if dataset.no_instance else ""
    chosen = f"{dataset.only} {dataset.leave_out}"
    name += "" if chosen == " " else f"_{hashlib.sha256(chosen.encode()).hexdigest()[:8]}"
    folder = os.path.join(dataset.cache_dir, re.sub(r"[^\w.-]", "_", name))
    recipe = {"mode": dataset.dataset_mode, "split": split, "image_size": dataset.image_size, "Pillow": PIL.__version__}
    recipe["kinds"] = ["label"] + ["image", "edge"] * dataset.has_images + ["instance"] * dataset.has_instances
    paths = [path for pair in dataset.pairs for path in pair[:3] if path]
    names = [path.removeprefix(root).lstrip("/") for path in paths]  # the data set may move
    try:
        recipe["files"] = dict(zip(names, _in_threads(lambda path: list(bf.stat(path)[:2]), paths), strict=True))
        if not _is_whole(folder, recipe):
            log(f"building the cache {folder} of {len(dataset)} scenes")
            shutil.rmtree(folder, ignore_errors=True)
            part = f"{folder}.{secrets.token_hex(4)}.tmp"
            try:
                _build(part, recipe, dataset)
                with contextlib.suppress(OSError):  # another process was first
                    os.rename(part, folder)
            finally:
                shutil.rmtree(part, ignore_errors=True)
        return ArrayCache(folder)
    except OSError as error:
        raise InputError(f"--cache_dir {dataset.cache_dir}: {error.strerror}; make room, or name another") from error


def _is_whole(folder, recipe):
    try:
        return ArrayCache(folder).recipe == recipe
    except (OSError, ValueError, KeyError):
        return False


def _build(folder, recipe, dataset):
    sizes = _in_threads(dataset.sample_size, range(len(dataset)))
    *starts, end = itertools.accumulate((height * width for height, width in sizes), initial=0)
    scenes = [(start, *size) for start, size in zip(starts, sizes, strict=True)]
    os.makedirs(folder)
    arrays = {}
    for kind in recipe["kinds"]:
        path, (planes, dtype) = os.path.join(folder, f"{kind}.npy"), KINDS[kind]
        arrays[kind] = open_memmap(path, "w+", dtype, (*planes, end))
        with open(path, "r+b") as f:
            os.posix_fallocate(f.fileno(), 0, os.path.getsize(path))  # a full disk shows here, not as a SIGBUS later

    def fill(index):
        found = dataset.read(index)
        for kind, array in arrays.items():
            view = _scene(array, *scenes[index])
            view[:] = found[kind]
            if not np.array_equal(view, found[kind]):
                what = f"{dataset.pairs[index].label}: its {kind} ids take more than {8 * view.itemsize} bits"
                raise InputError(f"{what}, too many for --cache_dir; correct the file or drop the flag")

    _in_threads(fill, range(len(dataset)), desc="cache", unit="scene")
    with open(os.path.join(folder, "recipe.json"), "w") as f:
        json.dump(recipe | {"scenes": scenes}, f)


def _in_threads(function, items, **bar):
    """Return the function of each item; under a progress bar where `bar` describes one."""
    with ThreadPoolExecutor() as pool:
        return list(tqdm(pool.map(function, items), total=len(items), disable=not bar, **bar, **bar_options()))
