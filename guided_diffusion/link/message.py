"""The message: all that is sent for one picture, and nothing else.

Four parts: header, labels, edges (boundaries within classes and image edges), indices (noise choices). Each ends in a
CRC-32 and can be lost alone; a part with nothing to say is no bytes at all. The CRC of a part goes on from that of the
header, so that parts of two messages do not pass as one. Weights and noise bank are named by fingerprint and seed.
"""

import functools
import re
import struct
import zlib
from dataclasses import dataclass, field, replace

import numpy as np

from ..console import InputError
from ..diffusion.solvers import SamplerSettings
from . import source_coding
from .source_coding import decode_map, encode_map, pack_choices, unpack_choices

PARTS = ("header", "labels", "edges", "indices")
CRC_BYTES = 4
_MAGIC = b"DG\x01"  # the last byte is the format's version

# Fields of a 16-bit word: which bits each value has
_CHOICES = {
    "one_hot": {False: 0, True: 1 << 0},
    "edge_plane": {False: 0, True: 1 << 1},
    "boundaries": {False: 0, True: 1 << 2},
    "clip_denoised": {False: 0, True: 1 << 3},
    "start_sent": {False: 0, True: 1 << 4},
    "method": {"ddpm": 0, "ddim": 1 << 5, "dpm++": 1 << 7},
    "variance": {"model": 0, "posterior": 1 << 6},
    "label_scale": {1: 0, 2: 1 << 8, 4: 2 << 8, 8: 3 << 8},
    "edge_scale": {1: 0, 2: 1 << 10, 4: 2 << 10, 8: 3 << 10},
    "precision": {"fp32": 0, "bf16": 1 << 12, "fp16": 2 << 12},
    "spacing": {"": 0, "{}": 1 << 14, "ddim{}": 2 << 14, "logsnr{}": 3 << 14},
}
# Numbers in the order in which they are sent: format of `struct`, lowest and highest value
_NUMBERS = {
    "height": ("H", 1, source_coding.MAX_SIDE),
    "width": ("H", 1, source_coding.MAX_SIDE),
    "num_classes": ("H", 1, 256),
    "choices": ("H", 0, 2**16 - 1),
    "levels": ("B", 0, 255),  # one less than edge_levels, which are 0 or 2...256
    "bank_seed": ("q", -(2**63), 2**63 - 1),
    "bank_size": ("I", 1, 2**32 - 1),
    "step_count": ("H", 0, 2**16 - 1),
    "eta": ("f", 0, 1),
    "s": ("f", 1, 1e6),
    "stop_step": ("H", 0, 2**16 - 1),
    "selected_steps": ("H", 0, 2**16 - 1),
    "step_candidates": ("H", 0, source_coding.MAX_CANDIDATES),
    "step_atoms": ("H", 0, source_coding.MAX_ATOMS),
    "tail_steps": ("H", 0, 2**16 - 1),
}
# Behind the magic and the numbers: the fingerprint and the other parts' lengths
_FIELDS = struct.Struct("<3s" + "".join(form for form, _, _ in _NUMBERS.values()) + "8s3s3s3s")
HEADER_BYTES = _FIELDS.size + CRC_BYTES


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a receiver must know besides the maps and the noise.

    :param height, width, num_classes: of the picture, 1...8192 pixels, at most 2^24 in all; 1...256 classes.
    :param one_hot, edge_plane: the form of the conditioning (see `encode_semantics`).
    :param boundaries: boundaries between instances of one class are part of the edges.
    :param label_scale, edge_scale: 1, 2, 4 or 8 pixels to one that is sent.
    :param edge_levels: values of an image-edge pixel, 2...256; 0: image edges are not sent.
    :param bank_seed, bank_size: the noise bank.
    :param sampler: the `SamplerSettings` of both ends, with eta and s rounded to single precision, as they are sent.
    :param stop_step: 0, or the answer is the predicted x_0 after so many steps.
    :param start_sent: the index of x_T is in the message; otherwise it is entry 0.
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
        values = vars(self) | vars(self.sampler) | {"choices": 0}
        values["spacing"], values["step_count"] = _split_steps(self.sampler.steps)
        values["levels"] = self.edge_levels - 1 if self.edge_levels else 0
        for name, bits in _CHOICES.items():
            if values[name] not in bits:
                raise InputError(f"message header: {name} is {values[name]!r}; must be one of {tuple(bits)}")
            values["choices"] |= bits[values[name]]
        for name, (_, low, high) in _NUMBERS.items():
            if not low <= values[name] <= high:
                raise InputError(f"message header: {name} is {values[name]}; must be {low} to {high}")
        if self.height * self.width > source_coding.MAX_PIXELS:
            raise InputError(f"message header: {self.width}x{self.height} pixels; must be at most 2^24")
        if self.edge_levels == 1 or ((self.boundaries or self.edge_levels) and not self.edge_plane):
            raise InputError(f"message header: {self.edge_levels} edge levels; must be 0, or 2...256 and an edge plane")
        if self.selected_steps and not 1 <= self.step_atoms <= self.step_candidates <= self.bank_size:
            found = f"{self.step_atoms} atoms of {self.step_candidates} candidates in a bank of {self.bank_size}"
            raise InputError(f"message header: {found}; each must be at least 1, and no more than the next")
        return values

    def to_bytes(self, lengths):
        """Return the header's bytes, CRC included. `lengths`: of the other parts, in bytes."""
        values = self.check()
        ends = [length.to_bytes(3, "little") for length in lengths]
        return _with_crc(_FIELDS.pack(_MAGIC, *(values[name] for name in _NUMBERS), self.fingerprint, *ends))


def _split_steps(steps):
    """Return (spacing, count) of a respacing: "ddim50" is ("ddim{}", 50)."""
    found = re.fullmatch("(|ddim|logsnr)([1-9][0-9]{0,4})", steps)
    if found and int(found[2]) < 2**16:
        return found[1] + "{}", int(found[2])
    if steps:
        raise InputError(f"--timestep_respacing {steps}: cannot be sent in a message; give N, ddimN or logsnrN")
    return "", 0


def read_header(data):
    """Read the header in front of a message's bytes: return (`Header`, {part: bytes} for the three other parts)."""
    if data[:3] != _MAGIC or len(data) < HEADER_BYTES:
        raise InputError(f"these {len(data)} bytes are no message of version 1; give a file of --role transmit")
    _, *numbers, fingerprint, labels, edges, indices = _FIELDS.unpack(_without_crc("header", data[:HEADER_BYTES]))
    values = dict(zip(_NUMBERS, numbers, strict=True))
    word = values.pop("choices")
    for name, bits in _CHOICES.items():
        own = word & functools.reduce(int.__or__, bits.values())
        values[name] = next((value for value in bits if bits[value] == own), None)
        if values[name] is None:
            raise InputError(f"message header: the bits of {name} have no meaning; send it again")
    levels, spacing, count = (values.pop(name) for name in ("levels", "spacing", "step_count"))
    values |= {"steps": spacing.format(count), "edge_levels": levels and levels + 1, "fingerprint": fingerprint}
    if _split_steps(values["steps"]) != (spacing, count):
        raise InputError(f"message header: {count} steps without a spacing; send it again")
    sampler = SamplerSettings(**{name: values.pop(name) for name in vars(SamplerSettings())})
    header = Header(sampler=sampler, **values)
    header.check()
    lengths = {"labels": labels, "edges": edges, "indices": indices}
    return header, {part: int.from_bytes(length, "little") for part, length in lengths.items()}


@dataclass(frozen=True, eq=False)
class Message:
    """One picture's message, or what arrived of one. `from_bytes` is the exact inverse of `to_bytes`.

    :param label: (h, w) uint8 class ids, of the header's shape(label_scale).
    :param boundary: (H, W) bool, or None without `boundaries`.
    :param edges: (h, w) uint8 symbols below edge_levels, of its shape(edge_scale), or None with 0 levels.
    :param start_index: bank entry of x_T, or None without `start_sent`.
    :param codewords: per selected step (indices, signs), tuples of step_atoms integers (see `pack_choices`).
    :param problems: names of parts that were lost: what they say is None (codewords: fewer), without the header all.
    """

    header: Header | None
    label: np.ndarray | None = None
    boundary: np.ndarray | None = None
    edges: np.ndarray | None = None
    start_index: int | None = None
    codewords: tuple = ()
    problems: tuple = ()

    def parts(self):
        """Return the parts in the order in which they are sent: {"header", "labels", "edges", "indices": bytes}."""
        return dict(self._parts)

    @functools.cached_property
    def _parts(self):  # once: coding the maps is the work, and bits, bytes and the channel all ask
        header = self.header
        choices = self.start_index, header.bank_size, self.codewords, header.step_candidates, header.step_atoms
        labels, edges = encode_map(self.label, header.num_classes), _encode_edges(header, self.boundary, self.edges)
        bodies = labels, edges, pack_choices(*choices)
        head = header.to_bytes([len(_with_crc(body)) for body in bodies])
        return dict(zip(PARTS, [head, *(_with_crc(body, head) for body in bodies)], strict=True))

    def to_bytes(self):
        """Return the message's bytes: its parts one after the other."""
        return b"".join(self.parts().values())

    @classmethod
    def from_bytes(cls, data):
        """Read a message. Raises InputError for anything but a whole and valid one."""
        header, lengths = read_header(data)
        size = HEADER_BYTES + sum(lengths.values())
        if len(data) != size:
            raise InputError(f"a message of {len(data)} bytes, but its header says {size}; send it again")
        at, read = HEADER_BYTES, {}
        for name, length in lengths.items():
            read[name] = _READERS[name](header, _without_crc(name, data[at : at + length], data[:HEADER_BYTES]))
            at += length
        return cls(header, read["labels"], *read["edges"], *read["indices"])

    def bits(self):
        """Return the bits of each part, counted from the bytes, and of the "total"."""
        bits = {name: 8 * len(part) for name, part in self.parts().items()}
        return bits | {"total": sum(bits.values())}


def receive_parts(parts, indices_prefix=b""):
    """Make a `Message`, with its `problems`, of parts that the channel may have damaged or lost.

    :param parts: {part: bytes, or None where it is lost}.
    :param indices_prefix: a beginning of the indices that is known to be right, for when the whole is not.
    """
    head = (parts.get("header") or b"")[:HEADER_BYTES]
    try:
        header, lengths = read_header(head)
    except InputError:
        return Message(None, problems=("header",))
    read, problems = {"labels": None, "edges": (None, None)}, []
    for name, length in lengths.items():
        part = parts.get(name)
        try:
            if part is None or len(part) != length:
                raise InputError("lost")
            read[name] = _READERS[name](header, _without_crc(name, part, head))
        except InputError:
            problems.append(name)
    if "indices" in problems:
        beginning = indices_prefix[: max(0, lengths["indices"] - CRC_BYTES)]
        read["indices"] = _read_choices(header, beginning, prefix=True)
    return Message(header, read["labels"], *read["edges"], *read["indices"], tuple(problems))


def _with_crc(body, head=b""):
    """Put a CRC-32 behind a part's body, if there is any. `head`: the header's bytes, of which the CRC goes on."""
    if not body:
        return b""
    return body + zlib.crc32(body, int.from_bytes(head[-CRC_BYTES:], "little")).to_bytes(CRC_BYTES, "little")


def _without_crc(name, part, head=b""):
    body = part[:-CRC_BYTES]
    if _with_crc(body, head) != part:
        raise InputError(f"the message's {name} are damaged (CRC is wrong); send it again")
    return body


def _encode_edges(header, boundary, edges):
    """Code the boundary plane (nothing, if it is empty), and the image edges behind it.

    With both, the length of the boundaries' bytes stands in front, as an unsigned LEB128 number.
    """
    first = encode_map(boundary, 2) if boundary is not None and boundary.any() else b""
    if edges is None:
        return first
    length, left = bytearray(), len(first)
    while left > 127:
        length.append(left & 127 | 128)
        left >>= 7
    length.append(left)
    return (b"" if boundary is None else bytes(length) + first) + encode_map(edges, header.edge_levels)


def _read_edges(header, data):
    """Undo `_encode_edges`: return (boundary, edges)."""
    boundary = edges = None
    if header.boundaries:
        size = header.height, header.width
        first, data = _split_edges(data) if header.edge_levels else (data, b"")
        boundary = decode_map(first, *size, 2).astype(bool) if first else np.zeros(size, bool)
    if header.edge_levels:
        edges = decode_map(data, *header.shape(header.edge_scale), header.edge_levels)
    elif data:
        raise InputError(f"message: {len(data)} bytes of edges that the header does not name; send it again")
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


_READERS = {
    "labels": lambda header, data: decode_map(data, *header.shape(header.label_scale), header.num_classes),
    "edges": _read_edges,
    "indices": _read_choices,
}
