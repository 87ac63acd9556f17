"""Manifests: what a checkpoint's files must be, so that a torn or corrupted one is recognised.

manifest{step}.json is written last and holds {"step", "files": {name: {"bytes", "sha256"}}, what the run noted, "sha256"};
its own "sha256" is that of the text without it.
"""

import hashlib
import json
import re
from pathlib import Path

from ..console import InputError
from ..files import digest_once

PARTS = ("model", "opt", "state")  # and ema_{rate}_, one or more
MAX_BYTES = 2**24  # a manifest has some kilobytes; more is no manifest, and not read
UNFINISHED = "its save was cut short"
STEP_FILE = re.compile(r"(model|opt|state|manifest)(\d{6,})\.(pt|json)")
EMA_FILE = re.compile(r"ema_((?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)_(\d{6,})\.pt")
WEIGHTS_FILE = re.compile(r"(?:model|ema_.+_)(\d{6,})\.pt")


def file_name(kind, step):
    """Return the file name of one part, such as file_name("opt", 12) -> "opt000012.pt"."""
    return f"{kind}{step:06d}.pt"


def manifest_name(step):
    """Return the file name of a step's manifest."""
    return f"manifest{step:06d}.json"


class HashedWriter:
    """A file to write to in sequence, that knows size and digest of what it was given.

    `error` is the OSError of a write that failed, or None: torch reports such errors as others.
    """

    def __init__(self, f):
        self._file, self._hash, self._bytes, self.error = f, hashlib.sha256(), 0, None

    def write(self, data):
        self._hash.update(data)
        self._bytes += len(data)
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self):
        self._file.flush()

    def entry(self):
        """Return the manifest's entry of the file."""
        return {"bytes": self._bytes, "sha256": self._hash.hexdigest()}


def manifest_text(step, entries, facts=None):
    """Return the text of a manifest.

    :param entries: dict from file name to {"bytes", "sha256"}.
    :param facts: what else to note, a dict that JSON can hold.
    """
    return _sealed(json.loads(_plain({"step": step, "files": entries, **(facts or {})})))


def unfinished_text(step):
    """Return the text of a manifest that stands in while a save gives its files their names."""
    return manifest_text(step, {}, {"unfinished": True})


def _plain(contents):
    return json.dumps(contents, indent=1)


def _sealed(contents):
    seal = hashlib.sha256(_plain(contents).encode()).hexdigest()
    return _plain({**contents, "sha256": seal}) + "\n"


def read_manifest(directory, step):
    """Return the contents of a step's manifest, or None where it has none.

    :raises InputError: the manifest cannot be read, or is not as it was written.
    """
    contents, problem = _look_into(directory, step)
    if problem:
        raise InputError(f"{Path(directory) / manifest_name(step)}: {problem}; use another checkpoint")
    return contents


def _look_into(directory, step):
    """Return a manifest's contents, or None, and what is wrong with it, or ""."""
    try:
        with open(Path(directory) / manifest_name(step), "rb") as f:
            raw = f.read(MAX_BYTES)
        contents = json.loads(raw)
        del contents["sha256"]
        if raw != _sealed(contents).encode() or contents["step"] != step:
            raise ValueError("it is not as it was written")
        for name, entry in contents["files"].items():
            if Path(name).name != name or not isinstance(entry["bytes"], int) or len(entry["sha256"]) != 64:
                raise ValueError(f"its entry {name!r} makes no sense")
        return contents, ""
    except FileNotFoundError:
        return None, ""
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return None, f"the manifest cannot be read ({str(error)[:100] or type(error).__name__})"


def contents_problem(f, name, entry, digests=True):
    """Say how an open file differs from its manifest's entry, "" if it does not.

    :param f: the file, open for reading bytes; left at an arbitrary position.
    :param digests: compare the SHA-256 too, not just the size.
    """
    size = f.seek(0, 2)
    if size != entry["bytes"]:
        return f"{name} has {size:,} bytes, the manifest says {entry['bytes']:,}"
    if digests and digest_once(f).hex() != entry["sha256"]:
        return f"{name} differs from its SHA-256"
    return ""


def file_problem(path, entry, digests=True):
    """Say what is wrong with a file that a manifest lists, "" if nothing is."""
    path = Path(path)
    try:
        with open(path, "rb") as f:
            return contents_problem(f, path.name, entry, digests)
    except FileNotFoundError:
        return f"{path.name} is missing"
    except OSError as error:
        return f"{path.name} cannot be read ({error.strerror or error})"


def saved_steps(directory, kinds=(*PARTS, "manifest")):
    """Return the set of steps of which a folder holds a file of one of the `kinds`."""
    found = (STEP_FILE.fullmatch(path.name) for path in Path(directory).glob("*"))
    return {
        int(match[2])
        for match in found
        if match and match[1] in kinds and (match[3] == "json") == (match[1] == "manifest")
    }


def predates_manifests(directory, step):
    """Whether a step without a manifest was saved by a version that wrote none: no step up to it has one.

    Otherwise its save was cut short, for the manifest is written last.
    """
    return not any(other <= step for other in saved_steps(directory, ["manifest"]))


def problem_of(directory, step, ema_rates=None, digests=True):
    """Say what keeps a checkpoint from being whole, such as "state000004.pt is missing"; "" if it is whole.

    :param ema_rates: the averages it must have, as texts; None: those its manifest lists.
    :param digests: read all of every file, and compare its SHA-256; False looks at sizes alone.
    """
    directory = Path(directory)
    needed = [file_name(kind, step) for kind in (*PARTS, *(f"ema_{rate}_" for rate in ema_rates or ()))]
    manifest, problem = _look_into(directory, step)
    if problem:
        return problem
    if manifest is None:
        lost = [name for name in needed if not (directory / name).exists()]
        if lost:
            return f"{lost[0]} is missing"
        return "" if predates_manifests(directory, step) else f"it has no manifest: {UNFINISHED}"
    if manifest.get("unfinished"):
        return UNFINISHED
    unlisted = [name for name in needed if name not in manifest["files"]]
    if unlisted:
        return f"the manifest lists no {unlisted[0]}"
    looks = [False, True] if digests else [False]  # sizes first: they cost nothing
    problems = (
        file_problem(directory / name, entry, thorough)
        for thorough in looks
        for name, entry in manifest["files"].items()
    )
    return next((problem for problem in problems if problem), "")


def weights_entry(path):
    """Return the manifest's entry of a weights file, or None where no manifest beside it lists it.

    :raises InputError: the manifest cannot be read.
    """
    manifest = _manifest_beside(path)
    return None if manifest is None else manifest["files"].get(Path(path).name)


def noted_config(path):
    """Return the flags of the run that saved a weights file, from the manifest beside it; {} where there is none.

    :raises InputError: the manifest cannot be read.
    """
    manifest = _manifest_beside(path) or {}
    return manifest.get("config") or {}


def _manifest_beside(path):
    match = WEIGHTS_FILE.fullmatch(Path(path).name)
    return read_manifest(Path(path).parent, int(match[1])) if match else None
