"""The message: all that is sent for one picture, and nothing else, beside the session, which is sent once for a run.

Its parts: header, labels, edges (boundaries within classes and image edges), indices (noise choices), and for networks
with a colour layer that layer, which is what is left of a message. Each can be lost alone; one with nothing to say is
no bytes at all. A message's file ends in a CRC-16. The digital link carries the parts without: its blocks have CRCs.
"""

import functools
import hashlib
import io
import json
from binascii import crc_hqx
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np

from ..console import InputError
from ..diffusion.solvers import SamplerSettings
from ..flags import SCALES
from . import source_coding
from .source_coding import choice_bits, decode_map, encode_map, pack_choices, unpack_choices

SESSION = "session.dgo"  # beside the messages
PARTS = ("header", "labels", "edges", "indices", "color")
CRC_BYTES, _CRC, _RIGHT = 2, 0xFFFF, 0x1D0F  # CRC-16/GENIBUS: start and final exclusive or; result over data and CRC
_CHOICES = {"precision": ("fp32", "bf16", "fp16"), "variance": ("model", "posterior")}
_CHOICES |= dict.fromkeys(("label_scale", "edge_scale"), SCALES)
# Lowest and highest value, where no other object checks it
_LIMITS = {"num_classes": (1, 256), "edge_levels": (0, 256), "bank_size": (1, 2**32 - 1), "s": (1, 1e6)}
_LIMITS |= {"step_candidates": (0, source_coding.MAX_CANDIDATES), "step_atoms": (0, source_coding.MAX_ATOMS)}
_LIMITS |= dict.fromkeys(("height", "width"), (1, source_coding.MAX_SIDE))
_LIMITS |= dict.fromkeys(("stop_step", "selected_steps", "tail_steps"), (0, 2**16 - 1))
# A header's flags: bits 0 and 1 log2(label_scale), 2 boundaries, 3 image edges, 4 whether the edges part is not empty;
# and for each group of numbers, from bit 5 on, whether they are not the session's and follow.
_OWN = (("stop_step",), ("height", "width"), ("selected_steps", "step_candidates", "step_atoms"))


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a receiver must know besides the maps and the noise.

    :param height, width, num_classes: of the picture, 1...8192 pixels, at most 2^24 in all; 1...256 classes.
    :param one_hot, edge_plane: the form of the conditioning (see `encode_semantics`).
    :param boundaries: boundaries between instances of one class are part of the edges.
    :param label_scale, edge_scale: 1, 2, 4 or 8 pixels to one that is sent.
    :param edge_levels: values of an image-edge pixel, 2...256; 0: image edges are not sent.
    :param sampler: the `SamplerSettings` of both ends.
    :param stop_step: 0, or the answer is the predicted x_0 after so many steps.
    :param bank_seed, bank_size, start_sent: the noise bank, and whether x_T's index is sent; otherwise it is entry 0.
    :param selected_steps: so many steps' noise is in the message: step_atoms of step_candidates entries each.
    :param precision, fingerprint: of the network: "fp32", "bf16" or "fp16"; first 16 digits of its weights' SHA-256.
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
    fingerprint: str = ""

    def shape(self, scale):
        """(h, w) of a map that is sent at a scale."""
        return -(-self.height // scale), -(-self.width // scale)

    @property
    def choices(self):
        """(bank entries to start from or 0, steps, candidates, atoms): what `choice_bits` needs."""
        return self.bank_size * self.start_sent, self.selected_steps, self.step_candidates, self.step_atoms

    def check(self):
        """Raise InputError unless a message can carry these values; return the header."""
        values = vars(self) | vars(self.sampler)
        for name, choices in _CHOICES.items():
            if values[name] not in choices:
                raise InputError(f"message header: {name} is {values[name]!r}; must be one of {choices}")
        for name, (low, high) in _LIMITS.items():
            if not low <= values[name] <= high:
                raise InputError(f"message header: {name} is {values[name]}; must be {low} to {high}")
        if self.height * self.width > source_coding.MAX_PIXELS:
            raise InputError(f"message header: {self.width}x{self.height} pixels; must be at most 2^24")
        if self.selected_steps and not 1 <= self.step_atoms <= self.step_candidates <= self.bank_size:
            raise InputError(f"message header: {self.step_atoms} of {self.step_candidates} of {self.bank_size} entries")
        return self


@dataclass(frozen=True, eq=False)
class Message:
    """One picture's message, or what arrived of one.

    :param label: (h, w) uint8 class ids, of the header's shape(label_scale), or None: none is sent.
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


def _session_file(body):
    """Return a session's file of its JSON (bytes): with version and digest in front."""
    digest = hashlib.sha256(body).hexdigest()[:16]
    return f"Diff-GOn session, version 2, SHA-256 {digest}\n".encode() + body + b"\n"


@dataclass(frozen=True)
class Session:
    """What is the same for all messages of a run; it writes and reads them.

    :param template: the `Header` of a picture. What a picture's own header says: scale of the labels, whether there are
        boundaries and image edges, and the numbers of `_OWN` where they differ.
    :param label_prior, color_prior: what the coders of labels and colours start from. They come with the weights.
    """

    template: Header
    label_prior: object = None
    color_prior: object = None

    @functools.cached_property
    def file(self):
        """The bytes of the session's file: format, version and check in a line, then the template as JSON."""
        return _session_file(json.dumps(asdict(self.template.check()), indent=1).encode())

    @functools.cached_property
    def tag(self):
        """Two bytes by which a message names its session."""
        return hashlib.sha256(self.file).digest()[:2]

    @classmethod
    def load(cls, path, *priors):
        """Read a session's file. Raises InputError where it is missing, damaged, or no message can have its values."""
        try:
            data = Path(path).read_bytes()
            body = data.partition(b"\n")[2].removesuffix(b"\n")
            session = cls(_typed(Header, json.loads(body)), *priors) if _session_file(body) == data else None
            if session is None or session.file != data:
                raise InputError("damaged, or not of version 2")
            return session
        except (OSError, ValueError, AttributeError) as error:
            raise InputError(f"{path}: {error.args[-1]}; copy it from the transmitter's messages") from None

    def encode(self, message):
        """Return a message's parts in the order in which they are sent: {name: bytes}."""
        header, template = message.header, self.template
        labels = b""
        if message.label is not None:
            labels = encode_map(message.label, header.num_classes, self.label_prior)
        edges = _encode_edges(header, message.boundary, message.edges)
        choices = message.start_index, header.bank_size, message.codewords, header.step_candidates, header.step_atoms
        flags = SCALES.index(header.label_scale) | header.boundaries << 2 | (header.edge_levels > 0) << 3
        flags, numbers = flags | bool(edges) << 4, [len(labels), len(edges)] if edges else [len(labels)]
        for bit, names in enumerate(_OWN, 5):
            values = [getattr(header, name) for name in names]
            if values != [getattr(template, name) for name in names]:
                flags, numbers = flags | 1 << bit, numbers + values
        head = self.tag + b"".join(map(_leb128, [flags, *numbers]))
        return dict(zip(PARTS, (head, labels, edges, pack_choices(*choices), message.color), strict=True))

    def decode(self, parts, indices_prefix=b""):
        """Make a `Message`, with its `problems`, of parts, some of which the channel lost (None).

        :param indices_prefix: a beginning of the indices that is right, for when the whole is not.
        """
        try:
            header, lengths = self._read_header(io.BytesIO(parts.get("header") or b""))
        except InputError:
            return Message(None, problems=("header",))
        read = {"labels": None, "edges": (None, None), "color": parts.get("color") or b""}
        read["indices"], problems = unpack_choices(indices_prefix, *header.choices, prefix=True), []
        for name, length in lengths.items():
            try:
                read[name] = self._read(name, header, parts.get(name) or b"", length)
            except InputError:
                problems.append(name)
        problems += ["color"] * (parts.get("color") is None)
        return Message(header, read["labels"], *read["edges"], *read["indices"], read["color"], tuple(problems))

    def from_bytes(self, data):
        """Undo `encode` and `to_bytes`: return (`Message`, {part: bits}). InputError unless it is whole and valid."""
        if crc_hqx(data, _CRC) != _RIGHT:
            raise InputError(f"{len(data)} bytes that are no message, or damaged (CRC is wrong); send it again")
        file = io.BytesIO(data[:-CRC_BYTES])
        header, lengths = self._read_header(file)
        bits = {"header": 8 * (file.tell() + CRC_BYTES)} | {name: 8 * length for name, length in lengths.items()}
        label, edges, choices = (self._read(name, header, file.read(size), size) for name, size in lengths.items())
        color = file.read()
        return Message(header, label, *edges, *choices, color), bits | {"color": 8 * len(color)}

    def _read_header(self, file):
        """Return (`Header`, {part: length}); the color part is not among them: it is what is left."""
        tag, flags, labels = file.read(len(self.tag)), _number(file), _number(file)
        if tag != self.tag:
            found = f"the message is of session {tag.hex()}, {SESSION} is {self.tag.hex()}"
            raise InputError(f"{found}; take both from one transmitter's folder")
        own = {"label_scale": SCALES[flags & 3], "boundaries": flags & 4 > 0}
        own["edge_levels"] = self.template.edge_levels if flags & 8 else 0
        edges = _number(file) if flags & 16 else 0
        for bit, names in enumerate(_OWN, 5):
            own |= {name: _number(file) for name in names if flags >> bit & 1}
        header = replace(self.template, **own).check()
        return header, {"labels": labels, "edges": edges, "indices": -(-choice_bits(*header.choices) // 8)}

    def _read(self, name, header, data, length):
        """Read one part of the length that the header says: label, (boundary, edges), or (start index, codewords)."""
        if len(data) != length:
            raise InputError(f"the message's {name} part has {len(data)} of {length} bytes; send it again")
        if name == "labels":
            size = header.shape(header.label_scale)
            return decode_map(data, *size, header.num_classes, self.label_prior) if length else None
        return _read_edges(header, data) if name == "edges" else unpack_choices(data, *header.choices)


def _typed(kind, values):
    """Make a dataclass of values read from JSON; InputError names one that is missing, unknown or of another type."""
    types = {each.name: each.type for each in fields(kind)}
    for name in sorted(types.keys() | values.keys()):
        value, wanted = values.get(name), types.get(name)
        if wanted is SamplerSettings and isinstance(value, dict):
            values[name] = _typed(wanted, value)
        elif type(value) is not wanted and (type(value), wanted) != (int, float):
            raise InputError(f"{name} is {value!r}; must be {getattr(wanted, '__name__', 'left out')}")
    return kind(**values)


def to_bytes(parts):
    """Return the bytes of a message's file: its parts (dict) one after the other, and a CRC-16."""
    data = b"".join(parts.values())
    return data + (crc_hqx(data, _CRC) ^ _CRC).to_bytes(CRC_BYTES, "big")


def _leb128(number):
    return bytes([number]) if number < 128 else bytes([number & 127 | 128]) + _leb128(number >> 7)


def _number(file):
    """Read an unsigned LEB128 number, of at most four bytes."""
    number = 0
    for shift in (0, 7, 14, 21):
        byte = ord(file.read(1) or b"\xff")  # at the end: as if it went on
        number |= (byte & 127) << shift
        if byte < 128:
            return number
    raise InputError("the message is cut off, or a number in it is damaged; send it again")


def _encode_edges(header, boundary, edges):
    """Code the boundary plane (nothing, if it is empty), and the image edges behind it.

    With both, the length of the boundaries' bytes stands in front, as an unsigned LEB128 number.
    """
    first = encode_map(boundary, 2) if boundary is not None and boundary.any() else b""
    if edges is None:
        return first
    return (b"" if boundary is None else _leb128(len(first))) + first + encode_map(edges, header.edge_levels)


def _read_edges(header, data):
    """Undo `_encode_edges`: return (boundary, edges)."""
    file, boundary, edges = io.BytesIO(data), None, None
    if header.boundaries:
        first = file.read(_number(file) if header.edge_levels else -1)
        boundary = decode_map(first, *header.shape(1), 2).astype(bool) if first else np.zeros(header.shape(1), bool)
    if header.edge_levels:
        edges = decode_map(file.read(), *header.shape(header.edge_scale), header.edge_levels)
    return boundary, edges
