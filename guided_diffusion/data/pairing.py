"""Which files make up a dataset: a table of facts per dataset, listing of folders, and pairing by stem.

Folders are local or remote (gs://, az://); remote ones are read through blobfile.
"""

import os
import warnings
from collections.abc import Callable
from typing import NamedTuple

import blobfile as bf
import numpy as np

from ..console import InputError


class Files(NamedTuple):
    """Where one kind of file lies: a folder per split (train, val) and the endings of the file names."""

    folders: tuple[str, str]
    endings: tuple[str, ...]

    def folder(self, is_train):
        """Return the folder of a split, relative to the dataset's."""
        return self.folders[0 if is_train else 1]


class Layout(NamedTuple):
    """One arrangement of folders that a dataset comes in."""

    images: Files
    labels: Files
    instances: Files | None = None


class DatasetFacts(NamedTuple):
    """What differs between datasets."""

    layouts: tuple[Layout, ...]  # accepted arrangements; the first one whose label folder is there is taken
    num_classes: int  # after `map_ids`
    map_ids: Callable  # raw ids of a label file (int array) -> class ids (int array)
    square: bool  # pictures become squares (crops in training) instead of keeping their aspect


def cityscapes_ids(ids):
    """Licence plate is id -1, which is 255 in 8 bits: class 34."""
    return np.where((ids == -1) | (ids == 255), 34, ids)


def ade20k_ids(ids):
    """Ids 1..150 become classes 0..149; 0 (unlabelled) and everything else become class 150."""
    return np.where((ids >= 1) & (ids <= 150), ids - 1, 150)


def coco_ids(ids):
    """255 (unlabelled) becomes class 182."""
    return np.where(ids == 255, 182, ids)


JPEG = (".jpg", ".jpeg")
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
CITYSCAPES = Layout(
    Files(("leftImg8bit/train", "leftImg8bit/val"), ("_leftImg8bit.png",)),
    Files(("gtFine/train", "gtFine/val"), ("_gtFine_labelIds.png",)),
    Files(("gtFine/train", "gtFine/val"), ("_gtFine_instanceIds.png",)),
)
ADE20K_FLAT = Layout(Files(("training", "validation"), JPEG), Files(("training", "validation"), ("_seg.png",)))
ADE20K = Layout(
    Files(("images/training", "images/validation"), JPEG),
    Files(("annotations/training", "annotations/validation"), (".png",)),
)
COCO = Layout(
    Files(("images/train2017", "images/val2017"), JPEG),
    Files(("labels/train2017", "labels/val2017"), (".png",)),
    Files(("images/train_inst", "images/val_inst"), (".png",)),
)
DATASETS = {
    "cityscapes": DatasetFacts((CITYSCAPES,), 35, cityscapes_ids, square=False),
    "ade20k": DatasetFacts((ADE20K_FLAT, ADE20K), 151, ade20k_ids, square=True),
    "coco": DatasetFacts((COCO,), 183, coco_ids, square=True),
}


class Pair(NamedTuple):
    """The files of one scene; what the folder has none of is None."""

    image: str | None
    label: str | None
    instance: str | None
    stem: str  # the path below the split's folder without the ending, such as "aachen/aachen_000000_000019"


def dataset_facts(dataset_mode):
    """Return the `DatasetFacts` of a `--dataset_mode`; InputError when there is no such dataset."""
    if dataset_mode not in DATASETS:
        raise InputError(f'--dataset_mode is "{dataset_mode}"; choose one of {", ".join(DATASETS)}')
    return DATASETS[dataset_mode]


def is_remote(path):
    """Whether a path is a URL such as gs://bucket/file, and not a local path."""
    return "://" in os.fspath(path)


def find_pairs(dataset_mode, data_dir, is_train, no_instance=False):
    """List the files of one split and pair them by stem, in sorted order; files without a partner are left out.

    :param dataset_mode: a key of `DATASETS`.
    :param data_dir: the dataset's folder, local or gs:// or az://.
    :param is_train: the training split, else the validation split.
    :param no_instance: leave instance maps aside.
    :return: a list of `Pair`, not empty.
    """
    layouts = dataset_facts(dataset_mode).layouts
    try:
        if not data_dir or not bf.isdir(data_dir):
            raise InputError(f'--data_dir "{data_dir}" is no folder; give that of the {dataset_mode} dataset')
        there = [layout for layout in layouts if bf.isdir(bf.join(data_dir, layout.labels.folder(is_train)))]
        if not there:
            expected = " or ".join(layout.labels.folder(is_train) for layout in layouts)
            found = ", ".join(sorted(bf.listdir(data_dir))[:5]) or "nothing"
            has = f"--data_dir {data_dir} has no folder {expected} with the labels; it holds {found}"
            raise InputError(f"{has}: correct it, --dataset_mode ({dataset_mode}) or --is_train ({is_train})")
        layout = there[0]._replace(instances=None) if no_instance else there[0]
        kinds = zip(("picture", "label", "instance map"), layout, strict=True)
        tables = {kind: _listed(data_dir, files, is_train) if files else {} for kind, files in kinds}
    except (OSError, bf.Error) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"--data_dir {data_dir} cannot be listed ({reason}); check it") from error
    if not tables["label"]:
        folder = bf.join(data_dir, layout.labels.folder(is_train))
        raise InputError(f"{folder} has no label file (*{layout.labels.endings[0]}); fill it or correct --data_dir")
    return _pair(data_dir, tables)


def find_pictures(dataset_mode, data_dir, is_train):
    """List the pictures of a folder: those of the dataset's split where it has that layout, else all of the folder's.

    :return: list of `Pair` with image and stem, sorted by stem, not empty.
    """
    folders = [layout.images for layout in dataset_facts(dataset_mode).layouts]
    there = [files for files in folders if bf.isdir(bf.join(data_dir, files.folder(is_train)))]
    files = there[0] if there else Files(("", ""), PICTURES)
    found = _listed(data_dir, files, is_train)
    if not found:
        raise InputError(f"--data_dir {data_dir}: no pictures ({', '.join(files.endings)}); name another folder")
    return [Pair(path, None, None, stem) for stem, path in sorted(found.items())]


def _listed(data_dir, files, is_train):
    """Return {stem: path} of all such files, below the folder too; empty where there is no folder."""
    folder = bf.join(data_dir, files.folder(is_train)).rstrip("/")
    if not bf.isdir(folder):
        return {}
    paths, top = {}, None
    # os.walk follows linked folders, which blobfile's does not
    for here, _, names in bf.walk(folder) if is_remote(folder) else os.walk(folder, followlinks=True, onerror=_raise):
        top = here if top is None else top  # blobfile may spell it differently from us
        below = here[len(top) :].strip("/")
        for name in names:
            ending = next((end for end in files.endings if name.lower().endswith(end.lower())), None)
            if ending and not name.startswith("."):
                path = "/".join(filter(None, (folder, below, name)))
                stem = path[len(folder) + 1 : -len(ending)]
                if stem in paths:
                    raise InputError(f"{path} and {paths[stem]} have the same stem; keep one of them")
                paths[stem] = path
    return paths


def _raise(error):
    raise error


def _pair(data_dir, tables):
    """Join tables of picture, label and instance map {stem: path}; one that is empty is not asked for."""
    asked = {name: table for name, table in tables.items() if table}
    stems = sorted(set().union(*asked.values()))
    lacks = {stem: [name for name, table in asked.items() if stem not in table] for stem in stems}
    complete = [stem for stem in stems if not lacks[stem]]
    if not complete:
        found = "; ".join(f"{name} {min(table.values())}" for name, table in asked.items())
        raise InputError(f"no files in --data_dir {data_dir} match by their stems ({found}); rename them alike")
    left_out = [f"{stem} (no {' and no '.join(lacks[stem])})" for stem in stems if lacks[stem]]
    if left_out:
        shown = ", ".join(left_out[:5]) + (", …" if len(left_out) > 5 else "")
        warnings.warn(f"{len(left_out)} scene(s) in {data_dir} are incomplete and left out: {shown}", stacklevel=3)
    return [Pair(*(table.get(stem) for table in tables.values()), stem) for stem in complete]
