"""Which files make up a dataset: a table of facts per dataset, listing of folders, and pairing by stem.

Folders are local or remote (gs://, az://); remote ones are read through blobfile.
"""

import os
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import blobfile as bf
import numpy as np

from ..console import InputError


class Files(NamedTuple):
    """Where one kind of file lies: a folder, {} standing for the split, and the endings of the file names."""

    folder: str
    endings: tuple[str, ...]


class Layout(NamedTuple):
    """One arrangement of folders that a dataset comes in."""

    images: Files
    labels: Files
    instances: Files | None = None


class DatasetFacts(NamedTuple):
    """What differs between datasets."""

    layouts: tuple[Layout, ...]  # accepted arrangements; the first one whose label folder is there is taken
    splits: tuple[str, str]  # names of the training and validation split in folders
    num_classes: int  # after `map_ids`
    map_ids: Callable  # raw ids of a label file (int array) -> class ids (int array)
    square: bool  # pictures become squares (crops in training) instead of keeping their aspect
    names: Sequence[str] = ()  # of the classes


def cityscapes_ids(ids):
    """Licence plate is id -1, which is 255 in 8 bits: class 34."""
    return np.where((ids == -1) | (ids == 255), 34, ids)


def ade20k_ids(ids):
    """Ids 1..150 become classes 0..149; 0 (unlabelled) and everything else become class 150."""
    return np.where((ids >= 1) & (ids <= 150), ids - 1, 150)


def coco_ids(ids):
    """255 (unlabelled) becomes class 182."""
    return np.where(ids == 255, 182, ids)


JPEG, PNG = (".jpg", ".jpeg"), (".png",)
PICTURES = Files("", (".png", ".jpg", ".jpeg", ".webp", ".bmp"))  # of any folder
GTFINE = [Files("gtFine/{}", (ending,)) for ending in ("_gtFine_labelIds.png", "_gtFine_instanceIds.png")]
CITYSCAPES = Layout(Files("leftImg8bit/{}", ("_leftImg8bit.png",)), *GTFINE)
ADE20K_FLAT = Layout(Files("{}", JPEG), Files("{}", ("_seg.png",)))
ADE20K = Layout(Files("images/{}", JPEG), Files("annotations/{}", PNG))
COCO = Layout(Files("images/{}2017", JPEG), Files("labels/{}2017", PNG), Files("images/{}_inst", PNG))
NAMES = """unlabeled,ego vehicle,rectification border,out of roi,static,dynamic,ground,road,sidewalk,parking,rail track
building,wall,fence,guard rail,bridge,tunnel,pole,polegroup,traffic light,traffic sign,vegetation,terrain,sky,person
rider,car,truck,bus,caravan,trailer,train,motorcycle,bicycle,license plate""".replace("\n", ",").split(",")
DATASETS = {
    "cityscapes": DatasetFacts((CITYSCAPES,), ("train", "val"), 35, cityscapes_ids, square=False, names=NAMES),
    "ade20k": DatasetFacts((ADE20K_FLAT, ADE20K), ("training", "validation"), 151, ade20k_ids, square=True),
    "coco": DatasetFacts((COCO,), ("train", "val"), 183, coco_ids, square=True),
}


class Pair(NamedTuple):
    """The files of one scene; what the folder has none of is None."""

    image: str | None
    label: str | None
    instance: str | None
    stem: str  # the path below the split's folder without the ending, such as "aachen/aachen_000000_000019"


def is_remote(path):
    """Whether a path is a URL such as gs://bucket/file, and not a local path."""
    return "://" in os.fspath(path)


def find_pairs(dataset_mode, data_dir, is_train, no_instance=False):
    """List the files of one split and pair them by stem, in sorted order; files without a partner are left out.

    :param data_dir: the dataset's folder, local or gs:// or az://.
    :param no_instance: leave instance maps aside.
    :return: a list of `Pair`, not empty.
    """
    facts = DATASETS[dataset_mode]
    split = facts.splits[0 if is_train else 1]
    expected = [layout.labels.folder.format(split) for layout in facts.layouts]
    try:
        there = [bf.isdir(bf.join(data_dir, folder)) for folder in expected]
        if not any(there):
            found = f"has no folder {' or '.join(expected)}" if bf.isdir(data_dir) else "is not a folder"
            raise InputError(f'--data_dir "{data_dir}" {found}; correct it or --dataset_mode {dataset_mode}')
        layout = facts.layouts[there.index(True)]
        if no_instance:
            layout = layout._replace(instances=None)
        images, labels, instances = (_listed(data_dir, files, split) if files else {} for files in layout)
    except (OSError, bf.Error) as error:
        raise InputError(f"--data_dir {data_dir} cannot be listed: {' '.join(str(error).split())}") from error
    if not labels:
        folder = bf.join(data_dir, layout.labels.folder.format(split))
        raise InputError(f"{folder} has no label file (*{layout.labels.endings[0]}); fill it or correct --data_dir")
    return _pair(data_dir, {"picture": images, "label": labels, "instance map": instances})


def find_pictures(dataset_mode, data_dir, is_train):
    """List pictures as `Pair`, sorted: those of the dataset's split where it has that layout, else all there."""
    facts = DATASETS[dataset_mode]
    split = facts.splits[0 if is_train else 1]
    kinds = (layout.images for layout in facts.layouts)
    there = (files for files in kinds if bf.isdir(bf.join(data_dir, files.folder.format(split))))
    found = _listed(data_dir, next(there, PICTURES), split)
    if not found:
        raise InputError(f"--data_dir {data_dir}: no pictures ({', '.join(PICTURES.endings)}); name another folder")
    return [Pair(path, None, None, stem) for stem, path in sorted(found.items())]


def chosen(pairs, only="", leave_out=""):
    """Return the `Pair`s whose stems begin with one of the words of `only` (all, where there is none), but `leave_out`.

    :param only, leave_out: words separated by commas.
    """
    kept, dropped = (tuple(filter(None, map(str.strip, words.split(",")))) for words in (only, leave_out))
    for name, words in (("only", kept), ("leave_out", dropped)):
        for word in words:
            if not any(pair.stem.startswith(word) for pair in pairs):
                raise InputError(f"--{name} {word}: no scene begins so; the first is {pairs[0].stem}")
    found = [pair for pair in pairs if pair.stem.startswith(kept or "") and not pair.stem.startswith(dropped or ("/",))]
    if not found:
        raise InputError(f"--only {only} --leave_out {leave_out}: no scene is left; drop one of them")
    return found


def _listed(data_dir, files, split):
    """Return {stem: path} of all such files, below the folder too; empty where there is no folder."""
    folder = bf.join(data_dir, files.folder.format(split)).rstrip("/")
    if not bf.isdir(folder):
        return {}
    paths, top = {}, None
    # os.walk follows linked folders, which blobfile's does not
    for here, _, names in bf.walk(folder) if is_remote(folder) else os.walk(folder, followlinks=True, onerror=_raise):
        top = top or here  # blobfile may spell it differently from us
        for name in names:
            ending = next((end for end in files.endings if name.lower().endswith(end.lower())), None)
            if ending and not name.startswith("."):
                path = "/".join(filter(None, (folder, here[len(top) :].strip("/"), name)))
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
    left_out = [f"{stem} (no {' and no '.join(missing)})" for stem, missing in lacks.items() if missing]
    if len(left_out) == len(stems):
        found = "; ".join(f"{name} {min(table.values())}" for name, table in asked.items())
        raise InputError(f"no files in --data_dir {data_dir} match by their stems ({found}); rename them alike")
    if left_out:
        shown = ", ".join(left_out[:5]) + (", …" if len(left_out) > 5 else "")
        warnings.warn(f"{len(left_out)} scene(s) in {data_dir} are incomplete and left out: {shown}", stacklevel=3)
    return [Pair(*(table.get(stem) for table in tables.values()), stem) for stem in stems if not lacks[stem]]
