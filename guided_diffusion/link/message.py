"""The message: all that is sent for one picture, and nothing else.

Its parts: header, labels, edges (boundaries within classes and image edges), indices (noise choices), and for networks
with a colour layer that layer, as long as what is left of the message. Each ends in a
CRC-32 and can be lost alone; a part with nothing to say is no bytes at all. The CRC of a part goes on from that of the
header, so that parts of two messages do not pass as one.
"""

import functools
import io
import re
import struct
import zlib
from dataclasses import dataclass, field, replace

import numpy as np

from ..console import InputError
from ..diffusion.solvers import SamplerSettings
from . import source_coding
from .source_coding import decode_map, encode_map, pack_choices, unpack_choices

PARTS = ("header", "labels", "edges", "indices", "color")
CRC_BYTES = 4
_MAGIC = b"DG\x01"  # the last byte is the format's version

_FLAGS = ("one_hot", "edge_plane", "boundaries", "clip_denoised", "start_sent")
# Fields of a 16-bit word: which bits each value has
_CHOICES = {name: {False: 0, True: 1 << k} for k, name in enumerate(_FLAGS)} | {
    "method": {"ddpm": 0, "ddim": 1 << 5, "dpm++": 1 << 7},
    "variance": {"model": 0, "posterior": 1 << 6},
    "label_scale": {1: 0, 2: 1 << 8, 4: 2 << 8, 8: 3 << 8},
    "edge_scale": {1: 0, 2: 1 << 10, 4: 2 << 10, 8: 3 << 10},
    "precision": {"fp32": 0, "bf16": 1 << 12, "fp16": 2 << 12},
    "spacing": {"": 0, "{}": 1 << 14, "ddim{}": 2 << 14, "logsnr{}": 3 << 14},
}
# The header: magic, numbers, fingerprint, lengths of the other parts, CRC
_FIELDS = struct.Struct("<3s 4H B q I H 2f 5H 8s 3s 3s 3s")
_NUMBERS = (
    *("height", "width", "num_classes", "choices", "levels"),  # levels: one less than edge_levels, 0 or 2...256
    *("bank_seed", "bank_size", "step_count", "eta", "s"),
    *("stop_step", "selected_steps", "step_candidates", "step_atoms", "tail_steps"),
)
# Lowest and highest value, where neither the format nor another object checks it
_LIMITS = {
    "height": (1, source_coding.MAX_SIDE),
    "width": (1, source_coding.MAX_SIDE),
    "num_classes": (1, 256),
    "bank_size": (1, 2**32 - 1),
    "s": (1, 1e6),
    **dict.fromkeys(("step_count", "stop_step", "selected_steps", "tail_steps"), (0, 2**16 - 1)),
    "step_candidates": (0, source_coding.MAX_CANDIDATES),
    "step_atoms": (0, source_coding.MAX_ATOMS),
}
HEADER_BYTES = _FIELDS.size + CRC_BYTES


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a receiver must know besides the maps and the noise.

    :param height, width, num_classes: of the picture, 1...8192 pixels, at most 2^24 in all; 1...256 classes.
    :param one_hot, edge_plane: the form of the conditioning (see `encode_semantics`).
    :param boundaries: boundaries between instances of one class are part of the edges.
    :param label_scale, edge_scale: 1, 2, 4 or 8 pixels to one that is sent.
    :param edge_levels: values of an image-edge pixel, 2...256; 0: image edges are not sent.
    :param sampler: the `SamplerSettings` of both ends, with eta and s rounded to single precision, as they are sent.
    :param stop_step: 0, or the answer is the predicted x_0 after so many steps.
    :param bank_seed, bank_size, start_sent: the noise bank, and whether x_T's index is sent; otherwise it is entry 0.
    :param selected_steps: so many steps' noise is in the message: step_atoms of step_candidates entries each.
    :param precision, fingerprint: of the network: "fp32", "bf16" or "fp16"; first 8 bytes of its weights' SHA-256.
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
    sampler: SamplerSettings = field(default_factory=SamplerSettings)
    stop_step: int = 0
    start_sent: bool = True
    selected_steps: int = 0
    step_candidates: int = 0
    step_atoms: int = 0
    precision: str = "fp32"
    fingerprint: bytes = bytes(8)

    def __post_init__(self):
        eta, s = (float(np.float32(value)) for value in (self.sampler.eta, self.sampler.s))
        object.__setattr__(self, "sampler", replace(self.sampler, eta=eta, s=s))

    def shape(self, scale):
        """(h, w) of a map that is sent at a scale."""
        return -(-self.height // scale), -(-self.width // scale)

    def check(self):
        """Raise InputError unless a message can carry these values; return them as they are sent, by name."""
        steps = re.fullmatch("|(|ddim|logsnr)([1-9][0-9]*)", self.sampler.steps)
        if not steps:
            raise InputError(f"--timestep_respacing {self.sampler.steps}: cannot be sent; give N, ddimN or logsnrN")
        values = vars(self) | vars(self.sampler) | {"choices": 0, "levels": max(0, self.edge_levels - 1)}
        values |= {"spacing": steps[1] + "{}" if steps[2] else "", "step_count": int(steps[2] or 0)}
        for name, bits in _CHOICES.items():
            if values[name] not in bits:
                raise InputError(f"message header: {name} is {values[name]!r}; must be one of {tuple(bits)}")
            values["choices"] |= bits[values[name]]
        for name, (low, high) in _LIMITS.items():
            if not low <= values[name] <= high:
                raise InputError(f"message header: {name} is {values[name]}; must be {low} to {high}")
        if self.height * self.width > source_coding.MAX_PIXELS:
            raise InputError(f"message header: {self.width}x{self.height} pixels; must be at most 2^24")
        if self.selected_steps and not 1 <= self.step_atoms <= self.step_candidates <= self.bank_size:
            raise InputError(f"message header: {self.step_atoms} of {self.step_candidates} of {self.bank_size} entries")
        return values


def read_header(data):
    """Read the header in front of a message's bytes: return (`Header`, {part: bytes} for the three other parts)."""
    if data[:3] != _MAGIC or len(data) < HEADER_BYTES:
        raise InputError(f"these {len(data)} bytes are no message of version 1; give a file of --role transmit")
    fields = _FIELDS.unpack(_without_crc("header", data[:HEADER_BYTES]))
    values = dict(zip(_NUMBERS, fields[1:-4], strict=True), fingerprint=fields[-4])
    word, levels, count = (values.pop(name) for name in ("choices", "levels", "step_count"))
    for name, bits in _CHOICES.items():
        own = word & functools.reduce(int.__or__, bits.values())
        values[name] = next((value for value in bits if bits[value] == own), None)  # None is refused below
    values |= {"steps": values.pop("spacing").format(count), "edge_levels": levels and levels + 1}
    sampler = SamplerSettings(**{name: values.pop(name) for name in vars(SamplerSettings()) if name in values})
    header = Header(sampler=sampler, **values)
    header.check()
    return header, {part: int.from_bytes(end, "little") for part, end in zip(PARTS[1:4], fields[-3:], strict=True)}


@dataclass(frozen=True, eq=False)
class Message:
    """One picture's message, or what arrived of one. `from_bytes` is the exact inverse of `to_bytes`.

    :param label: (h, w) uint8 class ids, of the header's shape(label_scale).
    :param boundary: (H, W) bool, or None without `boundaries`.
    :param edges: (h, w) uint8 symbols below edge_levels, of its shape(edge_scale), or None with 0 levels.
    :param start_index: bank entry of x_T, or None without `start_sent`.
    :param codewords: per selected step (indices, signs), tuples of step_atoms integers (see `pack_choices`).
    :param color: the number of the quantiser step (a byte) and the coded colour layer; empty where there is none.
    :param problems: names of parts that were lost: what they say is None (codewords: fewer), without the header all.
    """

    header: Header | None
    label: np.ndarray | None = None
    boundary: np.ndarray | None = None
    edges: np.ndarray | None = None
    start_index: int | None = None
    codewords: tuple = ()
    color: bytes = b""
    problems: tuple = ()

    @functools.cached_property
    def parts(self):
        """The parts in the order in which they are sent: {"header", "labels", "edges", "indices", "color": bytes}."""
        header = self.header
        choices = self.start_index, header.bank_size, self.codewords, header.step_candidates, header.step_atoms
        labels, edges = encode_map(self.label, header.num_classes), _encode_edges(header, self.boundary, self.edges)
        bodies = labels, edges, pack_choices(*choices), self.color
        values, lengths = header.check(), [len(_with_crc(body)).to_bytes(3, "little") for body in bodies[:3]]
        head = _with_crc(_FIELDS.pack(_MAGIC, *(values[name] for name in _NUMBERS), header.fingerprint, *lengths))
        return dict(zip(PARTS, [head, *(_with_crc(body, head) for body in bodies)], strict=True))

    def to_bytes(self):
        """Return the message's bytes: its parts one after the other."""
        return b"".join(self.parts.values())

    @classmethod
    def from_bytes(cls, data):
        """Read a message. Raises InputError for anything but a whole and valid one."""
        header, lengths = read_header(data)
        if len(data) < HEADER_BYTES + sum(lengths.values()):
            raise InputError(f"a message of {len(data)} bytes, but its header says more; send it again")
        file = io.BytesIO(data)
        head = file.read(HEADER_BYTES)
        label, edges, choices = (_read(name, header, file.read(length), head) for name, length in lengths.items())
        return cls(header, label, *edges, *choices, _without_crc("color", file.read(), head))

    def bits(self):
        """Return the bits of each part, counted from the bytes, and of the "total"."""
        bits = {name: 8 * len(part) for name, part in self.parts.items()}
        return bits | {"total": sum(bits.values())}


def receive_parts(parts, indices_prefix=b""):
    """Make a `Message`, with its `problems`, of {part: bytes} that the channel damaged or lost (None).

    :param indices_prefix: a beginning of the indices that is right, for when the whole is not.
    """
    head = (parts.get("header") or b"")[:HEADER_BYTES]
    try:
        header, lengths = read_header(head)
    except InputError:
        return Message(None, problems=("header",))
    read, problems = {"labels": None, "edges": (None, None)}, []
    for name, length in lengths.items():
        part = parts.get(name) or b""
        try:
            if len(part) != length:
                raise InputError("lost")
            read[name] = _read(name, header, part, head)
        except InputError:
            problems.append(name)
    if "indices" in problems:
        read["indices"] = _read_choices(header, indices_prefix, prefix=True)
    try:
        color = _without_crc("color", parts.get("color", b""), head)
    except (InputError, TypeError):  # None: lost
        color, problems = b"", [*problems, "color"]
    return Message(header, read["labels"], *read["edges"], *read["indices"], color, tuple(problems))


def _with_crc(body, head=b""):
    """Put a CRC-32 behind a part's body, if there is any. `head`: the header's bytes, of which the CRC goes on."""
    if not body:
        return b""
    return body + zlib.crc32(body, int.from_bytes(head[-CRC_BYTES:], "little")).to_bytes(CRC_BYTES, "little")


def _without_crc(name, part, head=b""):
    body = part[:-CRC_BYTES]
    if _with_crc(body, head) != part:
        raise InputError(f"the message's {name} part is damaged (CRC is wrong); send it again")
    return body


def _read(name, header, part, head):
    """Read one part: a label map, (boundary, edges), or (start index, codewords)."""
    data = _without_crc(name, part, head)
    if name == "labels":
        return decode_map(data, *header.shape(header.label_scale), header.num_classes)
    return _read_edges(header, data) if name == "edges" else _read_choices(header, data)


def _encode_edges(header, boundary, edges):
    """Code the boundary plane (nothing, if it is empty), and the image edges behind it.

    With both, the length of the boundaries' bytes stands in front, as an unsigned LEB128 number.
    """
    first = encode_map(boundary, 2) if boundary is not None and boundary.any() else b""
    if edges is None:
        return first
    length = b"" if boundary is None else _leb128(len(first))
    return length + first + encode_map(edges, header.edge_levels)


def _leb128(number):
    return bytes([number]) if number < 128 else bytes([number & 127 | 128]) + _leb128(number >> 7)


def _read_edges(header, data):
    """Undo `_encode_edges`: return (boundary, edges)."""
    boundary = edges = None
    if header.boundaries:
        first, data = _split_edges(data) if header.edge_levels else (data, b"")
        boundary = decode_map(first, *header.shape(1), 2).astype(bool) if first else np.zeros(header.shape(1), bool)
    if header.edge_levels:
        edges = decode_map(data, *header.shape(header.edge_scale), header.edge_levels)
    return boundary, edges


def _split_edges(data):
    """Read the boundaries' length; return their bytes, and those of the image edges."""
    length = 0
    for k, byte in enumerate(data[:4]):
        length |= (byte & 127) << 7 * k
        if byte < 128:
            return data[k + 1 : k + 1 + length], data[k + 1 + length :]
    raise InputError("message: the edges' length is damaged; send it again")


def _read_choices(header, data, prefix=False):
    bank_size = header.bank_size if header.start_sent else 0
    return unpack_choices(data, bank_size, header.selected_steps, header.step_candidates, header.step_atoms, prefix)
