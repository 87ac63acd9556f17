"""A look at a file of torch.save before torch reads it.

torch.load(weights_only=True) runs no code, but it takes whatever memory a file asks for (`bytearray(10**12)`, compressed
entries, tensors larger than their storage) and trusts the sizes of storages. Here a file's pickle is followed, opcode by
opcode, without making what it describes; only what state dicts, optimizer states and plain containers need is let through.
"""

import functools
import io
import mmap
import pickletools
import struct
import zipfile
from dataclasses import dataclass, field
from typing import NamedTuple

MAX_PICKLE = 2**24  # bytes of description; a model of 1,000 tensors needs a tenth of a million
MAX_OPCODES = 1_000_000  # each may stand for some hundred bytes of memory; an optimizer of 1,000 tensors has 75,000
MAX_DEPTH = 50  # containers in one another
LEGACY_START = [0x1950A86A20F9469CFC6C, 1001]  # magic number and version of torch's format before 1.6
STORAGES = {
    "DoubleStorage": 8,
    "FloatStorage": 4,
    "HalfStorage": 2,
    "BFloat16Storage": 2,
    "LongStorage": 8,
    "IntStorage": 4,
    "ShortStorage": 2,
    "CharStorage": 1,
    "ByteStorage": 1,
    "BoolStorage": 1,
    "ComplexFloatStorage": 8,
    "ComplexDoubleStorage": 16,
}  # bytes per element
TENSOR, PARAMETER = "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter"
CONTAINERS = {"collections OrderedDict", "builtins set", "__builtin__ set", "torch Size"}


@functools.cache
def _names():
    """Return what a pickle may import. torch is imported late: a checkpoint is looked for before it is needed."""
    import torch

    dtypes = (name for name, value in vars(torch).items() if isinstance(value, torch.dtype))
    return {TENSOR, PARAMETER, "torch device", *CONTAINERS, *(f"torch {name}" for name in (*STORAGES, *dtypes))}


def check_contents(f):
    """Check that a file holds plain tensors and containers, and no more of them than its bytes.

    :param f: a file on disk, open for reading bytes; left at an arbitrary position.
    :raises ValueError: with the reason. Other exceptions may come from files that make no sense at all.
    """
    f.seek(0)
    if f.read(4) == b"PK\3\4":  # how torch tells its formats apart
        _check_zip(f)
    else:
        _check_legacy(f)


# -- the zip format ---------------------------------------------------------------------------------------------------


def _check_zip(f):
    _check_directory(f)
    with zipfile.ZipFile(f) as archive:
        infos = archive.infolist()
        names = {info.orig_filename.lower() for info in infos}
        if len(names) < len(infos) or any(info.orig_filename != info.filename for info in infos):
            raise ValueError("its entries' names are ambiguous")
        packed = [info.filename for info in infos if info.compress_type or info.compress_size != info.file_size]
        if packed:
            raise ValueError(f"its entry {packed[0]} is compressed, which torch never does")
        if sum(info.file_size for info in infos) > f.seek(0, 2):
            raise ValueError("its entries are larger than the file")
        folder = infos[0].filename.split("/")[0] if infos else ""
        sizes = {info.filename: info.file_size for info in infos}
        if sizes.get(f"{folder}/data.pkl", MAX_PICKLE + 1) > MAX_PICKLE:
            raise ValueError(f"it has no data.pkl of at most {MAX_PICKLE:,} bytes")

        def check_storage(key, count, item):
            size = sizes.get(f"{folder}/data/{key}")
            if size != count * item:
                raise ValueError(f"storage {key} is said to have {count * item:,} bytes, and has {size or 0:,}")

        _Reading(check_storage).follow(io.BytesIO(archive.read(f"{folder}/data.pkl")))


def _check_directory(f):
    """Check that a zip file ends with its directory, so that every reader finds the same one."""
    size = f.seek(0, 2)
    f.seek(max(0, size - 98))
    tail = f.read(98).rjust(98, b"\0")
    end, locator, end64 = tail[-22:], tail[-42:-22], tail[:56]
    if end[:4] != b"PK\5\6" or end[-2:] != b"\0\0":
        raise ValueError("its end is missing: cut short?")
    length, start, behind = *struct.unpack("<II", end[12:20]), size - 22
    if locator[:4] == b"PK\6\7":
        length, start, behind = *struct.unpack("<QQ", end64[40:56]), size - 98
        if end64[:4] != b"PK\6\6" or struct.unpack("<Q", locator[8:16])[0] != behind:
            raise ValueError("its directory is out of place")
    if start + length != behind or length > MAX_PICKLE:
        raise ValueError("its directory is out of place, or larger than any checkpoint's")


# -- the format before torch 1.6 --------------------------------------------------------------------------------------


def _check_legacy(f):
    storages = {}

    def note_storage(key, count, item):
        if storages.setdefault(key, (count, item)) != (count, item):
            raise ValueError(f"storage {key} has two sizes")

    with mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
        reading = _Reading(note_storage)
        if [reading.follow(data), reading.follow(data)] != LEGACY_START:
            raise ValueError("torch.save did not write it")
        reading.follow(data)  # what machine it was
        reading.follow(data)
        keys = reading.follow(data)
        if not isinstance(keys, _Container) or sorted(keys.items) != sorted(storages):
            raise ValueError("its list of storages does not fit its tensors")
        for key in keys.items:
            count, item = storages[key]
            header = data.read(8)
            if header != struct.pack("<q", count) or data.tell() + count * item > len(data):
                raise ValueError(f"storage {key} is said to have {count * item:,} bytes, which the file does not hold")
            data.seek(count * item, 1)


# -- pickles ----------------------------------------------------------------------------------------------------------


class _Name(NamedTuple):
    """Something that a pickle imports."""

    name: str


class _Storage(NamedTuple):
    count: int


class _Tensor(NamedTuple):
    """Stands for any tensor or parameter."""


@dataclass(eq=False)
class _Container:
    """A list, dict or set as it grows; `depth` counts containers in one another."""

    items: list = field(default_factory=list)
    depth: int = 1
    used: bool = False  # within another one, or named again: what is read by rule no longer grows

    def add(self, items):
        if self.used:
            raise ValueError("a container grows after its use")
        self.items += items
        self.depth = 1 + max(_deepest(items), self.depth - 1)
        if self.depth > MAX_DEPTH:
            raise ValueError(f"more than {MAX_DEPTH} containers in one another")


class _Tuple(tuple):
    """A tuple of followed values."""

    depth = 1


def _deepest(items):
    for item in items:
        if isinstance(item, _Container):
            item.used = True
    return max((getattr(item, "depth", 0) for item in items), default=0)


class _Reading:
    """Follows pickles, keeping numbers, texts and shapes, and making nothing else.

    :param check_storage: function (key, elements, bytes per element) called for each storage that a pickle asks for.
    """

    def __init__(self, check_storage):
        self.check_storage, self.opcodes = check_storage, 0

    def follow(self, f):
        """Read one pickle and return what stands for its value."""
        self.stack, self.marks, self.memo = [], [], {}
        try:
            for opcode, argument, _ in pickletools.genops(f):
                self._step(opcode.name, argument)
            return self.stack.pop()
        except (IndexError, KeyError, TypeError, AttributeError):  # nothing there, or a thing of another kind
            raise ValueError("its pickle is broken") from None

    def _step(self, name, argument):
        self.opcodes += 1
        if self.opcodes > MAX_OPCODES:
            raise ValueError(f"it describes more than {MAX_OPCODES:,} things")
        action = getattr(self, f"_{name.lower()}", None)
        if action is None:
            raise ValueError(f"its pickle uses {name}, which checkpoints do not need")
        action(argument)

    def _proto(self, version):
        pass

    _stop = _proto

    # -- plain values

    def _push(self, value):
        self.stack.append(value)

    _binint = _binint1 = _binint2 = _long1 = _binfloat = _binunicode = _none = _push

    def _newtrue(self, _):
        self._push(True)

    def _newfalse(self, _):
        self._push(False)

    def _global(self, name):
        if name not in _names():
            raise ValueError(f"it asks for {name.replace(' ', '.')[:80]}, which is no part of plain tensors")
        self._push(_Name(name))

    def _binput(self, key):
        self.memo[key] = self.stack[-1]

    def _binget(self, key):
        value = self.memo[key]
        if isinstance(value, _Container):
            value.used = True
        self._push(value)

    _long_binput, _long_binget = _binput, _binget

    # -- containers

    def _mark(self, _):
        self.marks.append(len(self.stack))

    def _take(self, start):
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def _empty_list(self, _):
        self._push(_Container())

    _empty_dict = _empty_set = _empty_list

    def _grow(self, start):
        items = self._take(start)
        if not isinstance(self.stack[-1], _Container):
            raise ValueError("its pickle is broken")
        self.stack[-1].add(items)

    def _append(self, _):
        self._grow(len(self.stack) - 1)

    def _setitem(self, _):
        self._grow(len(self.stack) - 2)

    def _appends(self, _):
        self._grow(self.marks.pop())

    _setitems, _build = _appends, _append

    def _make_tuple(self, start):
        items = _Tuple(self._take(start))
        items.depth = 1 + _deepest(items)
        if items.depth > MAX_DEPTH:
            raise ValueError(f"more than {MAX_DEPTH} containers in one another")
        self._push(items)

    def _empty_tuple(self, _):
        self._push(_Tuple())

    def _tuple1(self, _):
        self._make_tuple(len(self.stack) - 1)

    def _tuple2(self, _):
        self._make_tuple(len(self.stack) - 2)

    def _tuple3(self, _):
        self._make_tuple(len(self.stack) - 3)

    def _tuple(self, _):
        self._make_tuple(self.marks.pop())

    # -- storages and tensors

    def _binpersid(self, _):
        kind, storage, key, _, count, *view = self.stack.pop()
        item = STORAGES.get(storage.name.removeprefix("torch "))
        if kind != "storage" or item is None or not _is_size(count) or any(part is not None for part in view):
            raise ValueError("it has a storage of an unknown kind")
        self.check_storage(key, count, item)
        self._push(_Storage(count))

    def _reduce(self, _):
        function, arguments = self._take(len(self.stack) - 2)
        if not isinstance(function, _Name) or not isinstance(arguments, _Tuple):
            raise ValueError("its pickle is broken")
        if function.name == TENSOR:
            self._push(_tensor(*arguments))
        elif function.name == PARAMETER and isinstance(arguments[0], _Tensor):
            self._push(_Tensor())
        elif function.name in CONTAINERS:
            self._push(_Container())
            self.stack[-1].add(arguments)
        elif function.name == "torch device":
            self._push(None)
        else:
            raise ValueError(f"it calls {function.name.replace(' ', '.')}")


def _is_size(number):
    return type(number) is int and 0 <= number < 2**63


def _tensor(storage, offset, size, stride, *_):
    """Check that a tensor lies within its storage; torch would let the storage grow."""
    if not isinstance(storage, _Storage) or not isinstance(size, tuple) or not isinstance(stride, tuple):
        raise ValueError("it has a tensor without storage or size")
    if len(size) != len(stride) or len(size) > 64 or not all(map(_is_size, (offset, *size, *stride))):
        raise ValueError("it has a tensor whose size makes no sense")
    count = 1
    for n in size:
        count *= n
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if count > storage.count or (count and last >= storage.count):
        raise ValueError(f"it has a tensor of {count:,} elements in a storage of {storage.count:,}")
    return _Tensor()
