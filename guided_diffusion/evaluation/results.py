"""A results folder: settings, tables that grow by whole rows, and pictures under their names.

Several processes may work in one folder, each on its share of the pictures, with a table of its own until all are done.
"""

import csv
import hashlib
import json
import os
import shutil
from collections import Counter
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from ..console import InputError
from ..files import atomic_write

PICTURE_KINDS = ("images", "labels", "local", "messages", "received", "samples")  # folders that shares write into


def unique_names(paths):
    """Return a file stem for each path: its own stem, or with as many of its folders as tell equal stems apart."""
    parts = [PurePosixPath(str(path).replace("\\", "/")).with_suffix("").parts for path in paths]
    names = [part[-1] for part in parts]
    for depth in range(2, max(map(len, parts), default=1) + 1):
        counts = Counter(names)
        if max(counts.values(), default=1) == 1:
            break
        names = [
            "__".join(part[-depth:]).replace("/", "") if counts[name] > 1 else name
            for name, part in zip(names, parts, strict=True)
        ]
    counts = Counter(names)
    return [f"{name}__{k}" if counts[name] > 1 else name for k, name in enumerate(names)]


def picture_digest(image):
    """SHA-256, in hexadecimal, of one float picture (3, H, W): equal digests are equal bits."""
    return hashlib.sha256(np.ascontiguousarray(image.detach().float().cpu().numpy()).tobytes()).hexdigest()


def read_picture_file(path):
    """Return an 8-bit RGB picture file as (H, W, 3) uint8, or None where there is none."""
    if not path.exists():
        return None
    with Image.open(path) as picture:
        return np.array(picture.convert("RGB"))


class ResultsFolder:
    """One sampling run's output.

    :param folder: the path.
    :param columns: of results.csv.
    :param share: (index, count): which of how many equal shares of the pictures is made here. With one alone results.csv
        itself grows; each of several has a table in shards/, until all pictures are there.
    """

    def __init__(self, folder, columns, share=(0, 1)):
        self.path, self.columns = Path(folder), columns
        self.table = self.path / "results.csv"
        index, count = share
        self.own_table = self.table if count == 1 else self.path / "shards" / f"results_{index}of{count}.csv"

    def claim(self, settings, free=()):
        """Note the settings in the folder, or check that those noted there are the same.

        :param free: names of settings that may differ.
        :raises InputError: the folder holds other results, or files that are not of sampling.
        """
        path = self.path / "settings.json"
        # Before the look for settings.json, which another process may be writing just now, and results.csv after it.
        foreign = [name for name in ("results.csv", "config.json") if (self.path / name).exists()]
        if path.exists():
            self._compare(path, settings, free)
        elif foreign:
            raise InputError(
                f"--results_path {self.path} holds a {foreign[0]} that is not of sampling; choose another folder"
            )
        else:
            self.path.mkdir(parents=True, exist_ok=True)
            self.write_json("settings.json", settings)

    def _compare(self, path, settings, free):
        try:
            earlier = json.loads(path.read_text())
        except ValueError as error:
            raise InputError(f"{path}: no valid JSON ({error}); choose another --results_path") from None
        if not isinstance(earlier, dict):
            raise InputError(f"{path}: expected a JSON object; choose another --results_path")
        # Folders from before these two flags:
        earlier = {"sampler": "ddim" if earlier.get("use_ddim") else "ddpm", "compile": False, **earlier}
        # Through JSON, so that infinity and tuples compare as they were written.
        settings = json.loads(json.dumps(settings))
        for k in settings:
            if k not in free and earlier.get(k) != settings[k]:
                raise InputError(
                    f"--results_path {self.path} holds results with {k} {earlier.get(k)!r}, now {settings[k]!r};"
                    " choose another folder for other settings"
                )

    def file(self, kind, name, ending=".png"):
        """Path of one picture's file of a kind, such as "samples"."""
        return self.path / kind / f"{name}{ending}"

    def shard_tables(self):
        """Paths of the shares' tables, of any number of shares."""
        try:
            names = sorted(os.listdir(self.path / "shards"))
        except FileNotFoundError:
            return []
        return [self.path / "shards" / name for name in names if name.startswith("results_") and name.endswith(".csv")]

    def finished_rows(self, numbers, names, kind="samples", own=False):
        """Return the rows, by picture number, whose pictures are complete: those of all tables.

        :param numbers: path -> picture number. :param names: of the pictures, by number.
        :param own: only those of this share's table.
        """
        # results.csv last: whoever merges writes it before the shares' tables go, so no row is missed in between.
        tables = [self.own_table] if own else [*self.shard_tables(), self.table]
        rows = {}
        for table in tables:
            rows = _read_rows(table, numbers) | rows
        return {k: row for k, row in rows.items() if self.file(kind, names[k]).exists()}

    def write_own(self, rows):
        """Write the rows (number -> dict) of this share's table, in the order of their numbers."""
        self.own_table.parent.mkdir(parents=True, exist_ok=True)
        self.write_table([rows[k] for k in sorted(rows)], self.own_table.relative_to(self.path))

    def tidy(self):
        """Remove the shares' tables, whose rows are in results.csv by now, and what killed processes left half-written.

        Another process may be summing up too: its own temporary files, which are elsewhere, stay.
        """
        shutil.rmtree(self.path / "shards", ignore_errors=True)
        for kind in PICTURE_KINDS:
            for path in (self.path / kind).glob("*.tmp"):
                path.unlink(missing_ok=True)

    def write_table(self, rows, name="results.csv", columns=None):
        """Write rows (dicts) as CSV, whole or not at all."""
        with atomic_write(self.path / name) as f:
            writer = csv.DictWriter(f, columns or self.columns, restval="", extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)

    def write_json(self, name, values):
        """Write a dict as JSON, whole or not at all."""
        with atomic_write(self.path / name) as f:
            f.write(json.dumps(values, indent=1) + "\n")


def share_out(count, size, share):
    """Return the batches (ranges) of a share of pictures 0..count-1.

    Batches of `size` go to the shares in turn; what is in one does not depend on how many shares there are.
    """
    starts = range(share.index * size, count, share.count * size)
    return [range(start, min(start + size, count)) for start in starts]


def is_last(share, count, folders, where, log):
    """Say how one share of several ends; return whether it is the one that puts the tables together.

    :param count: of the share's pictures.
    :param folders: list of (`ResultsFolder`, whether all its pictures are there).
    :param where: the folder to name.
    """
    done = f"share {share.index + 1} of {share.count} is done ({count} pictures)"
    if not all(complete for _, complete in folders):
        log(
            f"{done}; the last share to end sums up in {where}. Should one fail, give the same command again: it does the rest"
        )
        return False
    # Without such tables another share has been through with it. The first one repeats it, as a process alone does.
    if share.index > 0 and not any(results.shard_tables() for results, _ in folders):
        log(f"{done}; the results of all shares are in {where}")
        return False
    log(f"{done}, and so are the others: putting their tables together")
    return True


def _read_rows(table, numbers):
    """Return a table's rows by picture number; none where there is no such table (any more)."""
    try:
        with open(table, newline="") as f:
            return {numbers[row["path"]]: row for row in csv.DictReader(f) if row.get("path") in numbers}
    except FileNotFoundError:
        return {}


def settings_of(values, free, files):
    """Return what a run's settings.json holds.

    :param values: dict of all flags. :param free: flags left out. :param files: flag -> path, stored as an absolute one.
    """
    kept = {k: v for k, v in values.items() if k not in free}
    return kept | {k: where if "://" in where else os.path.abspath(where) for k, where in files.items()}
