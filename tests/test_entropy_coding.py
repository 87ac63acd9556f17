"""The arithmetic coder against entropies, and maps there and back."""

import math
from contextlib import suppress

import numpy as np
import pytest

from guided_diffusion.console import InputError
from guided_diffusion.link import entropy_coding
from guided_diffusion.link.entropy_coding import decode, encode


def blocks(height, width, count, side=5, seed=0):
    """A map of squares with random symbols."""
    small = np.random.default_rng(seed).integers(0, count, (height // side + 1, width // side + 1))
    return np.kron(small, np.ones((side, side)))[:height, :width].astype(np.uint8)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 9), (9, 1), (33, 17), (16, 64)])
@pytest.mark.parametrize("count", [2, 3, 64])
def test_entropy_coding_is_lossless(height, width, count):
    for side in (1, 5):
        symbols = blocks(height, width, count, side)
        assert np.array_equal(decode(encode(symbols, count), height, width, count), symbols)


@pytest.mark.parametrize("share", [0.5, 0.1, 0.01])
def test_coder_length_is_the_entropy_of_the_decisions(share):
    draws = np.random.default_rng(1).random(4000) < share
    code, finish = entropy_coding.coder()
    p = round(65536 * share)
    for bit in draws:
        code([p, 8, None], bool(bit))
    bits = sum(-math.log2(share if bit else 1 - share) for bit in draws)
    assert bits - 8 < 8 * len(finish()) < bits * 1.001 + 16


def test_encode_of_independent_bits_and_of_copies():
    noise = blocks(64, 64, 2, side=1)
    assert 512 <= len(encode(noise, 2)) < 512 * 1.2  # one bit each, and 1,024 contexts to be learned
    assert len(encode(np.tile(noise[:1], (64, 1)), 2)) < 100
    assert encode(blocks(256, 256, 64, side=1), 64) is None  # large irregular maps are left to others


def test_decode_of_damage_is_an_error_or_another_map():
    symbols = blocks(24, 40, 6)
    data = encode(symbols, 6)
    for at in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[at // 8] ^= 1 << at % 8
        with suppress(InputError):
            found = decode(bytes(damaged), 24, 40, 6)  # the one coding of another map
            assert not np.array_equal(found, symbols) and encode(found, 6) == bytes(damaged)
    for damaged in (data[:-1], data + b"\0", data + b"x", b""):
        with pytest.raises(InputError, match="the context-coded map is damaged"):
            decode(damaged, 24, 40, 6)
    for claim in ((512, 512, 2), (8, 8, 65)):
        with pytest.raises(InputError, match="beyond the coder's limits"):
            decode(data, *claim)
