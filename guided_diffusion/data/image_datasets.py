"""Scenes as tensors; flip and crop follow from (seed, position in the data order), the order itself is in `loading`."""

import math
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from tqdm import tqdm

from ..errors import InputError
from ..random_streams import integer, uniform
from . import pictures
from .loading import Positions, SceneBatches, collate
from .pairing import dataset_facts, find_pairs

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
        label = pictures.read_ids(pair.label, "label")
        view = self._view(label.size, position)
        sample = {"label": torch.from_numpy(self._classes(pair.label, label, view))[None]}  # (1, H, W)
        if pair.image:
            picture = pictures.read_picture(pair.image)
            _check_same_size(pair.image, picture.size, pair.label, label.size)
            picture = _cut(pictures.resize_picture(picture, view.size, view.short), view)
            sample["image"] = torch.from_numpy(pictures.picture_array(picture))  # (3, H, W)
            sample["image_edge"] = torch.from_numpy(pictures.image_edges(picture))[None]  # (1, H, W)
        if pair.instance:
            instance = pictures.read_ids(pair.instance, "instance")
            _check_same_size(pair.instance, instance.size, pair.label, label.size)
            sample["instance"] = torch.from_numpy(pictures.ids_array(_resize_ids(instance, view)))[None]  # (1, H, W)
        sample["path"] = self.path(index)
        sample["position"] = index if position is None else position
        return sample

    def batch(self, indices):
        """Return the samples at `indices`, not augmented, as one batch (see `load_data`)."""
        batch = collate([self.item(index) for index in indices])
        if isinstance(batch, InputError):
            raise batch
        return batch

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

    def _view(self, size, position):
        """Choose the `View` of a scene of this (width, height)."""
        augment = self.augment and position is not None
        flip = augment and self.random_flip and uniform(self.seed, "flip", position) < 0.5
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

    def _classes(self, path, label, view):
        """Resized label image -> int64 array (H, W) of class ids below num_classes."""
        ids = self.facts.map_ids(pictures.ids_array(_resize_ids(label, view)))
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
    for flag, value, least in (("batch_size", batch_size, 1), ("start", start, 0), ("num_workers", num_workers, 0)):
        if value < least:
            raise InputError(f"--{flag} is {value}; give {least} or more")
    if on_bad_image not in ("error", "skip"):
        raise InputError(f"--on_bad_image is {on_bad_image!r}; give error or skip")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is not in 0..{world_size - 1}")
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
    )
    if deterministic:
        stop = len(dataset) if stop is None else min(stop, len(dataset))
    return SceneBatches(
        dataset,
        Positions(start, stop, batch_size, rank, world_size),
        shuffled=not deterministic,
        skips=on_bad_image == "skip",
        num_workers=num_workers,
        pin_memory=pin_memory,
    )
