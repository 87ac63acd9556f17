"""Adaptive binary arithmetic coding of small maps, with the coded neighbours of a pixel as its context.

This coder asks, pixel by pixel in raster order, if the symbol is that of the left, upper, upper right or upper left
pixel, and spells it out where every answer is no. Each answer is one binary decision whose probability is counted per
context; a new context starts from a coarser one's probability (as in JBIG2 and JPEG-LS). The arithmetic is that of
carry-less range coders (as in lpaq): integers alone, so that both ends agree on any machine.
"""

import itertools

import numpy as np

from ..console import InputError

MAX_PIXELS, MAX_SYMBOLS = 2**17, 64  # bounds of a decoder's work: well below a second
_TOP = 2**32 - 1
ONE = 2**16  # probabilities are in units of 1 / 65536
_LEAST = 32
_START, _MOST = 8, 500  # twice the count that a new probability stands for, and at which it stops settling


def encode(symbols, count):
    """Code (h, w) uint8 symbols in 0...count-1 losslessly: bytes, or None where the map is too large or irregular."""
    code, finish = coder()
    rows = np.pad(symbols, ((2, 0), (2, 2))).tolist()
    small = symbols.size <= MAX_PIXELS and count <= MAX_SYMBOLS
    return finish() if small and _walk(rows, count, code) else None


def decode(data, height, width, count):
    """Undo `encode`: return (height, width) uint8. Raises InputError for all but what `encode` makes of some map."""
    if height * width > MAX_PIXELS or not 2 <= count <= MAX_SYMBOLS:
        raise InputError(f"context-coded map of {width}x{height} pixels and {count} symbols: beyond the coder's limits")
    code, finish = coder(data)
    rows = [[0] * (width + 4) for _ in range(height + 2)]
    if not _walk(rows, count, code) or finish() != data:
        raise InputError("the context-coded map is damaged; send it again")
    return np.array(rows, np.uint8)[2:, 2:-2]  # (height, width)


def coder(data=None):
    """Return (code, finish) of an encoder, or of a decoder of `data`.

    `code(node, bit)` codes one decision whose node is [probability, count, coarser node or None], and counts it; the
    decoder ignores `bit` and returns the one coded. `finish()` returns all bytes coded: a decoder compares its `data`.
    """
    low, high, out = 0, _TOP, bytearray()
    source = itertools.chain(data or b"", itertools.repeat(0))
    value = int.from_bytes(itertools.islice(source, 4), "big")

    def code(node, bit):
        nonlocal low, high, value
        middle = low + ((high - low) * node[0] >> 16)
        if data is not None:
            bit = value <= middle
        if bit:
            high, target = middle, ONE - _LEAST
        else:
            low, target = middle + 1, _LEAST
        while low ^ high < 2**24:  # the first byte is settled
            out.append(high >> 24)
            low, high = low << 8 & _TOP, high << 8 & _TOP | 255
            value = value << 8 & _TOP | next(source)
        while node is not None:
            node[0] += (target - node[0]) * 2 // node[1]
            node[1] += 2 * (node[1] < _MOST)
            node = node[2]
        return bit

    def finish():
        for length in range(5):  # the shortest bytes that lie in low...high when zeros follow
            unit = 1 << (32 - 8 * length)
            ending = -(-low // unit) * unit
            if ending <= high:
                return bytes(out) + ending.to_bytes(5, "big")[1 : 1 + length]

    return code, finish


def _walk(rows, count, code):
    """Code the map, or fill it in with a decoder's `code`. `rows` have two rows of zeros above, two columns beside.

    Return False where new contexts and spelt-out symbols, which take the time, exceed one per eight pixels and 4,096
    more, or no encoder would spell a symbol.
    """
    contexts, coarse, trees = {}, {}, {}
    bits = (count - 1).bit_length()
    budget = (len(rows) - 2) * (len(rows[0]) - 4) // 8 + 4096
    for y in range(2, len(rows)):
        row, up, up2 = rows[y], rows[y - 1], rows[y - 2]
        for x in range(2, len(row) - 2):
            west = row[x - 1]
            key = west | (up[x] | (up[x + 1] | up[x - 1] << bits) << bits) << bits
            if count == 2:  # few contexts: six more neighbours
                key |= row[x - 2] << 4 | up[x - 2] << 5 | up[x + 2] << 6
                key |= up2[x - 1] << 7 | up2[x] << 8 | up2[x + 1] << 9
            context = contexts.get(key)
            if context is None:
                budget -= 1
                context = contexts[key] = _context(key, count, bits, coarse)
            symbol = row[x]
            for guess, node in context:
                if node is None or code(node, symbol == guess):
                    row[x] = guess
                    break
            else:
                budget -= 1
                tree, prefix = trees.setdefault(west, {}), 1
                for k in reversed(range(bits)):  # the highest first, each in the context of those before
                    node = tree.setdefault(prefix, [ONE // 2, _START // 2, None])
                    prefix = prefix * 2 + code(node, symbol >> k & 1)
                row[x] = symbol = prefix - (1 << bits)
                if budget < 0 or symbol >= count or any(symbol == guess for guess, _ in context):
                    return False
    return True


def _context(key, count, bits, coarse):
    """Return [(guess, node)] of the distinct neighbours; the last node is None where no other symbol is left."""
    near = [key >> bits * k & (1 << bits) - 1 for k in range(4)]  # left, upper, upper right, upper left
    guesses = list(dict.fromkeys(near))
    # The coarser context: the four neighbours where two symbols occur, else which of the four are equal
    shape = tuple(near) if count == 2 else tuple(map(guesses.index, near))
    nodes = [coarse.setdefault((shape, k), [ONE // 2, _START, None]) for k in range(len(guesses))]
    context = [(guess, [node[0], _START, node]) for guess, node in zip(guesses, nodes, strict=True)]
    return context if len(guesses) < count else [*context[:-1], (guesses[-1], None)]
