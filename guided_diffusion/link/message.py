"""The message: all that crosses the air for one picture, and nothing else.

Four parts: header, labels, edges (boundaries within classes and image edges), indices (noise choices). Each ends in a CRC-32
and can be lost alone; a part with nothing to say is no bytes at all. The CRC of a part goes on from the header's, so that
parts of two messages do not pass as one. Weights and noise bank are shared knowledge, named by fingerprint and seed.
"""

import functools
import re
import struct
import zlib
from dataclasses import dataclass

import numpy as np

from ..console import InputError
from . import source_coding
from .source_coding import MissingPlugin, decode_map, encode_map, pack_choices, unpack_choices

VERSION = 1
PARTS = ("header", "labels", "edges", "indices")
CRC_BYTES = 4
_MAGIC = b"DG"
_FIELDS = struct.Struct("<2sB HHH BBB qI Hff HHHHH 8s 3s3s3s")
HEADER_BYTES = _FIELDS.size + CRC_BYTES

# Fields of the flag byte: the bits of each value
_FLAGS = (
    ("one_hot", {False: 0, True: 1}),
    ("edge_plane", {False: 0, True: 2}),
    ("boundaries", {False: 0, True: 4}),
    ("clip_denoised", {False: 0, True: 8}),
    ("start_sent", {False: 0, True: 16}),
    ("method", {"ddpm": 0, "ddim": 32, "dpm++": 128}),
    ("step_variance", {"model": 0, "posterior": 64}),
)
# Fields of two bits each
_CHOICES = (("label_scale", (1, 2, 4, 8)), ("edge_scale", (1, 2, 4, 8)), ("precision", ("fp32", "bf16", "fp16")))
_STEPS = ("", "{}", "ddim{}", "logsnr{}")
_RANGES = (
    ("height", 1, source_coding.MAX_SIDE),
    ("width", 1, source_coding.MAX_SIDE),
    ("num_classes", 1, 256),
    ("edge_levels", 0, 256),
    ("bank_seed", -(2**63), 2**63 - 1),
    ("bank_size", 1, 2**32 - 1),
    ("eta", 0, 1),
    ("s", 1, 1e6),
    ("stop_step", 0, 2**16 - 1),
    ("selected_steps", 0, 2**16 - 1),
    ("step_candidates", 0, source_coding.MAX_CANDIDATES),
    ("step_atoms", 0, source_coding.MAX_ATOMS),
    ("tail_steps", 0, 2**16 - 1),
)


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a receiver must know besides the maps and the noise.

    :param height, width: of the picture, 1...8192 pixels, at most 2^24 in all.
    :param num_classes: of the label map, 1...256.
    :param one_hot, edge_plane: the form of the conditioning (see `encode_semantics`).
    :param boundaries: boundaries between instances of one class are part of the edges.
    :param label_scale, edge_scale: 1, 2, 4 or 8 pixels to one that is sent.
    :param edge_levels: values of an image-edge pixel, 2...256; 0: image edges are not sent.
    :param bank_seed, bank_size: the noise bank.
    :param method: "ddpm", "ddim" or "dpm++"; eta and the guidance scale s are in single precision: both ends use the
        rounded values.
    :param steps: respacing of the chain: "" (all), "50", "ddim50" or "logsnr20".
    :param stop_step: 0, or the answer is the predicted x_0 after so many steps.
    :param start_sent: the index of x_T is in the message; otherwise it is entry 0.
    :param selected_steps: so many steps' noise is in the message: step_atoms of step_candidates entries each.
    :param tail_steps: so many last steps take no noise.
    :param step_variance: "model" or "posterior".
    :param precision: of the network's arithmetic: "fp32", "bf16" or "fp16".
    :param fingerprint: first 8 bytes of the SHA-256 of the weights.
    """

    height: int
    width: int
    num_classes: int
    one_hot: bool = True
    edge_plane: bool = True
    boundaries: bool = False
    label_scale: int = 1
    edge_levels: int = 0
    edge_scale: int = 1
    bank_seed: int = 150
    bank_size: int = 1000
    method: str = "ddpm"
    steps: str = ""
    eta: float = 0.0
    s: float = 1.0
    clip_denoised: bool = True
    stop_step: int = 0
    start_sent: bool = True
    selected_steps: int = 0
    step_candidates: int = 0
    step_atoms: int = 0
    tail_steps: int = 0
    step_variance: str = "model"
    precision: str = "fp32"
    fingerprint: bytes = bytes(8)
    version: int = VERSION

    def __post_init__(self):
        for name in ("eta", "s"):
            object.__setattr__(self, name, float(np.float32(getattr(self, name))))

    @property
    def label_shape(self):
        """(h, w) of the label map as sent."""
        return _shrunk(self, self.label_scale)

    @property
    def edge_shape(self):
        """(h, w) of the image edges as sent."""
        return _shrunk(self, self.edge_scale)

    def check(self):
        """Raise InputError unless a message can carry these values."""
        for name, low, high in _RANGES:
            if not low <= getattr(self, name) <= high:
                raise InputError(f"message header: {name} is {getattr(self, name)}; must be {low} to {high}")
        for name, values in (*_FLAGS, *_CHOICES):
            if getattr(self, name) not in values:
                raise InputError(f"message header: {name} is {getattr(self, name)!r}; must be one of {tuple(values)}")
        if self.height * self.width > source_coding.MAX_PIXELS:
            raise InputError(
                f"message header: {self.width}x{self.height} pixels; must be at most {source_coding.MAX_PIXELS}"
            )
        if self.edge_levels == 1 or ((self.boundaries or self.edge_levels) and not self.edge_plane):
            raise InputError(
                f"message header: {self.edge_levels} edge levels, edge_plane {self.edge_plane}, boundaries"
                f" {self.boundaries}; edges need an edge plane, and 2 levels or more"
            )
        steps = _split_steps(self.steps)[1] or 2**16 - 1
        if max(self.stop_step, self.selected_steps, self.tail_steps) > steps:
            raise InputError(
                f"message header: stop step {self.stop_step}, {self.selected_steps} selected and {self.tail_steps}"
                f" tail steps, but the chain has {steps}"
            )
        if self.selected_steps and not 1 <= self.step_atoms <= self.step_candidates <= self.bank_size:
            raise InputError(
                f"message header: {self.step_atoms} atoms of {self.step_candidates} candidates in a bank of"
                f" {self.bank_size}; each must be at least 1, and no more than the next"
            )
        if (self.step_variance == "posterior") != (self.selected_steps > 0 and self.method == "ddpm"):
            raise InputError(
                f"message header: {self.selected_steps} selected {self.method} steps, {self.step_variance};"
                " selected ancestral steps have the posterior's, others the model's"
            )
        if self.method == "dpm++" and (self.eta or self.selected_steps):
            raise InputError(
                f"message header: dpm++ with eta {self.eta:g} and {self.selected_steps} selected steps; both must"
                " be 0, for it takes no noise"
            )
        if self.version != VERSION or len(self.fingerprint) != 8:
            raise InputError(
                f"message header: version {self.version}, fingerprint of {len(self.fingerprint)} bytes;"
                f" must be {VERSION} and 8 bytes"
            )


def _shrunk(header, scale):
    return -(-header.height // scale), -(-header.width // scale)


def _split_steps(steps):
    """Return (kind, count) of a respacing."""
    for kind, form in enumerate(_STEPS[1:], 1):
        found = re.fullmatch(form.format("([1-9][0-9]{0,4})"), steps)
        if found and int(found[1]) < 2**16:
            return kind, int(found[1])
    if steps:
        raise InputError(
            f"--timestep_respacing {steps}: sections cannot be sent in a message; give N, ddimN or logsnrN, up to 65535"
        )
    return 0, 0


def _write_header(header, lengths):
    """Return a header's bytes, CRC included. `lengths`: of the other parts, in bytes."""
    header.check()
    if max(lengths) >= 2**24:
        raise InputError(
            f"a message part has {max(lengths)} bytes; must be below {2**24}: raise --label_scale or --edge_scale"
        )
    kind, steps = _split_steps(header.steps)
    flags = sum(values[getattr(header, name)] for name, values in _FLAGS)
    choices = sum(values.index(getattr(header, name)) << 2 * k for k, (name, values) in enumerate(_CHOICES)) | kind << 6
    levels = max(0, header.edge_levels - 1)  # 0, or 2...256
    return _sealed(
        _FIELDS.pack(
            _MAGIC,
            VERSION,
            header.height,
            header.width,
            header.num_classes,
            flags,
            choices,
            levels,
            header.bank_seed,
            header.bank_size,
            steps,
            header.eta,
            header.s,
            header.stop_step,
            header.selected_steps,
            header.step_candidates,
            header.step_atoms,
            header.tail_steps,
            header.fingerprint,
            *(length.to_bytes(3, "little") for length in lengths),
        )
    )


def _flagged(values, flags):
    """Return the one of `values`, a dict from value to bits, whose bits the flag byte has, or None."""
    own = flags & sum(values.values())
    return next((value for value, bits in values.items() if bits == own), None)


def read_header(data):
    """Read the header in front of a message's bytes.

    :return: (`Header`, {part: bytes} for the three other parts), every field checked.
    """
    if data[:2] != _MAGIC or len(data) < HEADER_BYTES:
        raise InputError(f"no message begins with these {len(data)} bytes; give a file written with --role transmit")
    if data[2] != VERSION:
        raise InputError(f"a message of version {data[2]}; this program reads version {VERSION}: use the transmitter's")
    fields = _FIELDS.unpack(_opened("header", data[:HEADER_BYTES]))
    (
        _,
        _,
        height,
        width,
        num_classes,
        flags,
        choices,
        levels,
        bank_seed,
        bank_size,
        steps,
        eta,
        s,
        stop_step,
        selected_steps,
        step_candidates,
        step_atoms,
        tail_steps,
        fingerprint,
        *lengths,
    ) = fields
    named = {name: _flagged(values, flags) for name, values in _FLAGS}
    if None in named.values() or choices >> 4 & 3 == 3 or (choices < 64 and steps):
        raise InputError("message header: bits that mean nothing are set; send it again")
    named |= {name: values[choices >> 2 * k & 3] for k, (name, values) in enumerate(_CHOICES)}
    header = Header(
        height=height,
        width=width,
        num_classes=num_classes,
        edge_levels=levels + (levels > 0),
        bank_seed=bank_seed,
        bank_size=bank_size,
        steps=_STEPS[choices >> 6].format(steps),
        eta=eta,
        s=s,
        stop_step=stop_step,
        selected_steps=selected_steps,
        step_candidates=step_candidates,
        step_atoms=step_atoms,
        tail_steps=tail_steps,
        fingerprint=fingerprint,
        **named,
    )
    header.check()
    return header, dict(zip(PARTS[1:], (int.from_bytes(length, "little") for length in lengths), strict=True))


@dataclass(frozen=True, eq=False)
class Message:
    """One picture's message. Read it from bytes with `from_bytes`, the exact inverse of `to_bytes`.

    :param label: (h, w) uint8 class ids of the header's `label_shape`.
    :param boundary: (H, W) bool, or None without `boundaries`.
    :param edges: (h, w) uint8 symbols below edge_levels, of the header's `edge_shape`, or None with 0 levels.
    :param start_index: bank entry of x_T, or None without `start_sent`.
    :param codewords: per selected step (indices, signs), tuples of step_atoms integers (see `pack_choices`).
    """

    header: Header
    label: np.ndarray
    boundary: np.ndarray | None = None
    edges: np.ndarray | None = None
    start_index: int | None = None
    codewords: tuple = ()

    def __post_init__(self):
        codewords = tuple(tuple(tuple(map(int, numbers)) for numbers in pick) for pick in self.codewords)
        object.__setattr__(self, "codewords", codewords)

    def __eq__(self, other):
        if not isinstance(other, Message):
            return NotImplemented
        mine, theirs = ((m.header, m.start_index, m.codewords) for m in (self, other))
        maps = ((self.label, other.label), (self.boundary, other.boundary), (self.edges, other.edges))
        return mine == theirs and all(a is b if a is None or b is None else np.array_equal(a, b) for a, b in maps)

    def parts(self):
        """Return the parts in the order in which they are sent: {"header", "labels", "edges", "indices": bytes}."""
        return dict(self._parts)

    @functools.cached_property
    def _parts(self):  # once: coding the maps is the work, and bits, bytes and the channel all ask
        self._check()
        header = self.header
        choices = pack_choices(
            self.start_index, header.bank_size, self.codewords, header.step_candidates, header.step_atoms
        )
        bodies = encode_map(self.label, header.num_classes), _encode_edges(header, self.boundary, self.edges), choices
        head = _write_header(header, [len(_sealed(body)) for body in bodies])
        return dict(zip(PARTS, [head, *(_sealed(body, head) for body in bodies)], strict=True))

    def _check(self):
        header = self.header
        header.check()
        size = header.height, header.width
        for name, plane, shape in (
            ("label map", self.label, header.label_shape),
            ("boundary plane", self.boundary, size if header.boundaries else None),
            ("image edges", self.edges, header.edge_shape if header.edge_levels else None),
        ):
            found = None if plane is None else plane.shape
            if found != shape or (plane is not None and plane.dtype not in (np.uint8, bool)):
                raise InputError(f"message: {name} of shape {found}; the header asks for {shape}, 8-bit")
        if len(self.codewords) != header.selected_steps or (self.start_index is None) == header.start_sent:
            wanted = "a" if header.start_sent else "no"
            raise InputError(
                f"message: start index {self.start_index} and {len(self.codewords)} codewords; the header asks for"
                f" {wanted} start index and {header.selected_steps} codewords"
            )

    def to_bytes(self):
        """Return the message's bytes: its parts one after the other."""
        return b"".join(self.parts().values())

    @classmethod
    def from_bytes(cls, data):
        """Read a message. Raises InputError for anything but a whole and valid one."""
        header, lengths = read_header(data)
        if len(data) != HEADER_BYTES + sum(lengths.values()):
            raise InputError(
                f"a message of {len(data)} bytes, but its header says {HEADER_BYTES + sum(lengths.values())};"
                " send it again"
            )
        at, bodies = HEADER_BYTES, {}
        for name, length in lengths.items():
            bodies[name] = _opened(name, data[at : at + length], data[:HEADER_BYTES])
            at += length
        read = {name: _READERS[name](header, body) for name, body in bodies.items()}
        return cls(header, read["labels"], *read["edges"], *read["indices"])

    def bits(self):
        """Return the bits of each part, counted from the bytes, and of the "total"."""
        bits = {name: 8 * len(part) for name, part in self.parts().items()}
        return bits | {"total": sum(bits.values())}


@dataclass(frozen=True, eq=False)
class Reception:
    """What a receiver has of a message. Fields as in `Message`, None (codewords: fewer) where lost.

    :param problems: names of the parts that were lost. Without its header nothing else can be read.
    """

    header: Header | None = None
    label: np.ndarray | None = None
    boundary: np.ndarray | None = None
    edges: np.ndarray | None = None
    start_index: int | None = None
    codewords: tuple = ()
    problems: tuple = ()


def receive_parts(parts, indices_prefix=b""):
    """Make what can be made of parts that the channel may have damaged or lost.

    :param parts: {part: bytes, or None where it is lost}.
    :param indices_prefix: a beginning of the indices that is known to be right, for when the whole is not.
    :return: `Reception`.
    :raises InputError: only where a part is good and this machine lacks the plugin that reads it.
    """
    head = (parts.get("header") or b"")[:HEADER_BYTES]
    try:
        header, lengths = read_header(head)
    except InputError:
        return Reception(problems=("header",))
    read, problems = {"labels": None, "edges": (None, None)}, []
    for name, length in lengths.items():
        part = parts.get(name)
        try:
            if part is None or len(part) != length:
                raise InputError("lost")
            read[name] = _READERS[name](header, _opened(name, part, head))
        except MissingPlugin:
            raise
        except InputError:
            problems.append(name)
    if "indices" in problems:
        beginning = indices_prefix[: max(0, lengths["indices"] - CRC_BYTES)]
        read["indices"] = _read_choices(header, beginning, prefix=True)
    return Reception(header, read["labels"], *read["edges"], *read["indices"], tuple(problems))


# -- parts -------------------------------------------------------------------------------------------------------------


def _sealed(body, head=b""):
    """Put a CRC-32 behind a part's body. `head`: the header's bytes, of which the CRC goes on."""
    return body and body + zlib.crc32(body, int.from_bytes(head[-CRC_BYTES:], "little")).to_bytes(CRC_BYTES, "little")


def _opened(name, part, head=b""):
    body, crc = part[:-CRC_BYTES], part[-CRC_BYTES:]
    if _sealed(body, head) != part or (part and not body):
        raise InputError(f"the message's {name} are damaged (checksum {crc.hex()} is wrong); send it again")
    return body


def _encode_edges(header, boundary, edges):
    """Code the boundary plane (nothing, if it is empty), and the image edges behind it.

    With both, the boundaries' length stands in front: 7 bits a byte, the lowest first, the highest bit set where more follow.
    """
    first = encode_map(boundary, 2) if boundary is not None and boundary.any() else b""
    if edges is None:
        return first
    length, left = b"", len(first)
    while left > 127:
        length, left = length + bytes([left & 127 | 128]), left >> 7
    length = length + bytes([left]) if header.boundaries else b""
    return length + first + encode_map(edges, header.edge_levels)


def _read_edges(header, data):
    """Undo `_encode_edges`: return (boundary, edges)."""
    first, second = data, b""
    if header.edge_levels:
        length = at = 0
        while header.boundaries:
            if at >= min(4, len(data)):
                raise InputError("message: the edges' length is damaged; send it again")
            length |= (data[at] & 127) << 7 * at
            at += 1
            if data[at - 1] < 128:
                break
        first, second = data[at : at + length], data[at + length :]
    boundary = None
    if header.boundaries:
        size = header.height, header.width
        boundary = decode_map(first, *size, 2).astype(bool) if first else np.zeros(size, bool)
    elif first:
        raise InputError(f"message: {len(first)} bytes of edges, but the header has none; send it again")
    return boundary, decode_map(second, *header.edge_shape, header.edge_levels) if header.edge_levels else None


def _read_labels(header, data):
    return decode_map(data, *header.label_shape, header.num_classes)


def _read_choices(header, data, prefix=False):
    return unpack_choices(
        data,
        header.start_sent,
        header.bank_size,
        header.selected_steps,
        header.step_candidates,
        header.step_atoms,
        prefix,
    )


_READERS = {"labels": _read_labels, "edges": _read_edges, "indices": _read_choices}
