"""Atomic writes, output folders, archives of weights, and the SHA-256 of files."""

import functools
import hashlib
import os
import secrets
import zipfile
from contextlib import contextmanager, suppress
from pathlib import Path

from .console import InputError

WEIGHTS, CONFIG = "weights.pt", "config.json"  # of an archive that docs/export_weights.py writes


@contextmanager
def atomic_write(path, mode="w"):
    """Open a file for writing under a temporary name; rename it to `path` at the end, or remove it if anything fails.

    After the block the file and its name have reached the disk. Temporary names, {path}.{8 hexadecimal digits}.tmp, are
    each writer's own: of several processes the last to finish wins.

    :param mode: "w" (text, newlines as written) or "wb".
    """
    temporary = f"{path}.{secrets.token_hex(4)}.tmp"
    try:
        with open(temporary, mode.replace("w", "x"), newline=None if "b" in mode else "") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
        with suppress(OSError):  # some platforms and network file systems refuse to synchronise a folder
            folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except BaseException as error:
        if os.path.exists(temporary):
            os.remove(temporary)
        if isinstance(error, OSError) and error.errno and error.filename is None:
            error.filename = os.fspath(path)
        raise


def check_folder(path, flag):
    """Raise InputError where an output folder's path, or one of its parents, is a file or may not be written."""
    probe = os.path.abspath(path)
    while not os.path.exists(probe):
        probe = os.path.dirname(probe)
    if not os.path.isdir(probe):
        raise InputError(f"--{flag} {path}: {probe} is a file, not a folder; choose another place")
    if not os.access(probe, os.W_OK):
        raise InputError(f"--{flag} {path}: no right to write in {probe}; choose another place")


def is_archive(path):
    """Tell whether a path is that of an archive of weights, by its ending."""
    return Path(path).suffix == ".zip"


def read_archive(path, name):
    """Return the bytes of one file of an archive, checked by its CRC-32. Raises InputError, which does not name it."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.read(name)
    except KeyError:
        raise InputError(f"the archive has no {name}; write it by docs/export_weights.py") from None
    except Exception as error:  # damaged files raise many kinds
        raise InputError(f"no whole zip archive: {error}") from None


def file_digest(path):
    """SHA-256, as bytes, of a file, or of an archive's weights; read once in this process, unless the file changes."""
    s = os.stat(path)
    return _digest(os.fspath(path), s.st_ino, s.st_size, s.st_ctime_ns)  # nobody can set the change time


@functools.cache
def _digest(path, *state):
    if is_archive(path):
        return hashlib.sha256(read_archive(path, WEIGHTS)).digest()
    found = hashlib.sha256()
    with open(path, "rb") as f:
        while chunk := f.read(2**20):
            found.update(chunk)
    return found.digest()
