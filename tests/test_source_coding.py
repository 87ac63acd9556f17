"""Maps and noise choices: there and back, sizes by closed forms, and what happens to damaged bytes."""

import itertools
import lzma
import math
import tracemalloc
from contextlib import suppress

import numpy as np
import pytest
from PIL import Image
from test_entropy_coding import blocks

from guided_diffusion.console import InputError
from guided_diffusion.link import source_coding
from guided_diffusion.link.source_coding import choice_bits, decode_map, encode_map, pack_choices, unpack_choices

CONSTANT, CONTEXT, JXL, LZMA, PACKED, LISTED = 0, 1, 2, 3, 11, 4  # as they stand in messages
needs_jxl = pytest.mark.skipif(source_coding.pillow_jxl is None, reason="pillow-jxl-plugin is not installed")


def slope(height, width):
    return ((np.arange(height)[:, None] * 3 + np.arange(width)) % 256).astype(np.uint8)


def containers(ids, num_values):
    """Every container of a map: {name: bytes}."""
    values = np.unique(ids)
    coded = source_coding._coded(np.searchsorted(values, ids).astype(np.uint8), values, num_values)
    return {data[0] & ~LISTED: data for data in coded}


IDS = np.array([0, 7, 8, 11, 13, 26], np.uint8)
MAPS = [(IDS[blocks(32, 64, 6, 6)], 35), (blocks(1, 9, 2, 1), 2), (slope(50, 70), 256)]
MAPS += [(blocks(40, 30, 256, 1), 256), (50 * blocks(20, 20, 4), 151)]
CODED = containers(IDS[blocks(24, 40, 4, 6)], 35)


@pytest.mark.parametrize(("ids", "num_values"), MAPS)
def test_encode_map_keeps_the_smallest_container(ids, num_values):
    data, each = encode_map(ids, num_values), containers(ids, num_values)
    assert len(data) == min(map(len, each.values())) and {LZMA, PACKED} <= set(each)
    for coded in (data, *each.values()):
        found = decode_map(coded, *ids.shape, num_values)
        assert found.dtype == np.uint8 and np.array_equal(found, ids)


def test_encode_map_of_scenes_is_the_context_coder_and_much_less_than_png(tmp_path):
    ids = IDS[blocks(64, 128, 6, 16)]
    Image.fromarray(ids).save(tmp_path / "ids.png", optimize=True)
    data = encode_map(ids, 35)
    assert data[0] & 3 == CONTEXT and len(data) < 0.6 * (tmp_path / "ids.png").stat().st_size
    assert encode_map(np.full((300, 500), 34, np.uint8), 35) == bytes([CONSTANT, 34])
    with pytest.raises(InputError, match="ids up to 26: needs ids below 20"):
        encode_map(ids, 20)


@pytest.mark.parametrize("coded", CODED.values(), ids=map(str, CODED))
def test_decode_map_of_damage_is_an_error_or_a_valid_map(coded):
    rng, number = np.random.default_rng(0), int.from_bytes(coded, "little")
    flips = [sum(1 << int(at) for at in rng.integers(0, 8 * len(coded), 2)) for _ in range(100)]
    flipped = [(number ^ bits).to_bytes(len(coded) + 1, "little")[: len(coded)] for bits in flips]
    for damaged in [*flipped, b"", coded[:1], coded[:4], coded[:-1], coded + coded]:
        with suppress(InputError):
            found = decode_map(damaged, 24, 40, 35)
            assert found.shape == (24, 40) and found.max() < 35


def test_decode_map_refuses_damaged_containers_and_palettes():
    body = CODED[LZMA][6:]  # behind the container, and a bitmap of five bytes
    short = (b"", bytes([CONSTANT, 35]), bytes([CONSTANT | 8, 1]), bytes([CONSTANT, 1, 1]))
    palettes = ([1, 3, 3], [1, 3, 2], [1, 3, 35], [0, 3], [200, 1, 2], [2, 1, 3, 9])  # the last lacks symbol 3
    for data in (*short, *(bytes([LZMA | LISTED, *listed]) + body for listed in palettes)):
        with pytest.raises(InputError, match="send it again"):
            decode_map(data, 24, 40, 35)


def test_decode_map_takes_no_memory_for_a_bomb():
    bomb = lzma.compress(bytes(2**24), **source_coding._lzma_options(2**24))
    tracemalloc.start()
    with pytest.raises(InputError, match="no map of 40x24 pixels"):
        decode_map(CODED[LZMA][:6] + bomb, 24, 40, 35)
    assert len(bomb) < 20_000 and tracemalloc.get_traced_memory()[1] < 10**6
    tracemalloc.stop()


@needs_jxl
@pytest.mark.parametrize("size", [(8, 8), (1, 1), (16, 9), (256, 341), (264, 330), (300, 513), (100, 1030)])
def test_jxl_head_is_that_of_the_plugin(size):
    for symbols in (slope(*size) % 5, blocks(*size, 200, 3)):
        ((container, body),) = source_coding._to_jxl(symbols).items()
        assert np.array_equal(source_coding._from_jxl(body, *size, container >> 3), symbols)


@needs_jxl
def test_encode_map_without_the_plugin_or_with_another_head(monkeypatch):
    smooth = slope(50, 70)
    coded = encode_map(smooth, 256)
    assert coded[0] & 3 == JXL
    for name, value in (("_jxl_head", lambda *_: b"another"), ("pillow_jxl", None)):
        monkeypatch.setattr(source_coding, name, value)
        data = encode_map(smooth, 256)
        assert data[0] & 3 != JXL and np.array_equal(decode_map(data, 50, 70, 256), smooth)
    with pytest.raises(InputError, match="pip install pillow-jxl-plugin"):
        decode_map(coded, 50, 70, 256)


def random_codewords(steps, candidates, atoms):
    rng = np.random.default_rng(0)
    indices = [sorted(rng.choice(candidates, atoms, replace=False).tolist()) for _ in range(steps)]
    return tuple((tuple(each), tuple(rng.choice([-1, 1], atoms).tolist())) for each in indices)


def test_pack_choices_ranks_all_index_sets():
    sets = sorted(itertools.combinations(range(6), 3), key=lambda indices: indices[::-1])
    packed = [pack_choices(None, 0, [(indices, (1, 1, 1))], 6, 3) for indices in sets]
    assert [data[0] for data in packed] == [rank << 3 for rank in range(20)]  # 5 bits, then 3 signs
    assert [unpack_choices(data, 0, 1, 6, 3)[1][0][0] for data in packed] == sets


@pytest.mark.parametrize(
    ("bank_size", "start", "steps", "candidates", "atoms"),
    [(1000, 999, 50, 1000, 64), (1000, 0, 0, 0, 0), (1, 0, 0, 0, 0), (0, None, 50, 256, 1), (3, 2, 5, 16, 16)],
)
def test_pack_choices_comes_back_at_the_closed_forms_size(bank_size, start, steps, candidates, atoms):
    codewords = random_codewords(steps, candidates, atoms)
    data = pack_choices(start, bank_size, codewords, candidates, atoms)
    per_step = math.ceil(math.log2(math.comb(candidates, atoms))) + atoms
    bits = (math.ceil(math.log2(bank_size)) if bank_size else 0) + steps * per_step
    assert choice_bits(bank_size, steps, candidates, atoms) == bits and len(data) == math.ceil(bits / 8)
    assert unpack_choices(data, bank_size, steps, candidates, atoms) == (start, codewords)


def test_unpack_choices_of_a_beginning_gives_its_whole_steps():
    codewords = random_codewords(9, 16, 2)  # 7 + 2 bits a step, behind 10
    data = pack_choices(700, 1000, codewords, 16, 2)
    for size in range(len(data) + 1):
        whole = max(0, min(9, (8 * size - 10) // 9))
        expected = (700, codewords[:whole]) if size >= 2 else (None, ())
        assert unpack_choices(data[:size], 1000, 9, 16, 2, prefix=True) == expected


def test_unpack_choices_refuses_damage():
    codewords = random_codewords(3, 5, 2)  # 10 sets in 4 bits, 2 signs: 18 bits
    data = pack_choices(None, 0, codewords, 5, 2)
    beyond = bytes([data[0], data[1] & 0xF0 | 0x0F, data[2] | 0xC0])  # the third step has no set of that rank
    for damaged in (b"", data[:-1], data + b"\0", beyond, data[:-1] + bytes([data[-1] | 1])):
        with pytest.raises(InputError, match="noise choices"):
            unpack_choices(damaged, 0, 3, 5, 2)
    assert unpack_choices(beyond, 0, 3, 5, 2, prefix=True) == (None, codewords[:2])
    for damaged in (b"", b"\xff", b"\xff\xc0"):  # 1023, of a bank of 1000
        with pytest.raises(InputError, match="damaged"):
            unpack_choices(damaged, 1000, 0, 0, 0)
        assert unpack_choices(damaged, 1000, 9, 5, 2, prefix=True) == (None, ())
