"""Scenes as tensors; flip and crop follow from (seed, position in the data order), the order itself is in `loading`."""

import math
import os
import re
from typing import NamedTuple

import numpy as np
import PIL
import torch
from PIL import Image
from torch.utils.data import Dataset
from tqdm import tqdm

from ..console import InputError
from ..files import check_folder
from ..random_streams import integer, uniform
from . import pictures
from .cache import open_cache
from .loading import collate, scene_batches
from .pairing import DATASETS, Pair, dataset_facts, find_pairs, is_remote

SMALLEST_CROP = 0.8  # of the picture's short side


class View(NamedTuple):
    """How one scene becomes a sample: resize to `size`, cut `box` out (or None), mirror if `flip`.

    `size` is (width, height); `short` is the side that the halving of the picture aims at.
    """

    size: tuple[int, int]
    short: int
    box: tuple[int, int, int, int] | None = None
    flip: bool = False


class SceneDataset(Dataset):
    """The scenes of one split, as a torch map-style dataset.

    `pairs` lists the files (`Pair`: image, label, instance, stem) in sorted order; `has_images` and `has_instances` say
    what the folders hold.

    :param dataset_mode: cityscapes, ade20k or coco.
    :param data_dir: the dataset's folder, local or gs:// or az://.
    :param image_size: short side of the samples in pixels; ade20k and coco become squares of it.
    :param is_train: the training split (ade20k and coco: crops), else the validation split (squeezed to a square).
    :param num_classes: class ids must lie below it (None: not checked).
    :param no_instance: leave instance maps aside.
    :param augment: flip and crop at random in `item(index, position)`, as `random_flip` and `random_crop` say.
    :param seed: seed of the augmentation.
    :param cache_dir: keep the resized pictures and maps in a memory-mapped file there, made when the first dataset asks for
        it ("": no cache). Samples are the same. Without effect where `crops`: those are cut from the pictures themselves.
    :raises InputError: for every bad flag, folder or (in `item`) file.
    """

    def __init__(
        self,
        dataset_mode,
        data_dir,
        image_size,
        is_train=True,
        num_classes=None,
        no_instance=False,
        augment=False,
        random_flip=True,
        random_crop=True,
        seed=0,
        cache_dir="",
    ):
        if image_size < 1:
            raise InputError(f"--image_size is {image_size}; give at least 1 pixel")
        self.facts = dataset_facts(dataset_mode)
        self.pairs = find_pairs(dataset_mode, data_dir, is_train, no_instance)
        self.has_images = self.pairs[0].image is not None
        self.has_instances = self.pairs[0].instance is not None
        self.image_size = image_size
        self.is_train = is_train
        self.num_classes = num_classes
        self.augment = augment
        self.random_flip = random_flip
        self.random_crop = random_crop
        self.seed = seed
        self.cache = (
            self._cache(dataset_mode, data_dir, no_instance, cache_dir) if cache_dir and not self.crops else None
        )

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, index):
        return self.item(index)

    @property
    def crops(self):
        """Whether samples are random parts of their scenes."""
        return self.augment and self.random_crop and self.facts.square

    def path(self, index):
        """Return the path that stands for a scene: its image's, else its label's."""
        return self.pairs[index].image or self.pairs[index].label

    def item(self, index, position=None):
        """Return one sample as a dict; augmented by draws at `position` when it is given and `augment` is set.

        image (3, H, W) float32 in [-1, 1] and image_edge (1, H, W) float32 in [0, 1], where there are images;
        label (1, H, W) int64; instance (1, H, W) int32, where there are instances; path (of the image, else of the
        label); position (the index where none is given).
        """
        pair = self.pairs[index]
        arrays = self._arrays(index, position)
        sample = {"label": torch.from_numpy(self._classes(pair.label, arrays["label"]))[None]}  # (1, H, W)
        if pair.image:
            sample["image"] = torch.from_numpy(pictures.centred(arrays["image"]))  # (3, H, W)
            sample["image_edge"] = torch.from_numpy(pictures.unit_range(arrays["edge"]))[None]  # (1, H, W)
        if pair.instance:
            sample["instance"] = torch.from_numpy(pictures.ids_array(arrays["instance"]))[None]  # (1, H, W)
        sample["path"] = self.path(index)
        sample["position"] = index if position is None else position
        return sample

    def batch(self, indices):
        """Return the samples at `indices`, not augmented, as one batch (see `load_data`)."""
        return collate([self.item(index) for index in indices])

    def sample_size(self, index):
        """Return (H, W) that `item(index)` will have, from the file's header alone."""
        width, height = pictures.picture_size(self.pairs[index].label)
        view = self._view((width, height), None)
        left, top, right, bottom = view.box or (0, 0, *view.size)
        return bottom - top, right - left

    def class_counts(self, index):
        """Count the pixels of each class in one label file at full resolution.

        :return: int64 array (classes,).
        :raises InputError: an unreadable or colour file, an id too large, or pictures of another size than the label.
        """
        pair = self.pairs[index]
        label = pictures.read_ids(pair.label, "label")
        for path in (pair.image, pair.instance):
            if path:
                _check_same_size(path, pictures.picture_size(path), pair.label, label.size)
        ids = self.facts.map_ids(pictures.ids_array(label))
        self._check_ids(pair.label, ids)
        return np.bincount(ids.ravel())

    def _arrays(self, index, position):
        """Return a scene's pixels and ids, resized, cut and mirrored: from the cache where they are there, else read."""
        arrays = self.cache.arrays(index) if self.cache else None
        if arrays is None:
            return self._read(index, position)
        if self._flips(position):
            # Edges, too: the filter treats left and right alike
            return {name: array[..., ::-1] for name, array in arrays.items()}
        return arrays

    def _read(self, index, position=None):
        """Read a scene's files: dict of label and instance (H, W), of the file's integers, image (3, H, W), edge (H, W)."""
        pair = self.pairs[index]
        label = pictures.read_ids(pair.label, "label")
        view = self._view(label.size, position)
        arrays = {"label": np.asarray(_resize_ids(label, view))}  # (H, W)
        if pair.image:
            picture = pictures.read_picture(pair.image)
            _check_same_size(pair.image, picture.size, pair.label, label.size)
            picture = _cut(pictures.resize_picture(picture, view.size, view.short), view)
            arrays |= {"image": pictures.planes(picture), "edge": pictures.edge_pixels(picture)}  # (3, H, W), (H, W)
        if pair.instance:
            instance = pictures.read_ids(pair.instance, "instance")
            _check_same_size(pair.instance, instance.size, pair.label, label.size)
            arrays["instance"] = np.asarray(_resize_ids(instance, view))  # (H, W)
        return arrays

    def _cache(self, dataset_mode, data_dir, no_instance, folder):
        """Open or build the cache of what `_read` gives without augmentation."""
        if is_remote(folder):
            raise InputError(
                f"--cache_dir {folder} is remote, and cannot be mapped into memory; name a folder of this machine"
            )
        check_folder(folder, "cache_dir")
        split = "train" if self.is_train else "val"
        name = os.path.basename(os.fspath(data_dir).rstrip("/") if is_remote(data_dir) else os.path.abspath(data_dir))
        name = f"{name}_{dataset_mode}_{split}_{self.image_size}" + ("_no_instance" if no_instance else "") + ".cache"
        recipe = {
            "dataset_mode": dataset_mode,
            "split": split,
            "image_size": self.image_size,
            "Pillow": PIL.__version__,
        }
        sources = [[path for path in pair[:3] if path] for pair in self.pairs]
        return open_cache(os.path.join(folder, re.sub(r"[^\w.-]", "_", name)), recipe, data_dir, sources, self._read)

    def _flips(self, position):
        wanted = self.augment and self.random_flip and position is not None
        return wanted and uniform(self.seed, "flip", position) < 0.5

    def _view(self, size, position):
        """Choose the `View` of a scene of this (width, height)."""
        augment = self.augment and position is not None
        flip = self._flips(position)
        side = self.image_size
        if not self.facts.square:
            return View(pictures.fitted_size(size, side), side, None, flip)
        if not self.is_train:
            return View((side, side), side, None, flip)

        short = side
        if augment and self.random_crop:
            choices = math.ceil(side / SMALLEST_CROP) - side + 1
            short = side + integer(self.seed, "crop_scale", choices, position)
        width, height = pictures.fitted_size(size, short)
        left, top = (width - side) // 2, (height - side) // 2
        if augment and self.random_crop:
            left = integer(self.seed, "crop_left", width - side + 1, position)
            top = integer(self.seed, "crop_top", height - side + 1, position)
        return View((width, height), short, (left, top, left + side, top + side), flip)

    def _classes(self, path, label):
        """Array (H, W) of a label file's ids -> int64 array (H, W) of class ids below num_classes."""
        ids = self.facts.map_ids(pictures.ids_array(label))
        self._check_ids(path, ids)
        return ids.astype(np.int64)  # (H, W)

    def _check_ids(self, path, ids):
        if ids.min() < 0:
            raise InputError(f"{path} has id {ids.min()}; class ids start at 0: correct the file")
        if self.num_classes is not None and ids.max() >= self.num_classes:
            raise InputError(
                f"{path} has id {ids.max()}, but --num_classes is {self.num_classes}; "
                "raise --num_classes, or correct the file or --dataset_mode"
            )


def _resize_ids(ids, view):
    return _cut(ids.resize(view.size, Image.Resampling.NEAREST), view)


def _cut(picture, view):
    if view.box:
        picture = picture.crop(view.box)
    return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if view.flip else picture


def _check_same_size(path, size, label_path, label_size):
    if size != label_size:
        raise InputError(
            f"{path} is {size[0]}x{size[1]} pixels, but {label_path} is {label_size[0]}x{label_size[1]}; give files of one size"
        )


def label_histogram(dataset, limit=None, progress=False):
    """Count pixels per class over the label files at full resolution, and check every file read.

    :param dataset: a `SceneDataset`.
    :param limit: read this many files, spread evenly over the dataset (None: all).
    :param progress: show a progress bar.
    :return: int64 array (classes,): as many as num_classes or the dataset has, more if larger ids occur.
    :raises InputError: an unreadable or colour file, an id too large, or pictures of another size than the label.
    """
    count = len(dataset) if limit is None else max(0, min(limit, len(dataset)))
    total = np.zeros(dataset.num_classes or dataset.facts.num_classes, np.int64)
    for turn in tqdm(range(count), desc="labels", unit="file", disable=not progress):
        counts = dataset.class_counts(turn * len(dataset) // count)
        if len(counts) > len(total):
            total = np.pad(total, (0, len(counts) - len(total)))
        total[: len(counts)] += counts
    return total


def load_data(
    *,
    dataset_mode,
    data_dir,
    batch_size,
    image_size,
    is_train=True,
    deterministic=False,
    num_classes=None,
    no_instance=False,
    random_flip=True,
    random_crop=True,
    seed=0,
    start=0,
    stop=None,
    rank=0,
    world_size=1,
    num_workers=0,
    pin_memory=False,
    on_bad_image="error",
    cache_dir="",
):
    """Return the `SceneBatches` of one split: endless in a seeded order, or one pass in file order.

    Batches are dicts: image (N, 3, H, W) float32 in [-1, 1] and image_edge (N, 1, H, W) float32 in [0, 1] where the
    folder has pictures, label (N, 1, H, W) int64, instance (N, 1, H, W) int32 where it has instance maps, path [N] (of
    the images, else of the labels), position (N,) int64, skipped [`Skipped`] (empty where nothing was).

    :param batch_size: samples per batch on this rank.
    :param deterministic: one pass in sorted order without augmentation, the last batch smaller; position is the index.
    :param start: the position to begin with; resuming continues at the position after the last one seen.
    :param stop: positions from here on are left out (None: no end, or the end of the pass).
    :param rank: this process, 0..world_size-1. Batch b, row j is position start + (b·world_size + rank)·batch_size + j.
    :param num_workers: processes that read ahead (0: read in this process).
    :param pin_memory: page-locked batches, where there is an accelerator.
    :param on_bad_image: error raises for a bad file; skip puts the next good scene of the list at its position.
    For the other parameters see `SceneDataset`.
    :raises InputError: here for bad flags and folders, while iterating for bad files.
    """
    loading = {
        "batch_size": batch_size,
        "start": start,
        "num_workers": num_workers,
        "on_bad_image": on_bad_image,
        "rank": rank,
        "world_size": world_size,
    }
    dataset = SceneDataset(
        dataset_mode,
        data_dir,
        image_size,
        is_train=is_train,
        num_classes=num_classes,
        no_instance=no_instance,
        augment=is_train and not deterministic,
        random_flip=random_flip,
        random_crop=random_crop,
        seed=seed,
        cache_dir=cache_dir,
    )
    return scene_batches(dataset, deterministic=deterministic, stop=stop, pin_memory=pin_memory, **loading)


ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def find_pictures(dataset_mode, data_dir, is_train):
    """List the pictures of a folder: those of the dataset's split where it has that layout, else all of the folder's.

    :return: list of `Pair` with image and stem, sorted.
    """
    if is_remote(data_dir):
        raise InputError(f"--extractor reads local folders; copy {data_dir} to this machine")
    root, endings = data_dir, ENDINGS
    for layout in DATASETS[dataset_mode].layouts if dataset_mode in DATASETS else ():
        folder = os.path.join(data_dir, layout.images.folders[0 if is_train else 1])
        if os.path.isdir(folder):
            root, endings = folder, layout.images.endings
            break
    found = []
    for folder, _, names in os.walk(root):
        for name in names:
            ending = next((end for end in endings if name.lower().endswith(end.lower())), None)
            if ending:
                path = os.path.join(folder, name)
                found.append(Pair(path, None, None, os.path.relpath(path, root)[: -len(ending)]))
    if not found:
        raise InputError(
            f"--data_dir {data_dir}: no pictures ({', '.join(endings)}) in {root}; name a folder with pictures"
        )
    return sorted(found, key=lambda pair: pair.stem)


class PictureFolder(SceneDataset):
    """Pictures whose label maps come from an extractor; otherwise like `SceneDataset`.

    The instance map is the label map: an extractor tells classes apart, not instances.

    :param extract: function (1, 3, H, W) in [-1, 1] -> (1, 1, H, W) class ids.
    """

    def __init__(self, dataset_mode, data_dir, image_size, is_train, extract, no_instance=False):
        self.facts = dataset_facts(dataset_mode)
        self.pairs = find_pictures(dataset_mode, data_dir, is_train)
        self.has_images, self.has_instances = True, not no_instance
        self.image_size, self.is_train, self.extract = image_size, is_train, extract
        self.augment = False

    def item(self, index, position=None):
        """Return one sample as a dict (see `SceneDataset.item`)."""
        pair = self.pairs[index]
        picture = pictures.read_picture(pair.image)
        size, short = self._size(picture.size)
        picture = pictures.resize_picture(picture, size, short)
        image = torch.from_numpy(pictures.centred(pictures.planes(picture)))  # (3, H, W)
        label = self.extract(image[None])[0].long()  # (1, H, W)
        sample = {
            "label": label,
            "image": image,
            "image_edge": torch.from_numpy(pictures.unit_range(pictures.edge_pixels(picture)))[None],
        }
        if self.has_instances:
            sample["instance"] = label.int()
        return sample | {"path": pair.image, "position": index if position is None else position}

    def sample_size(self, index):
        """Return (H, W) that `item(index)` will have, from the file's header alone."""
        size, _ = self._size(pictures.picture_size(self.pairs[index].image))
        return size[1], size[0]

    def class_counts(self, index):
        """Count the pixels of each class in one extracted label map, (classes,)."""
        return torch.bincount(self.item(index)["label"].flatten()).numpy()

    def _size(self, size):
        view = self._view(size, None)
        return view.size, view.short
