"""Files that are there whole or not at all."""

import os
from contextlib import contextmanager

from .errors import InputError


@contextmanager
def whole_file(path, mode="w"):
    """Open a file for writing under a temporary name; rename it to `path` at the end, or remove it if anything fails.

    :param mode: "w" (text, newlines as written) or "wb".
    """
    temporary = f"{path}.tmp"
    try:
        with open(temporary, mode, newline=None if "b" in mode else "") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.remove(temporary)
        raise


def check_folder(path, flag):
    """Raise InputError where an output folder's path, or one of its parents, is a file."""
    probe = os.path.abspath(path)
    while not os.path.exists(probe):
        probe = os.path.dirname(probe)
    if not os.path.isdir(probe):
        raise InputError(f"--{flag} {path}: {probe} is a file, not a folder; choose another place")
