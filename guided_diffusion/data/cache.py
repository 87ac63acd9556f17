"""Arrays of scenes in one memory-mapped file, made once, so that no later run decodes and resizes the pictures again.

The file holds the arrays, scene after scene; the times at which their sources last changed (hints, renewed in place); an
index (JSON) of what the arrays were made from; and a footer, by which a file that was cut off is known. It takes its name
when it is whole, so that nobody meets half of one, and of two that are built at once the last one stays.
"""

import fcntl
import glob
import json
import os
import struct
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import blobfile as bf
import numpy as np
from tqdm import tqdm

from ..console import InputError, bar_options, log
from ..files import atomic_write
from . import pictures
from .pairing import is_remote

FOOTER = struct.Struct("<8sQQI")  # MAGIC, where the index begins, its bytes, its CRC-32
MAGIC = b"scenes-1"
ALIGNMENT = 64  # bytes
MOST_THREADS = 8  # that read pictures; beyond, disks and the interpreter are the limit
SHARE = 256  # files that a thread asks for their dates at a time
WAIT_S = 1.0  # between two looks at a lock


class ArrayCache:
    """A cache file that was built: the arrays of every scene, mapped into memory, read when they are asked for.

    :param path: the file.
    :raises InputError: it is not there, cut off or damaged.
    """

    def __init__(self, path):
        self.path = path
        self._map, self._footer, index = _mapped(path)
        self._scenes = index["scenes"]  # [CRC-32, [[name, dtype, shape, offset], ...]] or None
        self._checked = bytearray(len(self._scenes))  # which scenes this process has found whole
        self.recipe, self.files = index["recipe"], index["files"]

    def __getstate__(self):
        # A spawned worker maps the file itself
        return self.__dict__ | {"_map": None, "_checked": bytearray(len(self._scenes)), "recipe": None, "files": None}

    def arrays(self, index):
        """Return a scene's arrays by name, read-only; None where its files could not be read when the cache was built.

        :raises InputError: they are not what was written.
        """
        scene = self._scenes[index]
        if scene is None:
            return None
        if self._map is None:
            self._map, footer, _ = _mapped(self.path)
            if footer != self._footer:
                raise InputError(f"{self.path} was built anew while this run was using it; start the run again")
        crc, fields = scene
        arrays = {name: np.ndarray(shape, dtype, self._map, offset) for name, dtype, shape, offset in fields}
        if not self._checked[index]:
            if _crc(arrays.values()) != crc:
                raise InputError(
                    f"{self.path} is damaged (scene {index + 1}); delete it, and the next run builds it anew"
                )
            self._checked[index] = 1
        return arrays

    @property
    def left_out(self):
        """How many scenes are not in it, because their files could not be read."""
        return self._scenes.count(None)

    # -- is it still what the sources hold? -------------------------------------------------------------------------------

    def problem(self, recipe, names, paths):
        """Say why the arrays are not those of these sources, "" if they are (see `open_cache`).

        Sizes and times of change are compared; where a time differs, the contents, and then the time is noted.
        """
        if self.recipe != recipe:
            other = [name for name in recipe if self.recipe.get(name) != recipe[name]]
            return f"it was made with another {', '.join(other) or 'recipe'}"
        if [[name for name, _, _ in files] for files in self.files] != names:
            return "the list of files has changed"
        flat = [path for files in paths for path in files]
        noted = [file for files in self.files for file in files]
        times = np.array(self._times())
        touched, parts = [], [flat[k : k + SHARE] for k in range(0, len(flat), SHARE)]
        facts = (each for part in _in_threads(lambda part: [*map(_facts, part)], parts) for each in part)
        for k, (size, changed) in enumerate(facts):
            if size != noted[k][1]:
                return f"{flat[k]} has changed"
            if changed != times[k]:
                times[k] = changed
                touched.append(k)
        if touched:
            log(f"{self.path}: {len(touched)} of its {len(flat)} source files have new dates; comparing their contents")
        digests = _in_threads(_digest, [flat[k] for k in touched])
        for k, digest in zip(touched, _bar(digests, len(touched), "compared", "file"), strict=True):
            if digest != noted[k][2]:
                return f"{flat[k]} has changed"
        if touched:
            self._note(times)
        return ""

    def _place(self):
        """Where in the file the times are, and their number."""
        count = sum(map(len, self.files))
        return FOOTER.unpack(self._footer)[1] - 8 * count, count

    def _times(self):
        start, count = self._place()
        return self._map[start : start + 8 * count].view("<i8").copy()

    def _note(self, times):
        # Outside what the CRCs cover: a time that is lost or torn costs a look at the contents, no more
        with suppress(OSError), open(self.path, "r+b") as f:
            f.seek(-FOOTER.size, os.SEEK_END)
            if f.read() == self._footer:  # still the same file
                f.seek(self._place()[0])
                f.write(times.tobytes())


def open_cache(path, recipe, root, sources, read):
    """Open the cache of these scenes; build it first where it is missing, damaged or of other contents.

    Several processes may come at once: one builds, the others wait. One that dies leaves the lock to the next.

    :param path: the cache file; its folder is made.
    :param recipe: dict of what else decides the arrays, as JSON can hold it.
    :param root: folder of the sources; they are known by their paths below it, so that it may move.
    :param sources: for each scene, the paths of the files that its arrays are made from.
    :param read: function of a scene's number -> dict of arrays (InputError: it stays out of the cache).
    :return: `ArrayCache`.
    :raises InputError: the cache cannot be written.
    """
    root = f"{os.fspath(root).rstrip('/')}/"
    names = [[_below(root, file) for file in files] for files in sources]
    if cache := _usable(path, recipe, names, sources):
        return cache
    folder = os.path.dirname(path)
    try:
        os.makedirs(folder, exist_ok=True)
        with _lock(path) as locked:
            if cache := _usable(path, recipe, names, sources, tell=True):  # another process has built it
                return cache
            for left in glob.glob(f"{glob.escape(path)}.*.tmp") if locked else ():  # by builders that were killed
                os.remove(left)
            log(f"building the cache {path} of {len(sources)} scenes; later runs find it there")
            _build(path, recipe, names, sources, read)
    except OSError as error:
        raise InputError(
            f"--cache_dir {folder}: the cache cannot be written ({error.strerror or error}); make room, or name another folder"
        ) from error
    cache = ArrayCache(path)
    cache.files = None
    size = os.path.getsize(path) / 1e6
    bad = f"; {cache.left_out} of its scenes could not be read and are not in it" if cache.left_out else ""
    log(f"built the cache {path}: {size:.1f} MB{bad}")
    return cache


def _usable(path, recipe, names, paths, tell=False):
    """Return the `ArrayCache` at `path` if it is there and good, else None."""
    if not os.path.exists(path):
        return None
    try:
        cache = ArrayCache(path)
        why = cache.problem(recipe, names, paths)
    except InputError as error:
        why = str(error)
    if not why:
        cache.files = None  # the bulk of the index, and of no more use
        return cache
    if tell:
        log(f"making the cache anew: {why}")
    return None


# -- the file ---------------------------------------------------------------------------------------------------------


def _build(path, recipe, names, paths, read):
    def make(index):
        # Facts first: a file that changes meanwhile has another date or digest at the next look
        facts = [(*_facts(file), _digest(file)) for file in paths[index]]
        try:
            return facts, read(index)
        except InputError:
            return facts, None

    scenes, files, times = [], [], []
    with atomic_write(path, "wb") as f:
        found = _in_threads(make, range(len(paths)))
        for below, (facts, arrays) in zip(names, _bar(found, len(paths), "cache", "scene"), strict=True):
            scenes.append(None if arrays is None else _written(f, arrays))
            files.append([[name, size, digest] for name, (size, _, digest) in zip(below, facts, strict=True)])
            times += [changed for _, changed, _ in facts]
        _align(f)  # times are read as words
        f.write(np.array(times, "<i8").tobytes())
        start = f.tell()
        index = json.dumps({"recipe": recipe, "files": files, "scenes": scenes}).encode()
        f.write(index)
        f.write(FOOTER.pack(MAGIC, start, len(index), zlib.crc32(index)))


def _written(f, arrays):
    """Write arrays; return how the index notes them."""
    fields, arrays = [], {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    for name, array in arrays.items():
        fields.append([name, array.dtype.str, array.shape, _align(f)])
        f.write(array.data)
    return [_crc(arrays.values()), fields]


def _align(f):
    f.write(bytes(-f.tell() % ALIGNMENT))
    return f.tell()


def _crc(arrays):
    crc = 0
    for array in arrays:
        crc = zlib.crc32(array.data, crc)
    return crc


def _mapped(path):
    """Map a cache file; return its bytes (uint8 array), its footer and its index."""
    damaged = InputError(f"{path} is damaged or cut off")
    try:
        with open(path, "rb") as f:
            size = f.seek(0, os.SEEK_END)
            if size < FOOTER.size:
                raise damaged
            f.seek(size - FOOTER.size)
            footer = f.read(FOOTER.size)
            magic, start, length, crc = FOOTER.unpack(footer)
            if magic != MAGIC or start + length + FOOTER.size != size:
                raise damaged
            f.seek(start)
            index = f.read(length)
            if zlib.crc32(index) != crc:
                raise damaged
            return (
                np.memmap(f, np.uint8, "r"),
                footer,
                json.loads(index),
            )  # of the file opened, whatever has its name later
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror or error}); check the folder of --cache_dir"
        ) from error


# -- other processes, and threads -------------------------------------------------------------------------------------


@contextmanager
def _lock(path):
    """Hold the lock file of a cache; yields False where the file system has no locks (two builders are harmless)."""
    with open(f"{path}.lock", "a") as f:
        waited = 0
        while True:
            try:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system frees it when its process dies
                locked = True
            except BlockingIOError:
                if not waited:
                    log(f"waiting for another process, which is building the cache {path}")
                waited += 1
                time.sleep(WAIT_S)
                continue
            except OSError:
                locked = False
            break
        yield locked


def _in_threads(function, items):
    """Yield the function of each item, in order, worked out in threads a few ahead."""
    threads = min(
        MOST_THREADS, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    with ThreadPoolExecutor(threads) as pool:
        ahead = []
        for item in items:
            ahead.append(pool.submit(function, item))
            if len(ahead) > 2 * threads:
                yield ahead.pop(0).result()
        for future in ahead:
            yield future.result()


def _bar(found, count, what, unit):
    return tqdm(found, desc=what, total=count, unit=unit, disable=not count, **bar_options())


def _below(root, path):
    # Paths mostly begin with their root as it was given; the other way takes ten times as long
    return path[len(root) :] if path.startswith(root) else os.path.relpath(path, root)


def _facts(path):
    """Return (bytes, time of the last change in ns) of a source file; (-1, 0) where it cannot be asked."""
    try:
        if is_remote(path):
            found = bf.stat(path)
            return found.size, int(found.mtime * 1e9)
        found = os.stat(path)
        return found.st_size, found.st_mtime_ns
    except (OSError, bf.Error):
        return -1, 0


def _digest(path):
    """SHA-256 of a source file in hexadecimal, "" where it cannot be read."""
    try:
        with pictures._opened(path):
            return ""
    except InputError:
        return ""
