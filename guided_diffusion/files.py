"""Files that are there whole or not at all, and the SHA-256 of files."""

import errno
import hashlib
import os
import secrets
import time
from contextlib import contextmanager

from .console import InputError

# What platforms answer where a folder cannot be opened or synchronised; other errors are of the disk, and count.
NO_FOLDER_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF, errno.EACCES, errno.EPERM, errno.EISDIR}


@contextmanager
def atomic_write(path, mode="w"):
    """Open a file for writing under a temporary name; rename it to `path` at the end, or remove it if anything fails.

    After the block the file and its name have reached the disk. Several processes may write the same path: each has a
    temporary name of its own, {path}.{8 hexadecimal digits}.tmp, and the last one to finish wins.

    :param mode: "w" (text, newlines as written) or "wb".
    """
    temporary = f"{path}.{secrets.token_hex(4)}.tmp"
    try:
        with open(temporary, mode.replace("w", "x"), newline=None if "b" in mode else "") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
        sync_folder(os.path.dirname(path) or ".")
    except BaseException as error:
        if os.path.exists(temporary):
            os.remove(temporary)
        if isinstance(error, OSError) and error.errno and error.filename is None:
            error.filename = os.fspath(path)
        raise


def sync_folder(path):
    """Wait until a folder's names have reached the disk, where the platform can."""
    try:
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        if error.errno not in NO_FOLDER_SYNC:
            raise


def check_folder(path, flag):
    """Raise InputError where an output folder's path, or one of its parents, is a file."""
    probe = os.path.abspath(path)
    while not os.path.exists(probe):
        probe = os.path.dirname(probe)
    if not os.path.isdir(probe):
        raise InputError(f"--{flag} {path}: {probe} is a file, not a folder; choose another place")


# -- SHA-256: what several look at (to choose a checkpoint, to verify it, to name it in messages) is read once

CHUNK = 2**20
SETTLED = 2 * 10**9  # nanoseconds after a change from which on a file's time stamps tell the next change for sure

_known = {}  # a file as it stands -> its digest


def digest(path):
    """SHA-256 of a file, as bytes."""
    with open(path, "rb") as f:
        return digest_of(f)


def digest_once(source):
    """SHA-256 of a large file, as bytes; read once in this process, unless it changes.

    A file that changed in the last 2 s is read every time: its time stamps might not tell another change.

    :param source: its path, or the file itself, open for reading bytes; left at an arbitrary position.
    """
    if not hasattr(source, "fileno"):
        with open(source, "rb") as f:
            return digest_once(f)
    before, now = _state(source), time.time_ns()
    if before in _known:
        return _known[before]
    source.seek(0)
    found = digest_of(source)
    if _state(source) == before and now - before[-1] > SETTLED:
        _known[before] = found
    return found


def _state(f):
    # Nobody can set the change time, as one can the modification time: it tells a file put in another's place.
    found = os.fstat(f.fileno())
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def digest_of(f):
    """SHA-256 of what is left to read of an open file, as bytes."""
    found = hashlib.sha256()
    while chunk := f.read(CHUNK):
        found.update(chunk)
    return found.digest()


def file_digest(path):
    """SHA-256 of a file, as bytes; remembered while the file is unchanged."""
    return digest_once(path)
