"""Messages: there and back, bits, lost parts, and thousands of damaged ones.

    python tests/test_message.py 10000

runs so many mutations and prints what became of them, the slowest reading and the growth of memory.
"""

import dataclasses
import random
import resource
import struct
import sys
import time
import zlib
from collections import Counter

import numpy as np
import pytest

from guided_diffusion.console import InputError
from guided_diffusion.link import source_coding
from guided_diffusion.link.message import CRC_BYTES, HEADER_BYTES, PARTS, Header, Message, read_header, receive_parts
from guided_diffusion.link.source_coding import choice_bits


def planes(height, width, values, seed=0, side=6):
    small = np.random.default_rng(seed).integers(0, values, (height // side + 1, width // side + 1))
    return np.kron(small, np.ones((side, side)))[:height, :width].astype(np.uint8)


def make(seed=0, **fields):
    """A message whose maps and choices are as its header says."""
    fields = {"height": 24, "width": 40, "num_classes": 35, "bank_size": 1000, "fingerprint": b"12345678"} | fields
    header, rng = Header(**fields), random.Random(seed)
    boundary = planes(header.height, header.width, 2, seed + 1).astype(bool) if header.boundaries else None
    edges = planes(*header.edge_shape, header.edge_levels, seed + 2, 2) if header.edge_levels else None
    codewords = tuple(
        (
            tuple(sorted(rng.sample(range(header.step_candidates), header.step_atoms))),
            tuple(rng.choice((-1, 1)) for _ in range(header.step_atoms)),
        )
        for _ in range(header.selected_steps)
    )
    start = rng.randrange(header.bank_size) if header.start_sent else None
    return Message(header, planes(*header.label_shape, header.num_classes, seed), boundary, edges, start, codewords)


SELECTED = {"selected_steps": 12, "step_candidates": 256, "step_atoms": 4, "steps": "20", "step_variance": "posterior"}
KINDS = [
    {},
    {"boundaries": True, "edge_levels": 2, **SELECTED},
    {"boundaries": True, "label_scale": 8, "start_sent": False},
    {
        "edge_levels": 256,
        "edge_scale": 4,
        "label_scale": 2,
        "stop_step": 17,
        "steps": "ddim50",
        "method": "ddim",
        "eta": 0.3,
    },
    {"edge_plane": False, "one_hot": False, "height": 23, "width": 37, "label_scale": 4, "num_classes": 183, "s": 1.7},
    {
        "bank_size": 1,
        "bank_seed": -(2**63),
        "clip_denoised": False,
        "precision": "bf16",
        "tail_steps": 9,
        "num_classes": 1,
    },
    {"method": "dpm++", "steps": "logsnr20", "tail_steps": 3},
    {"start_sent": False, **SELECTED, "selected_steps": 20, "step_atoms": 1, "edge_levels": 3, "edge_scale": 8},
]


# -- there and back ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", KINDS)
def test_from_bytes_is_the_inverse_of_to_bytes(fields):
    message = make(**fields)
    data = message.to_bytes()
    found = Message.from_bytes(data)
    assert found == message and found.to_bytes() == data
    for mine, theirs in (
        (message.label, found.label),
        (message.boundary, found.boundary),
        (message.edges, found.edges),
    ):
        assert (mine is None and theirs is None) or (mine.dtype == theirs.dtype and mine.shape == theirs.shape)
    assert read_header(data)[0] == message.header


@pytest.mark.parametrize("fields", KINDS)
def test_bits_are_the_bytes(fields):
    message = make(**fields)
    parts, bits = message.parts(), message.bits()
    assert list(parts) == list(PARTS) and b"".join(parts.values()) == message.to_bytes()
    assert bits == {name: 8 * len(part) for name, part in parts.items()} | {"total": 8 * len(message.to_bytes())}
    header = message.header
    assert bits["header"] == 8 * HEADER_BYTES
    start = header.bank_size if header.start_sent else 0
    choices = choice_bits(start, header.selected_steps, header.step_candidates, header.step_atoms)
    assert bits["indices"] == (8 * (-(-choices // 8) + CRC_BYTES) if choices else 0)
    assert (bits["edges"] == 0) == (not header.boundaries and not header.edge_levels)
    assert read_header(parts["header"])[1] == {name: len(parts[name]) for name in PARTS[1:]}


def test_equality_looks_into_the_maps():
    message = make(boundaries=True, edge_levels=2, **SELECTED)
    assert message == make(boundaries=True, edge_levels=2, **SELECTED) and message != "message"
    for change in (
        {"label": message.label + 1},
        {"boundary": ~message.boundary},
        {"boundary": None},
        {"edges": 1 - message.edges},
        {"start_index": 0},
        {"codewords": message.codewords[1:]},
        {"header": dataclasses.replace(message.header, s=2)},
    ):
        assert dataclasses.replace(message, **change) != message


def test_both_ends_use_the_rounded_guidance():
    message = make(s=1.1, eta=0.1)
    assert message.header.s == struct.unpack("f", struct.pack("f", 1.1))[0] != 1.1
    found = Message.from_bytes(message.to_bytes()).header
    assert (found.s, found.eta) == (message.header.s, message.header.eta)


@pytest.mark.parametrize(
    ("fields", "flags"),
    [
        ({}, 0b0001_1011),
        ({"method": "ddim"}, 0b0011_1011),
        (SELECTED, 0b0101_1011),
        ({"one_hot": False, "boundaries": True, "clip_denoised": False, "start_sent": False}, 0b0000_0110),
        ({"method": "dpm++"}, 0b1001_1011),
    ],
)
def test_the_bits_of_the_flag_byte(fields, flags):
    assert make(**fields).to_bytes()[9] == flags  # behind magic, version, height, width and classes


def test_two_samplers_at_once_mean_nothing():
    data = bytearray(make(method="ddim").to_bytes())
    data[9] |= 128
    with pytest.raises(InputError, match="bits that mean nothing"):
        read_header(reseal(data))


def test_an_empty_boundary_plane_costs_nothing():
    message = make(boundaries=True)
    empty = dataclasses.replace(message, boundary=np.zeros_like(message.boundary))
    assert empty.bits()["edges"] == 0 < message.bits()["edges"]
    assert Message.from_bytes(empty.to_bytes()) == empty
    both = make(boundaries=True, edge_levels=2)
    beside = dataclasses.replace(both, boundary=empty.boundary)
    alone = make(edge_levels=2)
    assert beside.bits()["edges"] == alone.bits()["edges"] + 8
    assert Message.from_bytes(beside.to_bytes()) == beside


def test_long_boundaries_beside_edges():
    rng = np.random.default_rng(0)
    message = make(boundaries=True, edge_levels=2, height=64, width=128)
    message = dataclasses.replace(message, boundary=rng.random((64, 128)) < 0.5)  # over 127 bytes
    assert Message.from_bytes(message.to_bytes()) == message


# -- what cannot be sent -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "fragment"),
    [
        ({"height": 0}, "height is 0; must be 1 to 8192"),
        ({"width": 8193}, "width is 8193"),
        ({"height": 8192, "width": 8192}, "8192x8192 pixels"),
        ({"num_classes": 257}, "num_classes is 257"),
        ({"bank_size": 0}, "bank_size is 0; must be 1"),
        ({"bank_seed": 2**63}, "bank_seed"),
        ({"label_scale": 3}, r"label_scale is 3; must be one of \(1, 2, 4, 8\)"),
        ({"precision": "fp8"}, "precision is 'fp8'"),
        ({"method": "euler"}, "method is 'euler'"),
        ({"edge_levels": 1}, "1 edge levels"),
        ({"edge_levels": 2, "edge_plane": False}, "edges need an edge plane"),
        ({"boundaries": True, "edge_plane": False}, "edges need an edge plane"),
        ({"eta": 1.5}, "eta is 1.5"),
        ({"s": 0.5}, "s is 0.5"),
        ({"s": float("nan")}, "s is nan"),
        ({"steps": "10,20"}, "--timestep_respacing 10,20: sections cannot be sent"),
        ({"steps": "ddim0"}, "sections cannot be sent"),
        ({"steps": "65536"}, "sections cannot be sent"),
        ({"steps": "50", "stop_step": 51}, "stop step 51, .* the chain has 50"),
        ({**SELECTED, "selected_steps": 21}, "21 selected"),
        ({**SELECTED, "bank_size": 255}, "4 atoms of 256 candidates in a bank of 255"),
        ({**SELECTED, "step_candidates": 3}, "4 atoms of 3 candidates"),
        ({**SELECTED, "step_atoms": 0}, "0 atoms of 256 candidates"),
        ({"method": "dpm++", "eta": 0.5}, r"dpm\+\+ with eta 0.5 and 0 selected steps; both must be 0"),
        ({**SELECTED, "method": "dpm++", "step_variance": "model"}, "with eta 0 and 12 selected steps; both must be 0"),
        ({"fingerprint": b"short"}, "fingerprint of 5 bytes"),
        ({"version": 2}, "version 2"),
    ],
)
def test_headers_that_cannot_be_sent(fields, fragment):
    header = Header(**{"height": 8, "width": 8, "num_classes": 3} | fields)
    with pytest.raises(InputError, match=fragment) as caught:
        Message(header, np.zeros((8, 8), np.uint8), start_index=0).to_bytes()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        ({"label": np.zeros((24, 41), np.uint8)}, r"label map of shape \(24, 41\); the header asks for \(24, 40\)"),
        ({"label": np.zeros((24, 40), np.int64)}, "label map .* 8-bit"),
        ({"label": np.full((24, 40), 35, np.uint8)}, "needs ids below 35"),
        ({"boundary": None}, "boundary plane of shape None"),
        ({"edges": np.zeros((24, 40), np.uint8)}, r"image edges of shape \(24, 40\); the header asks for \(12, 20\)"),
        ({"start_index": None}, "start index None .* asks for a start index and 12 codewords"),
        ({"start_index": 1000}, "noise index 1000"),
        ({"codewords": ()}, "0 codewords"),
    ],
)
def test_maps_that_are_not_as_the_header_says(change, fragment):
    message = dataclasses.replace(make(boundaries=True, edge_levels=2, edge_scale=2, **SELECTED), **change)
    with pytest.raises(InputError, match=fragment):
        message.to_bytes()


# -- damaged messages --------------------------------------------------------------------------------------------------


def test_a_file_of_another_kind_or_version():
    data = make().to_bytes()
    for other in (b"", b"\x89PNG" + bytes(200), data[:40]):
        with pytest.raises(InputError, match="no message begins"):
            Message.from_bytes(other)
    with pytest.raises(InputError, match="a message of version 9; this program reads version 1"):
        Message.from_bytes(data[:2] + b"\x09" + data[3:])


@pytest.mark.parametrize("fields", KINDS[:2])
def test_every_flipped_bit_is_noticed(fields):
    data = make(**fields).to_bytes()
    for at in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[at // 8] ^= 1 << at % 8
        with pytest.raises(InputError):
            Message.from_bytes(bytes(damaged))


def test_every_length_but_its_own_is_noticed():
    data = make(boundaries=True, edge_levels=2, **SELECTED).to_bytes()
    for size in range(len(data)):
        with pytest.raises(InputError):
            Message.from_bytes(data[:size])
    for more in (b"\0", b"more", data):
        with pytest.raises(InputError, match="but its header says"):
            Message.from_bytes(data + more)


def test_parts_of_two_messages_do_not_pass_as_one():
    mine, other = (make(boundaries=True, **SELECTED, s=s).parts() for s in (1, 2))
    for name in PARTS:
        with pytest.raises(InputError, match="are damaged"):
            Message.from_bytes(b"".join((mine | {name: other[name]}).values()))


# -- what a receiver makes of lost parts -------------------------------------------------------------------------------

WHOLE = make(boundaries=True, edge_levels=2, **SELECTED)


def test_whole_parts_are_the_message():
    for fields in KINDS:
        message = make(**fields)
        reception = receive_parts(message.parts())
        found = Message(
            reception.header,
            reception.label,
            reception.boundary,
            reception.edges,
            reception.start_index,
            reception.codewords,
        )
        assert found == message and reception.problems == ()


@pytest.mark.parametrize("lost", PARTS)
@pytest.mark.parametrize("how", ["none", "flipped", "short", "empty"])
def test_each_lost_part_costs_itself_alone(lost, how):
    parts = WHOLE.parts()
    part = parts[lost]
    parts[lost] = {"none": None, "flipped": bytes([part[0] ^ 1]) + part[1:], "short": part[:-1], "empty": b""}[how]
    reception = receive_parts(parts)
    assert reception.problems == (lost,)
    there = {
        "header": reception.header is not None,
        "labels": reception.label is not None,
        "edges": reception.boundary is not None and reception.edges is not None,
        "indices": reception.start_index is not None and len(reception.codewords) == 12,
    }
    assert there == {name: lost not in ("header", name) for name in PARTS}


def test_lost_indices_leave_their_beginning():
    parts = WHOLE.parts() | {"indices": None}
    indices = WHOLE.parts()["indices"]
    per_step = choice_bits(0, 1, 256, 4)
    for size in range(len(indices) + 1):
        reception = receive_parts(parts, indices[:size])
        whole = max(0, min(12, (8 * size - 10) // per_step))
        assert reception.problems == ("indices",)
        assert reception.start_index == (WHOLE.start_index if size >= 2 else None)
        assert reception.codewords == WHOLE.codewords[:whole]


def test_everything_lost():
    for parts in ({}, dict.fromkeys(PARTS), dict.fromkeys(PARTS, b"")):
        reception = receive_parts(parts, b"anything")
        assert reception.problems == ("header",) and reception.header is None and reception.codewords == ()


def test_a_missing_plugin_is_said(monkeypatch):
    def refuse(*_):
        raise source_coding.MissingPlugin("pip install pillow-jxl-plugin")

    monkeypatch.setattr(source_coding, "_from_lzma", refuse)
    monkeypatch.setattr(source_coding.entropy_coding, "MAX_PIXELS", 0)
    monkeypatch.setattr(source_coding, "jxl_available", lambda: False)
    parts = make().parts()
    with pytest.raises(InputError, match="pip install pillow-jxl-plugin"):
        receive_parts(parts)


# -- fuzzing -----------------------------------------------------------------------------------------------------------


def reseal(data, lengths=None):
    """Make every checksum right again, for parts of the lengths given or claimed."""
    data = bytearray(data)
    if len(data) < HEADER_BYTES:
        return bytes(data)
    if lengths:
        for k, length in enumerate(lengths):
            at = HEADER_BYTES - CRC_BYTES - 9 + 3 * k
            data[at : at + 3] = length.to_bytes(3, "little")
    head = zlib.crc32(data[: HEADER_BYTES - CRC_BYTES])
    data[HEADER_BYTES - CRC_BYTES : HEADER_BYTES] = head.to_bytes(CRC_BYTES, "little")
    at = HEADER_BYTES
    for k in range(3):
        field = HEADER_BYTES - CRC_BYTES - 9 + 3 * k
        end = at + int.from_bytes(data[field : field + 3], "little")
        if at + CRC_BYTES < end <= len(data):
            data[end - CRC_BYTES : end] = zlib.crc32(data[at : end - CRC_BYTES], head).to_bytes(CRC_BYTES, "little")
        at = end
    return bytes(data)


def flipped(rng, data, first=0):
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        data[rng.randrange(min(first, len(data) - 1), len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def oversized(rng, data):
    """Put a large or random value over a field or anywhere in the maps."""
    data, size = bytearray(data), rng.choice((1, 2, 3, 4, 8))
    at = rng.randrange(3, HEADER_BYTES - size) if rng.random() < 0.7 else rng.randrange(len(data) - size)
    data[at : at + size] = rng.choice(
        (b"\xff" * size, bytes(size), rng.randbytes(size), b"\x00\x20\x00\x08"[:size].ljust(size))
    )
    return bytes(data)


def resized(rng, data):
    """Claim another picture size."""
    height, width = rng.choice(
        ((8192, 2048), (4096, 4096), (256, 512), (24, 41), (rng.randrange(8193), rng.randrange(8193)))
    )
    return data[:3] + struct.pack("<HH", height, width) + data[7:]


def another_body(rng, data, message):
    """Replace a part's content by noise, a bomb or another map; checksums and lengths are right."""
    bodies = [part[:-CRC_BYTES] for part in list(message.parts().values())[1:]]
    bomb = source_coding.lzma.compress(
        bytes(2**20), source_coding.lzma.FORMAT_RAW, filters=source_coding._lzma_filters(2**20)
    )
    body = rng.choice(
        (
            rng.randbytes(rng.randrange(1, 400)),
            bytes([7, 1, 0, 1]) + bomb,  # a palette of two values, LZMA
            bytes([6, 1, 0, 1, *rng.randbytes(40)]),  # JPEG XL
            bytes([rng.randrange(32)]) + bodies[0],
            source_coding.encode_map(planes(*message.header.label_shape, 2, rng.randrange(100)), 35),
        )
    )
    bodies[rng.randrange(3)] = body
    parts = [body + bytes(CRC_BYTES) if body else body for body in bodies]
    return reseal(data[:HEADER_BYTES] + b"".join(parts), [len(part) for part in parts])


def mutate(rng, messages, originals):
    """Return (kind, data): one damaged message."""
    k = rng.randrange(len(originals))
    data, other = originals[k], rng.choice(originals)
    kind = rng.choice(
        (
            "truncated",
            "extended",
            "flipped",
            "spliced",
            "forged flip",
            "forged header",
            "forged claim",
            "forged size",
            "forged part",
        )
    )
    match kind:
        case "truncated":
            return kind, data[: rng.randrange(len(data))]
        case "extended":
            return kind, data + rng.randbytes(rng.randrange(1, 50))
        case "flipped":
            return kind, flipped(rng, data)
        case "spliced":
            at = rng.randrange(len(data))
            return kind, data[:at] + other[rng.choice((at, rng.randrange(len(other)))) :]
        case "forged flip":
            return kind, reseal(flipped(rng, data, HEADER_BYTES))
        case "forged header":
            return kind, reseal(flipped(rng, data[:HEADER_BYTES]) + data[HEADER_BYTES:])
        case "forged claim":
            return kind, reseal(oversized(rng, data))
        case "forged size":
            return kind, reseal(resized(rng, data))
        case "forged part":
            return kind, another_body(rng, data, messages[k])


def check_consistent(message):
    """A message that was accepted can be sent again, and is then itself."""
    header = message.header
    header.check()
    assert message.label.shape == header.label_shape and message.label.max() < header.num_classes
    assert (message.boundary is not None) == header.boundaries and (message.edges is not None) == (
        header.edge_levels > 0
    )
    if header.height * header.width <= 2**12:
        assert Message.from_bytes(message.to_bytes()) == message


def fuzz(count, seed=0):
    """Read `count` damaged messages; return (what became of them, seconds of the slowest, growth of memory in MB).

    Honest damage (checksums as they were) must be an InputError or leave the message as it was; forged checksums must give
    an InputError or a message that is consistent in itself.
    """
    rng = random.Random(seed)
    messages = [make(k, **fields) for k, fields in enumerate(KINDS)]
    originals = [message.to_bytes() for message in messages]
    outcomes, slowest, before = Counter(), 0.0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(count):
        kind, data = mutate(rng, messages, originals)
        started = time.perf_counter()
        try:
            found = Message.from_bytes(data)
        except InputError as error:
            assert "\n" not in str(error)
            found = None
        slowest = max(slowest, time.perf_counter() - started)
        if found is not None and not kind.startswith("forged"):
            assert data in originals and found == messages[originals.index(data)], (
                f"{kind}: wrong message passed as right"
            )
        elif found is not None:
            check_consistent(found)
        outcomes[kind, "refused" if found is None else "original" if data in originals else "another message"] += 1
        fuzz_reception(rng, data)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return outcomes, slowest, grown


def fuzz_reception(rng, data):
    """Give a receiver the parts that damaged bytes can be cut into, some lost: it must make something of them."""
    cuts = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    pieces = data[:HEADER_BYTES], data[HEADER_BYTES : cuts[0]], data[cuts[0] : cuts[1]], data[cuts[1] :]
    parts = {name: None if rng.random() < 0.2 else piece for name, piece in zip(PARTS, pieces, strict=True)}
    reception = receive_parts(parts, pieces[3])
    assert set(reception.problems) <= set(PARTS)
    assert ("labels" in reception.problems) == (reception.label is None and reception.header is not None)


def test_damaged_messages_are_refused_or_right():
    outcomes, _, _ = fuzz(2000)
    assert sum(outcomes.values()) == 2000
    kinds = {kind for kind, _ in outcomes}
    assert len(kinds) == 9 and all(outcomes[kind, "refused"] for kind in kinds)
    assert outcomes["forged header", "another message"]  # the checksums alone do not refuse everything here


if __name__ == "__main__":
    outcomes, slowest, grown = fuzz(int(sys.argv[1]))
    for (kind, what), count in sorted(outcomes.items()):
        print(f"{count:6d}  {kind}: {what}")
    print(f"slowest reading {slowest:.3f} s, peak memory grew by {grown:.0f} MB")
