"""A results folder: settings, a table that grows by whole rows, and pictures under their names."""

import csv
import hashlib
import json
import os
from collections import Counter
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from .errors import InputError
from .files import whole_file


def unique_names(paths):
    """Return a file stem for each path: its own stem, or with as many of its folders as tell equal stems apart."""
    parts = [PurePosixPath(str(path).replace("\\", "/")).with_suffix("").parts for path in paths]
    names = [part[-1] for part in parts]
    for depth in range(2, max(map(len, parts), default=1) + 1):
        counts = Counter(names)
        if max(counts.values(), default=1) == 1:
            break
        names = ["__".join(part[-depth:]).replace("/", "") if counts[name] > 1 else name
                 for name, part in zip(names, parts, strict=True)]  # fmt: skip
    counts = Counter(names)
    return [f"{name}__{k}" if counts[name] > 1 else name for k, name in enumerate(names)]


def digest(path):
    """SHA-256 of a file, as bytes."""
    found = hashlib.sha256()
    with open(path, "rb") as f:
        while chunk := f.read(2**20):
            found.update(chunk)
    return found.digest()


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
    """

    def __init__(self, folder, columns):
        self.path, self.columns = Path(folder), columns
        self.table = self.path / "results.csv"

    def claim(self, settings, free=()):
        """Note the settings in the folder, or check that those noted there are the same.

        :param free: names of settings that may differ.
        :raises InputError: the folder holds other results, or files that are not of sampling.
        """
        path = self.path / "settings.json"
        if path.exists():
            self._compare(path, settings, free)
            return
        for name in ("results.csv", "config.json"):
            if (self.path / name).exists():
                raise InputError(f"--results_path {self.path} holds a {name} that is not of sampling; choose another folder")
        self.path.mkdir(parents=True, exist_ok=True)
        self.write_json("settings.json", settings)

    def _compare(self, path, settings, free):
        try:
            earlier = json.loads(path.read_text())
        except ValueError as error:
            raise InputError(f"{path}: no valid JSON ({error}); choose another --results_path") from None
        if not isinstance(earlier, dict):
            raise InputError(f"{path}: expected a JSON object; choose another --results_path")
        # Through JSON, so that infinity and tuples compare as they were written.
        settings = json.loads(json.dumps(settings))
        for k in settings:
            if k not in free and earlier.get(k) != settings[k]:
                raise InputError(f"--results_path {self.path} holds results with {k} {earlier.get(k)!r}, now {settings[k]!r};"
                                 " choose another folder for other settings")  # fmt: skip

    def file(self, kind, name, ending=".png"):
        """Path of one picture's file of a kind, such as "samples"."""
        return self.path / kind / f"{name}{ending}"

    def finished_rows(self, numbers, names, kind="samples"):
        """Return the rows, by picture number, that an earlier run completed.

        :param numbers: path -> picture number. :param names: of the pictures, by number.
        """
        if not self.table.exists():
            return {}
        with open(self.table, newline="") as f:
            rows = {numbers[row["path"]]: row for row in csv.DictReader(f) if row.get("path") in numbers}
        return {k: row for k, row in rows.items() if self.file(kind, names[k]).exists()}

    def write_table(self, rows, name="results.csv", columns=None):
        """Write rows (dicts) as CSV, whole or not at all."""
        with whole_file(self.path / name) as f:
            writer = csv.DictWriter(f, columns or self.columns, restval="", extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)

    def write_json(self, name, values):
        """Write a dict as JSON, whole or not at all."""
        with whole_file(self.path / name) as f:
            f.write(json.dumps(values, indent=1) + "\n")


def settings_of(values, free, files):
    """Return what a run's settings.json holds.

    :param values: dict of all flags. :param free: flags left out. :param files: flag -> path, stored as an absolute one.
    """
    kept = {k: v for k, v in values.items() if k not in free}
    return kept | {k: where if "://" in where else os.path.abspath(where) for k, where in files.items()}
