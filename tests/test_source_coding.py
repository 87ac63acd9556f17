"""Maps and noise choices: there and back, sizes by closed forms, and what happens to damaged bytes."""

import itertools
import lzma
import math
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from guided_diffusion.console import InputError
from guided_diffusion.link import source_coding
from guided_diffusion.link.source_coding import (
    CONSTANT,
    CONTEXT,
    JXL,
    LZMA,
    choice_bits,
    decode_map,
    encode_map,
    jxl_available,
    pack_choices,
    unpack_choices,
)

needs_jxl = pytest.mark.skipif(not jxl_available(), reason="pillow-jxl-plugin is not installed")


def blocks(height, width, values, side=6, seed=0):
    small = np.random.default_rng(seed).choice(values, (height // side + 1, width // side + 1))
    return np.kron(small, np.ones((side, side)))[:height, :width].astype(np.uint8)


def slope(height, width):
    return ((np.arange(height)[:, None] * 3 + np.arange(width)) % 256).astype(np.uint8)


def containers(ids, num_values):
    """Every container of a map: {(container, option): bytes}."""
    values = np.unique(ids)
    table = np.zeros(256, np.uint8)
    table[values] = np.arange(len(values))
    coded = source_coding._coded(table[ids], values, num_values)
    return {(data[0] & 3, data[0] >> 3): data for data in coded}


# -- id maps ----------------------------------------------------------------------------------------------------------

MAPS = [
    (blocks(32, 64, [0, 7, 8, 11, 13, 26]), 35),
    (blocks(33, 17, [3, 4]), 5),
    (blocks(1, 9, [0, 1], side=1), 2),
    (blocks(40, 30, range(256), side=1), 256),
    (slope(50, 70), 256),
    (blocks(20, 20, [150, 0, 99]), 151),
]


@pytest.mark.parametrize(("ids", "num_values"), MAPS)
def test_maps_come_back_and_the_smallest_container_is_kept(ids, num_values):
    data = encode_map(ids, num_values)
    found = decode_map(data, *ids.shape, num_values)
    assert found.dtype == np.uint8 and np.array_equal(found, ids)
    each = containers(ids, num_values)
    assert len(data) == min(map(len, each.values())) and {(LZMA, 0), (LZMA, 1)} <= set(each)
    for coded in each.values():
        assert np.array_equal(decode_map(coded, *ids.shape, num_values), ids)


@pytest.mark.parametrize("value", [0, 34])
def test_a_constant_map_is_two_bytes(value):
    data = encode_map(np.full((300, 500), value, np.uint8), 35)
    assert data == bytes([CONSTANT, value]) and (decode_map(data, 300, 500, 35) == value).all()


def test_boolean_planes_are_maps_of_two_values():
    plane = blocks(20, 30, [0, 1]).astype(bool)
    assert np.array_equal(decode_map(encode_map(plane, 2), 20, 30, 2), plane)


def test_scenes_take_the_context_coder_and_much_less_than_png(tmp_path):
    ids = blocks(64, 128, [0, 7, 8, 11, 13, 26], side=16)
    Image.fromarray(ids).save(tmp_path / "ids.png", optimize=True)
    data = encode_map(ids, 35)
    assert data[0] & 3 == CONTEXT and len(data) < 0.6 * (tmp_path / "ids.png").stat().st_size


@pytest.mark.parametrize(("ids", "num_values"), [(np.array([[35]]), 35), (np.zeros((0, 4)), 35), (np.zeros(4), 35)])
def test_what_is_no_map_cannot_be_coded(ids, num_values):
    with pytest.raises(InputError, match=r"id map of shape .* needs ids below 35"):
        encode_map(ids.astype(np.uint8), num_values)


def test_palettes_take_the_shorter_form():
    for values, num_values, size in (
        ([1, 200], 256, 3),
        (range(0, 100, 3), 256, 32),
        ([0, 34], 35, 3),
        ([0, 1, 2, 9], 35, 5),
    ):
        form, data = source_coding._palette(np.array(values, np.uint8), num_values)
        assert len(data) == size
        found, rest = source_coding._read_palette(data + b"rest", form, num_values)
        assert found.tolist() == list(values) and rest == b"rest"


# -- damaged maps ------------------------------------------------------------------------------------------------------

IDS = blocks(24, 40, [0, 7, 8, 11])
CODED = containers(IDS, 35)


@pytest.mark.parametrize("coded", CODED.values(), ids=[f"{k}" for k in CODED])
def test_bytes_missing_or_left_over(coded):
    for damaged in (coded[:-1], coded[:4], coded[:1], b"", coded + b"\0", coded + coded):
        with pytest.raises(InputError) as caught:
            decode_map(damaged, 24, 40, 35)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("coded", CODED.values(), ids=[f"{k}" for k in CODED])
def test_flipped_bits_are_errors_or_valid_maps(coded):
    rng = np.random.default_rng(0)
    for _ in range(200):
        damaged = bytearray(coded)
        for at in rng.integers(0, 8 * len(coded), rng.integers(1, 4)):
            damaged[at // 8] ^= 1 << at % 8
        try:
            found = decode_map(bytes(damaged), 24, 40, 35)
        except InputError as error:
            assert "\n" not in str(error)
        else:
            assert found.shape == (24, 40) and found.max() < 35


@pytest.mark.parametrize("coded", CODED.values(), ids=[f"{k}" for k in CODED])
@pytest.mark.parametrize("size", [(24, 41), (8192, 2048), (1, 1)])
def test_other_sizes_than_the_coded_one(coded, size):
    with pytest.raises(InputError):
        decode_map(coded, *size, 35)


@pytest.mark.parametrize("size", [(0, 4), (4, 8193), (8192, 8192)])
def test_sizes_beyond_the_limits(size):
    with pytest.raises(InputError, match=r"sides must be 1\.\.\.8192"):
        decode_map(bytes(2), *size, 35)


@pytest.mark.parametrize(
    "data", [bytes([CONSTANT, 35]), bytes([CONSTANT | 8, 1]), bytes([CONSTANT, 1, 1]), bytes([32, 1])]
)
def test_damaged_containers(data):
    with pytest.raises(InputError, match="send it again"):
        decode_map(data, 4, 4, 35)


@pytest.mark.parametrize("listed", [[1, 3, 3], [1, 3, 2], [1, 3, 35], [0, 3], [200, 1, 2]])
def test_damaged_palettes(listed):
    body = CODED[LZMA, 0]
    with pytest.raises(InputError, match="damaged list of values"):
        decode_map(bytes([LZMA | 4, *listed]) + body[6:], 24, 40, 35)


def test_symbols_beyond_the_palette():
    raw = lzma.compress(bytes([0, 1, 2, 1]), lzma.FORMAT_RAW, filters=source_coding._lzma_filters(4))
    with pytest.raises(InputError, match="symbol 2, but it lists 2 values"):
        decode_map(bytes([LZMA | 4, 1, 3, 9]) + raw, 2, 2, 35)


def test_a_bomb_takes_no_memory():
    bomb = lzma.compress(bytes(2**24), lzma.FORMAT_RAW, filters=source_coding._lzma_filters(2**24))
    tracemalloc.start()
    with pytest.raises(InputError, match="no map of 40x24 pixels"):
        decode_map(CODED[LZMA, 0][:6] + bomb, 24, 40, 35)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(bomb) < 20_000 and peak < 10**6


# -- JPEG XL -----------------------------------------------------------------------------------------------------------


@needs_jxl
@pytest.mark.parametrize("size", [(8, 8), (1, 1), (16, 9), (128, 256), (256, 341), (264, 330), (300, 513), (100, 1030)])
def test_the_head_of_a_codestream_is_known(size):
    for symbols in (slope(*size) % 5, blocks(*size, range(200), side=3)):
        ((shift, body),) = source_coding._to_jxl(symbols, 7)
        assert source_coding._contents_end(body, *size, shift) == len(body)
        assert np.array_equal(source_coding._from_jxl(body, *size, shift), symbols)


@needs_jxl
def test_smooth_maps_of_many_values_take_jpeg_xl():
    assert encode_map(slope(50, 70), 256)[0] & 3 == JXL


@needs_jxl
def test_another_plugins_head_is_not_used(monkeypatch):
    monkeypatch.setattr(source_coding, "_jxl_head", lambda *_: b"another")
    assert source_coding._to_jxl(IDS, 7) == []
    assert np.array_equal(decode_map(encode_map(slope(50, 70), 256), 50, 70, 256), slope(50, 70))


@needs_jxl
def test_whatever_the_plugin_raises_is_an_input_error(monkeypatch):
    class PanicException(BaseException):
        pass

    coded = next(data for (container, _), data in CODED.items() if container == JXL)
    for error in (PanicException("two\nlines"), SyntaxError("odd"), OSError(), MemoryError()):

        def fail(*_, error=error, **__):
            raise error

        monkeypatch.setattr(Image, "open", fail)
        with pytest.raises(InputError, match=r"damaged JPEG XL data \((two lines|odd|OSError|MemoryError)\)"):
            decode_map(coded, 24, 40, 35)

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(Image, "open", interrupt)
    with pytest.raises(KeyboardInterrupt):
        decode_map(coded, 24, 40, 35)


def test_without_the_plugin(monkeypatch):
    monkeypatch.setattr(source_coding, "jxl_available", lambda: False)
    for ids, num_values in MAPS:
        data = encode_map(ids, num_values)
        assert data[0] & 3 != JXL and np.array_equal(decode_map(data, *ids.shape, num_values), ids)
    with pytest.raises(source_coding.MissingPlugin, match="pip install pillow-jxl-plugin"):
        decode_map(bytes([JXL | 4, 1, 3, 9]) + bytes(20), 24, 40, 35)


# -- noise choices -----------------------------------------------------------------------------------------------------


def random_picks(steps, candidates, atoms, seed=0):
    rng = np.random.default_rng(seed)
    return tuple(
        (
            tuple(sorted(rng.choice(candidates, atoms, replace=False).tolist())),
            tuple(rng.choice([-1, 1], atoms).tolist()),
        )
        for _ in range(steps)
    )


@pytest.mark.parametrize(("candidates", "atoms"), [(6, 3), (5, 5), (7, 1), (1, 1)])
def test_ranks_run_through_all_sets(candidates, atoms):
    sets = sorted(itertools.combinations(range(candidates), atoms), key=lambda indices: indices[::-1])
    assert [source_coding._unrank(rank, candidates, atoms) for rank in range(len(sets))] == sets
    bits = choice_bits(0, 1, candidates, atoms)
    for rank, indices in enumerate(sets):
        data = pack_choices(None, 1, [(indices, (1,) * atoms)], candidates, atoms)
        assert int.from_bytes(data, "big") >> (8 * len(data) - bits) == rank << atoms


@pytest.mark.parametrize(
    ("bank_size", "start", "steps", "candidates", "atoms"),
    [
        (1000, 999, 50, 1000, 64),
        (1000, 0, 0, 0, 0),
        (1, 0, 0, 0, 0),
        (1000, None, 7, 16, 1),
        (3, 2, 5, 16, 16),
        (1, 0, 1, 1, 1),
    ],
)
def test_choices_come_back_at_the_closed_forms_size(bank_size, start, steps, candidates, atoms):
    codewords = random_picks(steps, candidates, atoms)
    data = pack_choices(start, bank_size, codewords, candidates, atoms)
    bits = (math.ceil(math.log2(bank_size)) if start is not None else 0) + (
        steps * (math.ceil(math.log2(math.comb(candidates, atoms))) + atoms) if steps else 0
    )
    assert choice_bits(bank_size if start is not None else 0, steps, candidates, atoms) == bits
    assert len(data) == math.ceil(bits / 8)
    assert unpack_choices(data, start is not None, bank_size, steps, candidates, atoms) == (start, codewords)


def test_bits_of_the_papers_operating_points():
    assert choice_bits(1000, 0, 0, 0) == 10
    assert choice_bits(0, 50, 256, 1) == 50 * (8 + 1)
    assert choice_bits(0, 1, 256, 16) == 84 + 16  # log2 C(256, 16) = 83.1


def test_a_beginning_gives_its_whole_steps():
    codewords = random_picks(9, 16, 2)  # 7 + 2 bits a step, behind 10
    data = pack_choices(700, 1000, codewords, 16, 2)
    for size in range(len(data) + 1):
        whole = max(0, min(9, (8 * size - 10) // 9))
        expected = (700, codewords[:whole]) if size >= 2 else (None, ())
        assert unpack_choices(data[:size], True, 1000, 9, 16, 2, prefix=True) == expected
    assert unpack_choices(data + b"crc!", True, 1000, 9, 16, 2, prefix=True) == (700, codewords)


def test_damaged_choices():
    codewords = random_picks(3, 5, 2)  # 10 sets in 4 bits, 2 signs: 18 bits
    data = pack_choices(None, 1, codewords, 5, 2)
    for damaged in (data[:-1], data + b"\0"):
        with pytest.raises(InputError, match="the header's take 18 bits"):
            unpack_choices(damaged, False, 1, 3, 5, 2)
    with pytest.raises(InputError, match="bits are left over"):
        unpack_choices(data[:-1] + bytes([data[-1] | 1]), False, 1, 3, 5, 2)
    beyond = bytes([data[0], data[1] & 0xF0 | 0x0F, data[2] | 0xC0])
    with pytest.raises(InputError, match="step 3 of the noise choices is no set of 2 of 5"):
        unpack_choices(beyond, False, 1, 3, 5, 2)
    assert unpack_choices(beyond, False, 1, 3, 5, 2, prefix=True) == (None, codewords[:2])
    with pytest.raises(InputError, match="noise index 1023: the bank has 1000"):
        unpack_choices(b"\xff\xc0", True, 1000, 0, 0, 0)
    assert unpack_choices(b"\xff\xc0", True, 1000, 0, 0, 0, prefix=True) == (None, ())


@pytest.mark.parametrize(
    "pick",
    [
        ((1, 1), (1, 1)),
        ((2, 1), (1, 1)),
        ((1, 5), (1, 1)),
        ((-1, 2), (1, 1)),
        ((1,), (1,)),
        ((1, 2), (1, 0)),
        ((1, 2), (1,)),
    ],
)
def test_what_is_no_choice_cannot_be_sent(pick):
    with pytest.raises(InputError, match=r"a step (picks entries|has signs)"):
        pack_choices(None, 1, [pick], 5, 2)


@pytest.mark.parametrize(("candidates", "atoms"), [(4, 5), (4, 0), (0, 0)])
def test_atoms_must_fit_the_candidates(candidates, atoms):
    with pytest.raises(InputError, match=f"{atoms} atoms of {candidates} candidates"):
        choice_bits(0, 1, candidates, atoms)


@pytest.mark.parametrize("start", [-1, 1000])
def test_start_outside_the_bank(start):
    with pytest.raises(InputError, match=f"noise index {start}: the bank has 1000"):
        pack_choices(start, 1000, (), 0, 0)
