"""Sessions and messages: there and back, bits, lost parts, and damaged ones."""

import dataclasses
import itertools
import json
import random
from binascii import crc_hqx
from collections import Counter

import numpy as np
import pytest
from test_entropy_coding import blocks

from guided_diffusion.console import InputError
from guided_diffusion.diffusion.solvers import SamplerSettings
from guided_diffusion.link.message import CRC_BYTES, PARTS, SESSION, Header, Message, Session, _session_file, to_bytes
from guided_diffusion.link.source_coding import choice_bits


def make(seed=0, sampler=None, color=b"", own=None, **fields):
    """A session, and one of its messages, whose maps and choices are as its header says; `own`: not the session's."""
    size = {"height": 24, "width": 40, "num_classes": 35, "bank_size": 1000}
    fields = {**size, "fingerprint": "0123456789abcdef", **fields}
    session, rng = Session(Header(sampler=SamplerSettings(**sampler or {}), **fields)), random.Random(seed)
    header = dataclasses.replace(session.template, **own or {})
    boundary = blocks(header.height, header.width, 2, 6, seed + 1).astype(bool) if header.boundaries else None
    edges = blocks(*header.shape(header.edge_scale), header.edge_levels, 2, seed + 2) if header.edge_levels else None
    atoms, codewords = header.step_atoms, []
    for _ in range(header.selected_steps):
        indices = sorted(rng.sample(range(header.step_candidates), atoms))
        codewords.append((tuple(indices), tuple(rng.choice((-1, 1)) for _ in range(atoms))))
    start = rng.randrange(header.bank_size) if header.start_sent else None
    label = blocks(*header.shape(header.label_scale), header.num_classes, 6, seed)
    return session, Message(header, label, boundary, edges, start, tuple(codewords), color)


def coded(session, message):
    return to_bytes(session.encode(message))


def same(mine, theirs):
    """Whether two messages say the same."""
    maps = ((mine.label, theirs.label), (mine.boundary, theirs.boundary), (mine.edges, theirs.edges))
    equal = all(a is b if a is None or b is None else a.dtype == b.dtype and np.array_equal(a, b) for a, b in maps)
    rest = ((m.header, m.start_index, m.codewords, m.color, m.problems) for m in (mine, theirs))
    return equal and len({*rest}) == 1


SELECTED = {"selected_steps": 12, "step_candidates": 256, "step_atoms": 4}
FEWER = {"selected_steps": 5}
PER_STEP = {"sampler": {"steps": "20", "variance": "posterior"}, **SELECTED}
SMALL = {"edge_plane": False, "one_hot": False, "height": 23, "width": 37, "label_scale": 4, "num_classes": 183}
KINDS = [
    {},
    {"boundaries": True, "edge_levels": 2, **PER_STEP, "color": b"\x1a some of a colour layer"},
    {"boundaries": True, "label_scale": 8, "start_sent": False},
    {"edge_levels": 256, "edge_scale": 4, "sampler": {"method": "ddim", "eta": 0.3, "steps": "10,20"}},
    {**SMALL, "sampler": {"s": 1.7}, "own": {"height": 31, "stop_step": 300, "label_scale": 1}},
    {"bank_size": 1, "bank_seed": -(2**63), "precision": "bf16", "num_classes": 1, "sampler": {"clip_denoised": False}},
    {"sampler": {"method": "dpm++", "steps": "logsnr20", "tail_steps": 3}, "color": b"c"},
    {"start_sent": False, **PER_STEP, "selected_steps": 20, "step_atoms": 1, "edge_levels": 3, "edge_scale": 8},
    {**PER_STEP, "edge_levels": 9, "own": {"selected_steps": 3, "edge_levels": 0, "boundaries": True, "width": 8000}},
]
SESSION_OF_WHOLE, WHOLE = make(**KINDS[1])
PARTS_OF_WHOLE = SESSION_OF_WHOLE.encode(WHOLE)


@pytest.mark.parametrize("fields", KINDS)
def test_message_from_bytes_is_the_inverse_of_to_bytes(fields):
    session, message = make(**fields)
    parts = session.encode(message)
    found, bits = session.from_bytes(to_bytes(parts))
    assert same(found, message) and same(session.decode(parts), message)
    assert list(parts) == list(bits) == list(PARTS) and to_bytes(parts)[:-CRC_BYTES] == b"".join(parts.values())
    assert bits == {name: 8 * len(part) for name, part in parts.items()} | {"header": 8 * len(parts["header"]) + 16}


def test_message_bytes_are_few():
    # A typical picture of CamVid at 128x256: boundaries within classes, no image edges.
    for own, size in (({"boundaries": False}, 7), ({}, 9), ({"stop_step": 40}, 10), ({"height": 96, **FEWER}, 17)):
        session, message = make(height=128, width=256, boundaries=True, **PER_STEP, own=own)
        parts = session.encode(message)
        assert len(parts["labels"]) > 127 and (len(parts["edges"]) > 127 or not parts["edges"])  # lengths of two bytes
        assert len(parts["header"]) + CRC_BYTES == size
        steps = message.header.selected_steps
        assert len(parts["indices"]) == -(-choice_bits(1000, steps, 256, 4) // 8)
    none = session.encode(dataclasses.replace(message, boundary=np.zeros_like(message.boundary)))
    assert none["edges"] == b""  # a part with nothing to say is no bytes at all
    assert session.decode(none).boundary is not None and not session.decode(none).boundary.any()
    assert len(session.file) < 1000


def test_session_file_there_and_back(tmp_path):
    for number, fields in enumerate(KINDS):
        session = make(**fields)[0]
        (tmp_path / str(number)).write_bytes(session.file)
        again = Session.load(tmp_path / str(number), None, "prior")
        assert again.template == session.template and again.tag == session.tag and again.color_prior == "prior"
    assert len({make(**fields)[0].tag for fields in KINDS}) == len(KINDS)
    names = json.loads(session.file.partition(b"\n")[2])["sampler"]
    assert [*names] == [each.name for each in dataclasses.fields(SamplerSettings)]


def test_session_file_that_is_missing_or_damaged(tmp_path):
    path, data = tmp_path / SESSION, SESSION_OF_WHOLE.file
    damaged = [data[:k] + bytes([data[k] ^ 1 << k % 8]) + data[k + 1 :] for k in range(len(data))]
    for each in (None, b"", b"\x89PNG\n[]", data[:-1], data + b" ", *damaged):
        if each is not None:
            path.write_bytes(each)
        words = "No such file" if each is None else "damaged"
        with pytest.raises(InputError, match=f"{path}: {words}.*; copy it from the transmitter") as caught:
            Session.load(path)
        assert "\n" not in str(caught.value)


WRONG = {
    "height is '24'; must be int": {"height": "24"},
    "height is True; must be int": {"height": True},
    "width is 0; must be 1 to 8192": {"width": 0},
    "fingerprint is 5; must be str": {"fingerprint": 5},
    "sampler is 5; must be SamplerSettings": {"sampler": 5},
    "further is 5; must be left out": {"further": 5},
    "--s 0.5: the guidance scale": {"s": 0.5},
    "--s nan: the guidance scale": {"s": float("nan")},
    "s is None; must be float": {"s": None},
    "variance is 'none'; must be one of": {"variance": "none"},
    "precision is 'fp8'; must be one of": {"precision": "fp8"},
}


@pytest.mark.parametrize("words", WRONG)
def test_session_with_values_of_another_kind_is_refused(words, tmp_path):
    values = dataclasses.asdict(SESSION_OF_WHOLE.template)
    for name, value in WRONG[words].items():
        (values["sampler"] if name in values["sampler"] else values)[name] = value
    (tmp_path / SESSION).write_bytes(_session_file(json.dumps(values).encode()))
    with pytest.raises(InputError) as caught:
        Session.load(tmp_path / SESSION)
    assert words in str(caught.value) and str(tmp_path / SESSION) in str(caught.value)


UNSENDABLE = {
    "height is 0; must be 1 to 8192": {"height": 0},
    "8192x8192 pixels": {"height": 8192, "width": 8192},
    "label_scale is 3; must be one of (1, 2, 4, 8)": {"label_scale": 3},
    "edge_levels is 257; must be 0 to 256": {"edge_levels": 257},
    "4 of 256 of 255 entries": {**SELECTED, "bank_size": 255},
    "4 of 3 of 1000 entries": {**SELECTED, "step_candidates": 3},
}


@pytest.mark.parametrize("named", UNSENDABLE)
def test_header_check_names_what_cannot_be_sent(named):
    header = Header(**{"height": 8, "width": 8, "num_classes": 3} | UNSENDABLE[named])
    for check in (header.check, lambda: Session(header).tag):
        with pytest.raises(InputError) as caught:
            check()
        assert named in str(caught.value) and "\n" not in str(caught.value)


def test_message_of_another_session_or_kind_or_length():
    data, other = coded(SESSION_OF_WHOLE, WHOLE), make(**KINDS[1] | {"bank_seed": 151})[0]
    with pytest.raises(InputError, match=r"is of session .*; take both from one transmitter's folder"):
        other.from_bytes(data)
    assert other.decode(PARTS_OF_WHOLE).problems == ("header",)
    for bad in (b"", b"\x89PNG" + bytes(200), data[:40], data[:-1], data + b"\0", data + data):
        with pytest.raises(InputError, match="no message, or damaged"):
            SESSION_OF_WHOLE.from_bytes(bad)


@pytest.mark.parametrize("lost", PARTS)
@pytest.mark.parametrize("damage", [lambda part: None, lambda part: part[:-1], lambda part: b""])
def test_decode_loses_a_lost_part_alone(lost, damage):
    damaged = damage(PARTS_OF_WHOLE[lost])
    found = SESSION_OF_WHOLE.decode(PARTS_OF_WHOLE | {lost: damaged})
    if lost == "color" and damaged is not None:  # its length is not known: only the channel can say that it is lost
        assert found.problems == () and found.color == damaged
        return
    there = {
        "header": found.header is not None,
        "labels": found.label is not None,
        "edges": found.boundary is not None and found.edges is not None,
        "indices": found.start_index is not None and len(found.codewords) == 12,
        "color": found.color != b"",
    }
    assert found.problems == (lost,) and there == {name: lost not in ("header", name) for name in PARTS}


def with_right_crc(data):
    body = data[:-CRC_BYTES]
    return body + (crc_hqx(body, 0xFFFF) ^ 0xFFFF).to_bytes(CRC_BYTES, "big")


def flipped(rng, data, first=0, last=None):
    bits = sum(1 << rng.randrange(8 * first, 8 * (last or len(data))) for _ in range(rng.choice((1, 1, 2, 8))))
    return (int.from_bytes(data, "little") ^ bits).to_bytes(len(data) + 1, "little")[: len(data)]


MUTATIONS = {
    "truncated": lambda rng, data, other: data[: rng.randrange(len(data))],
    "extended": lambda rng, data, other: data + rng.randbytes(rng.randrange(1, 50)),
    "flipped": lambda rng, data, other: flipped(rng, data),
    "spliced": lambda rng, data, other: data[: len(data) // 2] + other[len(data) // 2 :],
    "other session": lambda rng, data, other: other,
    "forged flip": lambda rng, data, other: with_right_crc(flipped(rng, data, 2)),
    "forged header": lambda rng, data, other: with_right_crc(flipped(rng, data, 2, 8)),
    "forged numbers": lambda rng, data, other: with_right_crc(data[:2] + rng.randbytes(6) + data[8:]),
}


def test_message_fuzz(count=1000):
    # Honest damage (the CRC as it was) is an InputError or leaves the message as it was, a forged CRC gives an
    # InputError or a message that is consistent in itself, and a receiver makes something of any parts.
    rng, outcomes = random.Random(0), Counter()
    originals = [(*made, coded(*made)) for made in (make(k, **fields) for k, fields in enumerate(KINDS))]
    for _ in range(count):
        kind, (session, message, right), found = rng.choice(list(MUTATIONS)), rng.choice(originals), None
        data = MUTATIONS[kind](rng, right, rng.choice(originals)[2])
        try:
            found, _ = session.from_bytes(data)
        except InputError as error:
            assert "\n" not in str(error)
        if found is not None and not kind.startswith("forged"):
            assert data == right and same(found, message), f"{kind}: passed as right"
        elif found is not None and found.header.height * found.header.width <= 2**12:
            assert same(session.from_bytes(coded(session, found))[0], found), f"{kind}: not consistent"
        outcomes[kind, found is None] += 1
        cuts = [0, *sorted(rng.randrange(len(data) + 1) for _ in range(3)), len(data)]
        if rng.random() < 0.5:
            cuts[1] = min(len(session.encode(message)["header"]), len(data)) if kind != "truncated" else cuts[1]
        pieces = [data[a:b] if rng.random() < 0.8 else None for a, b in itertools.pairwise(cuts)]
        received = session.decode(dict(zip(PARTS, pieces, strict=False)), right[-9:])
        assert received.label is None or "labels" not in received.problems
    assert all(outcomes[kind, True] for kind in MUTATIONS)
    assert outcomes["forged header", False]  # the CRC alone does not refuse everything here
