"""The resized scenes of a data set in memory-mapped arrays, made once: no later run decodes and resizes them again.

A cache is a folder with an array per kind (image.npy, ...), in which the pixels of all scenes lie one after the other,
and with recipe.json: what the arrays were made from, and where each scene begins. It gets its name when it is whole.
"""

import contextlib
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
        self._scenes = self.recipe.pop("scenes")  # [first pixel, height, width], or None
        self._arrays = {kind: open_memmap(os.path.join(folder, f"{kind}.npy"), "r") for kind in self.recipe["kinds"]}

    def __reduce__(self):
        return ArrayCache, (self.folder,)

    def arrays(self, index):
        """Return a scene's arrays by kind, read-only: image (3, H, W), others (H, W); None where it was left out."""
        if self._scenes[index] is None:
            return None
        return {kind: _scene(array, *self._scenes[index]) for kind, array in self._arrays.items()}


def _scene(array, first, height, width):
    return array[..., first : first + height * width].reshape(*array.shape[:-1], height, width)


def open_cache(dataset):
    """Return the `ArrayCache` of a `SceneDataset`; build it first where there is none, or one of other contents."""
    root, split = os.fspath(dataset.data_dir), "train" if dataset.is_train else "val"
    name = f"{os.path.basename(os.path.abspath(root))}_{dataset.dataset_mode}_{split}_{dataset.image_size}"
    name += "_no_instance" if dataset.no_instance else ""
    folder = os.path.join(dataset.cache_dir, re.sub(r"[^\w.-]", "_", name))
    recipe = {"mode": dataset.dataset_mode, "split": split, "image_size": dataset.image_size, "Pillow": PIL.__version__}
    recipe["kinds"] = ["label"] + ["image", "edge"] * dataset.has_images + ["instance"] * dataset.has_instances
    paths = [path for pair in dataset.pairs for path in pair[:3] if path]
    names = [path.removeprefix(root).lstrip("/") for path in paths]  # the data set may move
    recipe["files"] = dict(zip(names, _in_threads(lambda path: list(bf.stat(path)[:2]), paths), strict=True))
    try:
        if difference := _difference(folder, recipe):
            log(f"building the cache {folder} of {len(dataset)} scenes ({difference})")
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


def _difference(folder, recipe):
    """Return why the cache in a folder is not one of this recipe, "" if it is."""
    try:
        made = ArrayCache(folder).recipe
    except (OSError, ValueError, KeyError):
        return "there is no whole one"
    other = ", ".join(key for key in recipe if made.get(key) != recipe[key])
    return other and f"the one that is there was made from other {other}"


def _build(folder, recipe, dataset):
    indices = range(len(dataset))
    sizes = [size or (0, 0) for size in _in_threads(dataset.sample_size, indices)]
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
        found, whole = dataset.read(index), True
        for kind, array in arrays.items():
            view = _scene(array, *scenes[index])
            view[:] = found[kind]
            whole &= np.array_equal(view, found[kind])  # else an id takes more bits
        return scenes[index] if whole else None

    recipe["scenes"] = _in_threads(fill, indices, desc="cache", unit="scene")
    with open(os.path.join(folder, "recipe.json"), "w") as f:
        json.dump(recipe, f)
    if left_out := recipe["scenes"].count(None):
        log(f"{left_out} scenes are not in the cache: their files cannot be read, or hold ids of more than 16 bits")


def _in_threads(function, items, **bar):
    """Return the function of each item, None where it fails; under a progress bar where `bar` describes one."""

    def found(item):
        with contextlib.suppress(InputError, OSError, bf.Error):  # whoever needs the file will complain of it
            return function(item)

    pool = ThreadPoolExecutor()
    try:
        return list(tqdm(pool.map(found, items), total=len(items), disable=not bar, **bar, **bar_options()))
    finally:
        pool.shutdown(cancel_futures=True)
