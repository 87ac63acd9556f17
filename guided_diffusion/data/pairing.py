"""Which files make up a dataset: a table of facts per dataset, listing of folders, and pairing by stem.

Folders are local or remote (gs://, az://); remote ones are read through blobfile.
"""

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import blobfile as bf
import numpy as np

from ..console import InputError


@dataclass(frozen=True)
class Files:
    """Where one kind of file lies: a folder per split (train, val) and the endings of the file names."""

    folders: tuple[str, str]
    endings: tuple[str, ...]


@dataclass(frozen=True)
class Layout:
    """One arrangement of folders that a dataset comes in."""

    images: Files
    labels: Files
    instances: Files | None = None


@dataclass(frozen=True)
class DatasetFacts:
    """What differs between datasets.

    :param layouts: accepted arrangements; the first one that is there is taken.
    :param num_classes: number of class ids after `map_ids`.
    :param map_ids: raw ids of a label file (int array) -> class ids (int array).
    :param square: pictures become squares (crops in training) instead of keeping their aspect.
    :param whole_tree_mark: a part of file names that only another edition of the dataset has.
    """

    layouts: tuple[Layout, ...]
    num_classes: int
    map_ids: Callable
    square: bool
    whole_tree_mark: str | None = None


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
DATASETS = {
    "cityscapes": DatasetFacts(
        layouts=(
            Layout(
                images=Files(("leftImg8bit/train", "leftImg8bit/val"), ("_leftImg8bit.png",)),
                labels=Files(("gtFine/train", "gtFine/val"), ("_gtFine_labelIds.png",)),
                instances=Files(("gtFine/train", "gtFine/val"), ("_gtFine_instanceIds.png",)),
            ),
        ),
        num_classes=35,
        map_ids=cityscapes_ids,
        square=False,
    ),
    "ade20k": DatasetFacts(
        layouts=(
            Layout(
                images=Files(("training", "validation"), JPEG), labels=Files(("training", "validation"), ("_seg.png",))
            ),
            Layout(
                images=Files(("images/training", "images/validation"), JPEG),
                labels=Files(("annotations/training", "annotations/validation"), (".png",)),
            ),
        ),
        num_classes=151,
        map_ids=ade20k_ids,
        square=True,
        whole_tree_mark="_parts_",
    ),
    "coco": DatasetFacts(
        layouts=(
            Layout(
                images=Files(("images/train2017", "images/val2017"), JPEG),
                labels=Files(("labels/train2017", "labels/val2017"), (".png",)),
                instances=Files(("images/train_inst", "images/val_inst"), (".png",)),
            ),
        ),
        num_classes=183,
        map_ids=coco_ids,
        square=True,
    ),
}


class Pair(NamedTuple):
    """The files of one scene; `image` and `instance` are None where the folder has none at all.

    `stem` is the label's path below its split folder without the ending, such as "aachen/aachen_000000_000019".
    """

    image: str | None
    label: str
    instance: str | None
    stem: str


def dataset_facts(dataset_mode):
    """Return the `DatasetFacts` of a `--dataset_mode`; InputError when there is no such dataset."""
    if dataset_mode not in DATASETS:
        raise InputError(f'--dataset_mode is "{dataset_mode}"; choose one of {", ".join(DATASETS)}')
    return DATASETS[dataset_mode]


def find_pairs(dataset_mode, data_dir, is_train, no_instance=False):
    """List the files of one split and pair them by stem, in sorted order.

    Files without a partner are left out and named in one warning. Without any picture (or instance map) in the folders,
    the pairs hold None in its place.

    :param dataset_mode: a key of `DATASETS`.
    :param data_dir: the dataset's folder, local or gs:// or az://.
    :param is_train: the training split, else the validation split.
    :param no_instance: leave instance maps aside.
    :return: a list of `Pair`, not empty.
    :raises InputError: missing or empty folders, another edition of the dataset, or no two files that match.
    """
    facts = dataset_facts(dataset_mode)
    try:
        return _find_pairs(dataset_mode, facts, data_dir, 0 if is_train else 1, no_instance)
    except (OSError, bf.Error) as error:
        raise InputError(f"--data_dir {data_dir} cannot be listed ({_one_line(error)}); check it") from error


def _find_pairs(dataset_mode, facts, data_dir, split, no_instance):
    if not data_dir:
        raise InputError(f'--data_dir is ""; give the folder of the {dataset_mode} dataset')
    data_dir = os.fspath(data_dir)
    if not bf.isdir(data_dir):
        found = "is a file, not a folder" if bf.exists(data_dir) else "does not exist"
        raise InputError(f"--data_dir {data_dir} {found}; give the folder of the {dataset_mode} dataset")

    layout, names_in = _choose_layout(facts, data_dir, split)
    _refuse_whole_tree(facts, data_dir, names_in)
    labels = _select(layout.labels, data_dir, split, names_in)
    if labels is None:
        raise InputError(_missing_split(dataset_mode, facts, layout, data_dir, split))
    if not labels:
        folder = bf.join(data_dir, layout.labels.folders[split])
        raise InputError(f"{folder} has no label file (*{layout.labels.endings[0]}); fill it or correct --data_dir")
    images = _select(layout.images, data_dir, split, names_in) or {}
    instances = {}
    if layout.instances and not no_instance:
        instances = _select(layout.instances, data_dir, split, names_in) or {}
    return _pair(data_dir, images, labels, instances)


def _choose_layout(facts, data_dir, split):
    """Return the first layout whose label folder is there (else the first), and the names in every folder looked at."""
    names_in = {}
    for layout in facts.layouts:
        for files in (layout.images, layout.labels, layout.instances):
            if files and files.folders[split] not in names_in:
                names_in[files.folders[split]] = _walk(bf.join(data_dir, files.folders[split]))
        if names_in[layout.labels.folders[split]] is not None:
            return layout, names_in
    return facts.layouts[0], names_in


def _walk(folder):
    """Return the sorted names of all files below a folder, relative to it with "/"; None when there is no folder."""
    if not bf.isdir(folder):
        return None
    # os.walk follows linked folders, which blobfile's does not
    remote = is_remote(folder)
    tree = bf.walk(folder) if remote else os.walk(folder, followlinks=True, onerror=_raise)
    names = []
    top = None
    for here, _, files in tree:
        # blobfile may spell the top folder differently from us: the first one it yields is the top
        top = here if top is None else top
        below = here[len(top) :].strip("/" if remote else os.sep).replace(os.sep, "/")
        names += [f"{below}/{name}" if below else name for name in files if not name.startswith(".")]
    return sorted(names)


def _raise(error):
    raise error


def is_remote(path):
    """Whether a path is a URL such as gs://bucket/file, and not a local path."""
    return "://" in os.fspath(path)


def _select(files, data_dir, split, names_in):
    """Return {stem: path} of the names with one of the endings; None when the folder is missing."""
    folder = files.folders[split]
    if names_in[folder] is None:
        return None
    prefix = bf.join(data_dir, folder).rstrip("/") + "/"
    paths = {}
    for name in names_in[folder]:
        ending = next((e for e in files.endings if name.lower().endswith(e.lower())), None)
        if ending is None:
            continue
        stem = name[: -len(ending)]
        if stem in paths:
            raise InputError(f"{prefix}{name} and {paths[stem]} have the same stem; keep one of them")
        paths[stem] = prefix + name
    return paths


def _refuse_whole_tree(facts, data_dir, names_in):
    mark = facts.whole_tree_mark
    for folder, names in names_in.items():
        marked = next((name for name in names or () if mark and mark in name), None)
        if marked:
            raise InputError(
                f"{bf.join(data_dir, folder)} holds the full ADE20K tree ({marked}), whose colour-coded labels do not "
                "have the 150 classes; use ADEChallengeData2016 instead"
            )


def _missing_split(dataset_mode, facts, layout, data_dir, split):
    expected = " or ".join(each.labels.folders[split] for each in facts.layouts)
    other = [each.labels.folders[1 - split] for each in facts.layouts]
    there = [folder for folder in other if bf.isdir(bf.join(data_dir, folder))]
    if there:
        found = f"it has {', '.join(there)}"
    else:
        found = "it holds " + (", ".join(sorted(bf.listdir(data_dir))[:5]) or "nothing")
    return (
        f"--data_dir {data_dir} has no folder {expected}, where --dataset_mode {dataset_mode} with --is_train "
        f"{split == 0} looks for labels; {found}: correct --data_dir, --dataset_mode or --is_train"
    )


def _pair(data_dir, images, labels, instances):
    """Join three {stem: path} tables; a table that is empty is not asked for."""
    tables = {"picture": images, "label": labels, "instance map": instances}
    asked = {name: table for name, table in tables.items() if table}
    stems = sorted(set().union(*asked.values()))
    complete = [stem for stem in stems if all(stem in table for table in asked.values())]
    if not complete:
        found = "; ".join(f"{name} {next(iter(table.values()))}" for name, table in asked.items())
        raise InputError(f"no files in --data_dir {data_dir} match by their stems ({found}); rename them alike")

    kept = set(complete)
    left_out = [stem for stem in stems if stem not in kept]
    if left_out:
        shown = [
            f"{stem} (no {' and no '.join(name for name, table in asked.items() if stem not in table)})"
            for stem in left_out[:5]
        ]
        more = ", …" if len(left_out) > len(shown) else ""
        warnings.warn(
            f"{len(left_out)} scene(s) in {data_dir} are incomplete and left out: {', '.join(shown)}{more}",
            stacklevel=4,
        )
    return [Pair(images.get(stem), labels[stem], instances.get(stem), stem) for stem in complete]


def _one_line(error):
    return " ".join(str(error).split()) or type(error).__name__
