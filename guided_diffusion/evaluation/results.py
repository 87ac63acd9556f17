"""A results folder: settings, one row file per finished picture, and pictures under their names.

Several processes may work in one folder, each on its share: a picture is done when its row and its picture are there.
"""

import csv
import hashlib
import json
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image

from ..console import InputError
from ..files import atomic_write


def unique_names(paths, taken=()):
    """Return a file stem for each path: its own, or with as many of its folders as tell it from others, and `taken`."""
    parts = [Path(path).with_suffix("").parts for path in paths]
    names = [part[-1] for part in parts]
    for depth in range(2, max(map(len, parts), default=1) + 1):
        counts = Counter([*names, *taken])
        pairs = zip(names, parts, strict=True)
        names = [name if counts[name] == 1 else "__".join(part[-depth:]).replace("/", "") for name, part in pairs]
    counts = Counter([*names, *taken])
    return [f"{name}__{k}" if counts[name] > 1 else name for k, name in enumerate(names)]


def picture_digest(image):
    """SHA-256, in hexadecimal, of one float picture (3, H, W): equal digests are equal bits."""
    return hashlib.sha256(image.float().cpu().numpy().tobytes()).hexdigest()


class ResultsFolder:
    """One sampling run's output."""

    def __init__(self, folder):
        self.path = Path(folder)

    def claim(self, settings):
        """Note the settings in the folder; InputError where it holds other ones, or files that are not of sampling."""
        path, found = self.path / "settings.json", f"--results_path {self.path} holds"
        # Looked for before settings.json, which another process may be writing just now.
        foreign = [name for name in ("results.csv", "config.json") if (self.path / name).exists()]
        if path.exists():
            earlier = json.loads(path.read_text())
            for name, value in json.loads(json.dumps(settings)).items():  # infinity and tuples as they were written
                if earlier.get(name) != value:
                    found += f" results with {name} {earlier.get(name)!r}, now {value!r}"
                    raise InputError(f"{found}; choose another folder")
        elif foreign:
            raise InputError(f"{found} a {foreign[0]} that is not of sampling; choose another folder")
        else:
            self.write_json("settings.json", settings)

    def file(self, kind, name, ending=".png"):
        """Path of one picture's file of a kind, such as "samples"."""
        return self.path / kind / f"{name}{ending}"

    def pixels(self, kind, name):
        """Return a picture's file as uint8: (H, W, 3), or the ids (H, W) of a label map; None where there is none."""
        path = self.file(kind, name)
        return np.array(Image.open(path)) if path.exists() else None

    def finished_row(self, name, kind):
        """Return a picture's row (a dict); None where the row, or its picture of a kind (if it had one), is missing."""
        path = self.file("rows", name, ".json")
        row = json.loads(path.read_text()) if path.exists() else {}
        lost = "picture_sha256" in row and not self.file(kind, name).exists()
        return None if lost else row or None

    def digests(self):
        """Return {name: picture_sha256} of results.csv."""
        digests = {}
        with suppress(OSError, ValueError, KeyError), open(self.path / "results.csv", newline="") as f:
            digests = {row["name"]: row["picture_sha256"] for row in csv.DictReader(f)}
        if not digests:
            hint = "name the --results_path of --role transmit"
            raise InputError(f"--verify {self.path}: no results.csv with picture_sha256 there; {hint}")
        return digests

    def write_row(self, row):
        """Write the row of a picture whose files are all there: with it, the picture is done."""
        self.write_json(f"rows/{row['name']}.json", row)

    def write_table(self, name, columns, rows):
        """Write rows (dicts) as CSV, whole or not at all."""
        with atomic_write(self.path / name) as f:
            writer = csv.DictWriter(f, columns, restval="", extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)

    def write_json(self, name, values):
        """Write a dict as JSON, whole or not at all."""
        self.write_bytes(self.path / name, (json.dumps(values, indent=1) + "\n").encode())

    def write_bytes(self, path, data):
        """Write a file of the folder, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path, "wb") as f:
            f.write(data)

    def remove_leftovers(self):
        """Remove what killed processes left half-written of pictures and rows."""
        for path in self.path.glob("*/*.tmp"):
            path.unlink(missing_ok=True)


def share_out(count, size, share):
    """Return the batches (ranges) of a share of pictures 0..count-1.

    Batches of `size` go to the shares in turn; what is in one does not depend on how many shares there are.
    """
    batches = [range(start, min(start + size, count)) for start in range(0, count, size)]
    return batches[share.index :: share.count]
