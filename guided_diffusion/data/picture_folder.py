"""Pictures without label maps: a semantic extractor reads the labels off them, so that the link runs on images alone."""

import os

import torch

from ..console import InputError
from . import pictures
from .datasets import SceneDataset
from .pairing import DATASETS, Pair, dataset_facts, is_remote

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
        image = torch.from_numpy(pictures.picture_array(picture))  # (3, H, W)
        label = self.extract(image[None])[0].long()  # (1, H, W)
        sample = {"label": label, "image": image, "image_edge": torch.from_numpy(pictures.image_edges(picture))[None]}
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
