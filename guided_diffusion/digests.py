"""SHA-256 of files. What several look at (to choose a checkpoint, to verify it, to name it in messages) is read once."""

import hashlib
import os
import time

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
