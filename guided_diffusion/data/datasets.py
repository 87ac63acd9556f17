"""Scenes as tensors; flip and crop follow from (seed, position in the data order), the order itself is in `loading`."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from tqdm import tqdm

from ..console import InputError, bar_options
from ..random_streams import integer, uniform
from . import pictures
from .loading import collate, scene_batches
from .pairing import DATASETS, chosen, find_pairs, find_pictures

SMALLEST_CROP = 0.8  # of the picture's short side


class View(NamedTuple):
    """How one scene becomes a sample: resize to `size`, cut `box` out, mirror if `flip`."""

    size: tuple[int, int]  # (width, height)
    box: tuple[int, int, int, int]  # (left, top, right, bottom)
    flip: bool = False

    def ids(self, ids):
        """Return the view of an id image as an array (H, W)."""
        return np.asarray(self._cut(ids.resize(self.size, Image.Resampling.NEAREST)))

    def picture(self, picture):
        """Return the view of a picture as arrays: image (3, H, W), edge (H, W) uint8."""
        picture = self._cut(pictures.resize_picture(picture, self.size))
        return {"image": np.asarray(picture).transpose(2, 0, 1), "edge": pictures.edge_pixels(picture)}

    def _cut(self, picture):
        picture = picture.crop(self.box)
        return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if self.flip else picture


@dataclass(eq=False)
class SceneDataset(Dataset):
    """The scenes of one split, as a torch map-style dataset.

    `pairs` lists the files (`Pair`) in sorted order. Every bad folder or (in `item`) file is an InputError.

    :param data_dir: the folder of the dataset (`dataset_mode`: cityscapes, ade20k or coco), local or gs:// or az://.
    :param image_size: short side of the samples in pixels; ade20k and coco become squares of it.
    :param is_train: the training split (ade20k and coco: crops), else the validation split (squeezed to a square).
    :param num_classes: class ids must lie below it (None: not checked).
    :param no_instance: leave instance maps aside.
    :param augment: flip, and where `crops` crop, at random in `item(index, position)`.
    :param only, leave_out: which scenes of the split (see `pairing.chosen`).
    :param cache_dir: keep the resized pictures and maps in memory-mapped files there ("": no cache); not where `crops`.
    """

    dataset_mode: str
    data_dir: str
    image_size: int
    is_train: bool = True
    num_classes: int | None = None
    no_instance: bool = False
    augment: bool = False
    seed: int = 0
    only: str = ""
    leave_out: str = ""
    cache_dir: str = ""

    def __post_init__(self):
        if self.dataset_mode not in DATASETS or self.image_size < 1:
            found = f"dataset_mode {self.dataset_mode!r}, image_size {self.image_size}"
            raise InputError(f"{found}: choose one of {', '.join(DATASETS)}, and at least 1 pixel")
        if not self.data_dir:
            raise InputError("--data_dir is empty: name the data set's folder, or begin with --preset toy")
        self.facts = DATASETS[self.dataset_mode]
        self.crops = self.augment and self.facts.square  # samples are random parts of their scenes
        self.pairs = chosen(self._find_pairs(), self.only, self.leave_out)
        self.has_images = self.pairs[0].image is not None
        self.has_instances = self.pairs[0].instance is not None
        self.cache = None
        if self.cache_dir and not self.crops:
            from .cache import open_cache

            self.cache = open_cache(self)

    def _find_pairs(self):
        return find_pairs(self.dataset_mode, self.data_dir, self.is_train, self.no_instance)

    def __len__(self):
        return len(self.pairs)

    def item(self, index, position=None):
        """Return one sample, a dict of what `load_data` describes; with `augment`, by the draws at `position`."""
        arrays = self.cache.arrays(index) if self.cache else self.read(index, position)
        if self.cache and self._flips(position):  # edges, too: the filter treats left and right alike
            arrays = {name: array[..., ::-1] for name, array in arrays.items()}
        label = self.class_ids(index, arrays["label"]).astype(np.int64)
        sample = {"label": torch.from_numpy(label)[None]}  # (1, H, W)
        sample["path"] = self.pairs[index].image or self.pairs[index].label
        sample["position"] = index if position is None else position
        if "image" in arrays:
            edge = arrays["edge"].astype(np.float32, order="C")
            edge /= 255
            sample["image"] = pictures.centred(arrays["image"])  # (3, H, W)
            sample["image_edge"] = torch.from_numpy(edge)[None]  # (1, H, W)
        if "instance" in arrays:
            sample["instance"] = torch.from_numpy(arrays["instance"].astype(np.int32, order="C"))[None]  # (1, H, W)
        return sample

    __getitem__ = item

    def batch(self, indices):
        """Return the samples at `indices`, not augmented, as one batch (see `load_data`)."""
        return collate([self.item(index) for index in indices])

    def sample_size(self, index):
        """Return (H, W) that `item(index)` will have, from the file's header alone."""
        pair = self.pairs[index]
        left, top, right, bottom = self._view(pictures.picture_size(pair.label or pair.image)).box
        return bottom - top, right - left

    def read(self, index, position=None):
        """Read a scene's files, resized, cut and mirrored.

        :return: dict of arrays: label, instance (H, W), integers as in the files; image (3, H, W), edge (H, W) uint8.
        """
        pair = self.pairs[index]
        label = pictures.read_ids(pair.label)
        view = self._view(label.size, position)
        arrays = {"label": view.ids(label)}
        if pair.image:
            picture = pictures.read_picture(pair.image)
            _check_same_size(pair.image, picture.size, pair.label, label.size)
            arrays |= view.picture(picture)
        if pair.instance:
            instance = pictures.read_ids(pair.instance)
            _check_same_size(pair.instance, instance.size, pair.label, label.size)
            arrays["instance"] = view.ids(instance)
        return arrays

    def _flips(self, position):
        return self.augment and position is not None and uniform(self.seed, "flip", position) < 0.5

    def _view(self, size, position=None):
        """Choose the `View` of a scene of this (width, height)."""
        flip, side = self._flips(position), self.image_size
        if not (self.facts.square and self.is_train):
            fitted = (side, side) if self.facts.square else pictures.fitted_size(size, side)
            return View(fitted, (0, 0, *fitted), flip)
        if not self.crops or position is None:
            width, height = pictures.fitted_size(size, side)
            left, top = (width - side) // 2, (height - side) // 2
        else:
            scales = math.ceil(side / SMALLEST_CROP) - side + 1
            short = side + integer(self.seed, "crop_scale", scales, position)
            width, height = pictures.fitted_size(size, short)
            left = integer(self.seed, "crop_left", width - side + 1, position)
            top = integer(self.seed, "crop_top", height - side + 1, position)
        return View((width, height), (left, top, left + side, top + side), flip)

    def class_ids(self, index, label):
        """Turn a label file's ids (H, W) into an integer array (H, W) of class ids, and check them."""
        ids = self.facts.map_ids(label.astype(np.int32, order="C"))
        low, high = ids.min(), ids.max()
        if low < 0 or high >= (self.num_classes or math.inf):
            found = f"{self.pairs[index].label} has id {low if low < 0 else high}"
            raise InputError(f"{found}, --num_classes is {self.num_classes}; correct it, the file or --dataset_mode")
        return ids


class PictureFolder(SceneDataset):
    """Pictures whose label maps (and, alike, instance maps) come from an extractor; else a `SceneDataset`.

    :param extract: function (1, 3, H, W) in [-1, 1] -> (1, 1, H, W) class ids.
    """

    def __init__(self, dataset_mode, data_dir, image_size, is_train, extract, no_instance=False, **scenes):
        super().__init__(dataset_mode, data_dir, image_size, is_train, **scenes)
        self.extract = extract
        self.has_instances = not no_instance

    def _find_pairs(self):
        return find_pictures(self.dataset_mode, self.data_dir, self.is_train)

    def read(self, index, position=None):
        """Read a scene's picture, resized, and extract its label map (see `SceneDataset.read`)."""
        picture = pictures.read_picture(self.pairs[index].image)
        arrays = self._view(picture.size, position).picture(picture)
        label = self.extract(pictures.centred(arrays["image"])[None])[0, 0].numpy()  # (H, W)
        return arrays | {"label": label} | ({"instance": label} if self.has_instances else {})

    def class_ids(self, index, label):
        return label


def _check_same_size(path, size, label_path, label_size):
    if size != label_size:
        raise InputError(f"{path} has {size} pixels, but {label_path} has {label_size}; give files of one size")


def survey(dataset, most):
    """Decode all files of scenes at full resolution, check sizes and ids, and count.

    :param most: so many scenes, spread over the split.
    :return: pixels per class, int64 (num_classes,); how many had label 255; (width, height) of the smallest picture.
    """
    total, void, sizes = np.zeros(dataset.num_classes, np.int64), 0, []
    for k in tqdm(range(most), desc="looking at scenes", unit="scene", **bar_options()):
        index = k * len(dataset) // most
        pair = dataset.pairs[index]
        label = pictures.read_ids(pair.label)
        for path, read in ((pair.image, pictures.read_picture), (pair.instance, pictures.read_ids)):
            if path:
                _check_same_size(path, read(path).size, pair.label, label.size)
        ids = np.asarray(label)
        total += np.bincount(dataset.class_ids(index, ids).ravel(), minlength=len(total))
        void += np.count_nonzero(ids == 255)
        sizes.append(label.size)
    return total, void, min(sizes, key=min)


def load_data(*, dataset_mode, data_dir, batch_size, image_size, is_train=True, deterministic=False, **options):
    """Return a generator of the batches of one split: endless in a seeded order, or one pass in file order.

    Batches are dicts: image (N, 3, H, W) float32 in [-1, 1] and image_edge (N, 1, H, W) float32 in [0, 1] where the
    folder has pictures, label (N, 1, H, W) int64, instance (N, 1, H, W) int32 where it has instance maps, path [N]
    (of the images, else of the labels), position (N,) int64 (of samples outside a data order: their indices).

    :param batch_size: samples per batch on this rank.
    :param deterministic: one pass in sorted order without augmentation, the last batch smaller; position is the index.
    :param start: the position to begin with (0); resuming continues at the position after the last one seen.
    :param rank, world_size: this process and their number (0, 1). Batch b, row j is position
        start + (b·world_size + rank)·batch_size + j.
    :param num_workers, pin_memory: as in torch's `DataLoader`.
    :param prepare: picklable function batch -> batch, which the workers call.
    The other parameters are those of `SceneDataset`. InputErrors of bad files are raised while iterating.
    """
    scene = {name: options.pop(name) for name in SceneDataset.__dataclass_fields__ if name in options}
    scene["augment"] = is_train and not deterministic
    dataset = SceneDataset(dataset_mode, data_dir, image_size, is_train, **scene)
    return scene_batches(dataset, batch_size=batch_size, deterministic=deterministic, **options)
