"""Messages: there and back, bits, lost parts, and damaged ones."""

import random
import struct
import zlib
from collections import Counter

import numpy as np
import pytest

from guided_diffusion.console import InputError
from guided_diffusion.diffusion.solvers import SamplerSettings
from guided_diffusion.link.message import CRC_BYTES, HEADER_BYTES, PARTS, Header, Message, read_header, receive_parts
from guided_diffusion.link.source_coding import choice_bits


def planes(height, width, values, seed=0, side=6):
    small = np.random.default_rng(seed).integers(0, values, (height // side + 1, width // side + 1))
    return np.kron(small, np.ones((side, side)))[:height, :width].astype(np.uint8)


def make(seed=0, sampler=None, **fields):
    """A message whose maps and choices are as its header says."""
    fields = {"height": 24, "width": 40, "num_classes": 35, "bank_size": 1000, "fingerprint": b"12345678"} | fields
    header, rng = Header(sampler=SamplerSettings(**sampler or {}), **fields), random.Random(seed)
    boundary = planes(header.height, header.width, 2, seed + 1).astype(bool) if header.boundaries else None
    edges = planes(*header.shape(header.edge_scale), header.edge_levels, seed + 2, 2) if header.edge_levels else None
    atoms, codewords = header.step_atoms, []
    for _ in range(header.selected_steps):
        indices = sorted(rng.sample(range(header.step_candidates), atoms))
        codewords.append((tuple(indices), tuple(rng.choice((-1, 1)) for _ in range(atoms))))
    start = rng.randrange(header.bank_size) if header.start_sent else None
    label = planes(*header.shape(header.label_scale), header.num_classes, seed)
    return Message(header, label, boundary, edges, start, tuple(codewords))


def same(mine, theirs):
    """Whether two messages say the same."""
    maps = ((mine.label, theirs.label), (mine.boundary, theirs.boundary), (mine.edges, theirs.edges))
    equal = all(a is b if a is None or b is None else a.dtype == b.dtype and np.array_equal(a, b) for a, b in maps)
    rest = ((m.header, m.start_index, m.codewords, m.problems) for m in (mine, theirs))
    return equal and len({*rest}) == 1


SELECTED = {"selected_steps": 12, "step_candidates": 256, "step_atoms": 4}
PER_STEP = {"sampler": {"steps": "20", "variance": "posterior"}, **SELECTED}
SMALL = {"edge_plane": False, "one_hot": False, "height": 23, "width": 37, "label_scale": 4, "num_classes": 183}
KINDS = [
    {},
    {"boundaries": True, "edge_levels": 2, **PER_STEP},
    {"boundaries": True, "label_scale": 8, "start_sent": False},
    {"edge_levels": 256, "edge_scale": 4, "stop_step": 17, "sampler": {"method": "ddim", "eta": 0.3, "steps": "50"}},
    {**SMALL, "sampler": {"s": 1.7}},
    {"bank_size": 1, "bank_seed": -(2**63), "precision": "bf16", "num_classes": 1, "sampler": {"clip_denoised": False}},
    {"sampler": {"method": "dpm++", "steps": "logsnr20", "tail_steps": 3}},
    {"start_sent": False, **PER_STEP, "selected_steps": 20, "step_atoms": 1, "edge_levels": 3, "edge_scale": 8},
]
WHOLE = make(**KINDS[1])


@pytest.mark.parametrize("fields", KINDS)
def test_message_from_bytes_is_the_inverse_of_to_bytes(fields):
    message = make(**fields)
    data, parts = message.to_bytes(), message.parts
    assert same(Message.from_bytes(data), message) and same(receive_parts(parts), message)
    assert list(parts) == list(PARTS) and b"".join(parts.values()) == data
    lengths = {name: len(part) for name, part in parts.items()}
    assert read_header(data) == (message.header, {name: lengths[name] for name in PARTS[1:]})


def test_message_bits_are_those_of_the_bytes():
    bits = WHOLE.bits()
    assert bits["total"] == sum(bits[name] for name in PARTS) == 8 * len(WHOLE.to_bytes())
    assert bits["header"] == 8 * HEADER_BYTES
    assert bits["indices"] == 8 * (-(-choice_bits(1000, 12, 256, 4) // 8) + CRC_BYTES)
    assert make().bits()["edges"] == 0  # a part with nothing to say is no bytes at all
    large = make(height=100, width=300, boundaries=True, edge_levels=200)  # the boundaries' length takes two bytes
    assert same(Message.from_bytes(large.to_bytes()), large) and large.bits()["edges"] > 8 * 255


UNSENDABLE = {
    "height is 0; must be 1 to 8192": {"height": 0},
    "8192x8192 pixels": {"height": 8192, "width": 8192},
    "label_scale is 3; must be one of (1, 2, 4, 8)": {"label_scale": 3},
    "--timestep_respacing 10,20: cannot be sent": {"sampler": SamplerSettings(steps="10,20")},
    "4 of 256 of 255 entries": {**SELECTED, "bank_size": 255},
    "4 of 3 of 1000 entries": {**SELECTED, "step_candidates": 3},
}


@pytest.mark.parametrize("named", UNSENDABLE)
def test_header_check_names_what_cannot_be_sent(named):
    with pytest.raises(InputError) as caught:
        Header(**{"height": 8, "width": 8, "num_classes": 3} | UNSENDABLE[named]).check()
    assert named in str(caught.value) and "\n" not in str(caught.value)


def test_message_of_another_kind_version_or_length():
    data = WHOLE.to_bytes()
    others = dict.fromkeys(
        (b"", b"\x89PNG" + bytes(200), data[:40], data[:2] + b"\x09" + data[3:]), "are no message of"
    )
    others |= dict.fromkeys((data[:-1], data + b"\0", data + data), "but its header says")
    for other, words in others.items():
        with pytest.raises(InputError, match=words):
            Message.from_bytes(other)


@pytest.mark.parametrize("fields", KINDS[:2])
def test_message_with_any_flipped_bit_is_refused(fields):
    data = make(**fields).to_bytes()
    number = int.from_bytes(data, "little")
    for at in range(8 * len(data)):
        with pytest.raises(InputError):
            Message.from_bytes((number ^ 1 << at).to_bytes(len(data), "little"))


def test_message_of_parts_of_two_is_refused():
    mine, other = (make(**PER_STEP | {"boundaries": True, "stop_step": stop}).parts for stop in (1, 2))
    for name in PARTS:
        with pytest.raises(InputError, match="is damaged"):
            Message.from_bytes(b"".join((mine | {name: other[name]}).values()))


@pytest.mark.parametrize("lost", PARTS)
@pytest.mark.parametrize("damage", [lambda part: None, lambda part: bytes([part[0] ^ 1]) + part[1:], lambda part: b""])
def test_receive_parts_loses_a_lost_part_alone(lost, damage):
    found = receive_parts(WHOLE.parts | {lost: damage(WHOLE.parts[lost])})
    there = {
        "header": found.header is not None,
        "labels": found.label is not None,
        "edges": found.boundary is not None and found.edges is not None,
        "indices": found.start_index is not None and len(found.codewords) == 12,
    }
    assert found.problems == (lost,) and there == {name: lost not in ("header", name) for name in PARTS}


def test_receive_parts_keeps_the_beginning_of_lost_indices():
    parts, indices = WHOLE.parts | {"indices": None}, WHOLE.parts["indices"]
    for size in range(len(indices) + 1):
        found = receive_parts(parts, indices[:size])
        whole = max(0, min(12, (8 * size - 10) // choice_bits(0, 1, 256, 4)))
        assert found.problems == ("indices",) and found.codewords == WHOLE.codewords[:whole]
        assert found.start_index == (WHOLE.start_index if size >= 2 else None)


def with_right_crcs(data):
    """Make every CRC right again."""
    if len(data) < HEADER_BYTES:
        return data
    head = data[: HEADER_BYTES - CRC_BYTES]
    crc = zlib.crc32(head)
    parts, at = [head + crc.to_bytes(CRC_BYTES, "little")], HEADER_BYTES
    for k in (9, 6, 3):
        size = int.from_bytes(head[len(head) - k :][:3], "little")
        body = data[at : at + size - CRC_BYTES] if size else b""
        parts.append(body and body + zlib.crc32(body, crc).to_bytes(CRC_BYTES, "little"))
        at += size
    return b"".join(parts)


def flipped(rng, data, first=0):
    bits = sum(1 << rng.randrange(8 * first, 8 * len(data)) for _ in range(rng.choice((1, 1, 2, 8))))
    return (int.from_bytes(data, "little") ^ bits).to_bytes(len(data) + 1, "little")[: len(data)]


def resized(rng, data):
    """Claim another picture size."""
    sizes = ((8192, 2048), (4096, 4096), (256, 512), (24, 41), (rng.randrange(8193), rng.randrange(8193)))
    return data[:3] + struct.pack("<HH", *rng.choice(sizes)) + data[7:]


MUTATIONS = {
    "truncated": lambda rng, data, other: data[: rng.randrange(len(data))],
    "extended": lambda rng, data, other: data + rng.randbytes(rng.randrange(1, 50)),
    "flipped": lambda rng, data, other: flipped(rng, data),
    "spliced": lambda rng, data, other: data[: len(data) // 2] + other[len(data) // 2 :],
    "forged flip": lambda rng, data, other: with_right_crcs(flipped(rng, data, HEADER_BYTES)),
    "forged header": lambda rng, data, other: with_right_crcs(flipped(rng, data[:HEADER_BYTES]) + data[HEADER_BYTES:]),
    "forged size": lambda rng, data, other: with_right_crcs(resized(rng, data)),
}


def test_message_fuzz():
    # Honest damage (CRCs as they were) is an InputError or leaves the message as it was, forged CRCs give an InputError
    # or a message that is consistent in itself, and a receiver makes something of any parts.
    rng, outcomes = random.Random(0), Counter()
    originals = {make(k, **fields).to_bytes(): make(k, **fields) for k, fields in enumerate(KINDS)}
    for _ in range(1000):
        kind = rng.choice(list(MUTATIONS))
        data, found = MUTATIONS[kind](rng, rng.choice(list(originals)), rng.choice(list(originals))), None
        try:
            found = Message.from_bytes(data)
        except InputError as error:
            assert "\n" not in str(error)
        if found is not None and not kind.startswith("forged"):
            assert data in originals and same(found, originals[data]), f"{kind}: passed as right"
        elif found is not None and found.header.height * found.header.width <= 2**12:
            assert same(Message.from_bytes(found.to_bytes()), found), f"{kind}: not consistent"
        outcomes[kind, found is None] += 1
        first, second = sorted(rng.randrange(len(data) + 1) for _ in range(2))
        parts = {"header": data[:HEADER_BYTES], "labels": data[HEADER_BYTES:first], "edges": data[first:second]}
        received = receive_parts(parts, data[second:])
        assert ("labels" in received.problems) == (received.label is None and received.header is not None)
    assert all(outcomes[kind, True] for kind in MUTATIONS)
    assert outcomes["forged header", False]  # the CRCs alone do not refuse everything here
