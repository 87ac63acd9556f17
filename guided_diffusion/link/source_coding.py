"""Source coding of a message's contents: small id maps without loss, and noise choices as one string of bits.

A coded map is one container byte, the values that occur (`palette`), and the map in terms of them, in the smallest
container. The decoder knows height, width and number of values from the message's header, and checks what the bytes
claim before it takes memory.
"""

import io
import lzma
from contextlib import suppress
from math import comb

import numpy as np
from PIL import Image

from ..console import InputError
from . import entropy_coding

try:
    import pillow_jxl  # registers JPEG XL with Pillow
except ImportError:
    pillow_jxl = None

CONSTANT, CONTEXT, JXL, LZMA, LEARNED, PACKED = 0, 1, 2, 3, 9, 11  # containers
# LEARNED: by a `LabelPrior`, without palette. PACKED: LZMA of symbols of 1, 2 or 4 bits.
LISTED = 4  # bit beside the container's: the palette is a list, not a bitmap
MAX_CANDIDATES, MAX_ATOMS = 2**13, 2**8  # of per-step selection: bound the work of unranking
MAX_SIDE, MAX_PIXELS = 2**13, 2**24


def encode_map(ids, num_values, prior=None):
    """Code an id map (h, w), uint8 (or bool) below num_values = 1...256, without loss in the smallest container.

    :param prior: the `LabelPrior` of both ends, or None.
    """
    ids = np.ascontiguousarray(ids, np.uint8)
    values = np.unique(ids)
    if values[-1] >= num_values:
        raise InputError(f"id map with ids up to {values[-1]}: needs ids below {num_values}")
    if len(values) == 1:
        return bytes([CONSTANT, values[0]])
    table = np.zeros(256, np.uint8)
    table[values] = np.arange(len(values))
    coded, learned = _coded(table[ids], values, num_values), prior and prior.encode(ids)
    return min(coded if learned is None else [*coded, bytes([LEARNED]) + learned], key=len)


def decode_map(data, height, width, num_values, prior=None):
    """Undo `encode_map`: return (height, width) uint8 below num_values. Raises InputError for damaged bytes."""
    if len(data) < 2:
        raise InputError(f"a coded map of {len(data)} bytes: it is cut off; send it again")
    container = data[0] & ~LISTED
    if data[0] == CONSTANT and len(data) == 2 and data[1] < num_values:
        return np.full((height, width), data[1], np.uint8)
    if container == LEARNED and prior is None:
        raise InputError("the message's label map needs the label prior of its network's weights, and these have none")
    if container == LEARNED and not data[0] & LISTED:
        return prior.decode(data[1:], height, width)
    values, body = _read_palette(data[1:], data[0] & LISTED, num_values)
    if container == CONTEXT:
        symbols = entropy_coding.decode(body, height, width, len(values))
    elif container in (LZMA, PACKED):
        symbols = _from_lzma(body, height, width, _depth(len(values)) if container == PACKED else 8)
    elif container in range(JXL, 32, 8):
        symbols = _from_jxl(body, height, width, container >> 3)
    else:
        raise InputError("coded map: damaged container byte; send it again")
    if symbols.max() >= len(values):
        raise InputError(f"coded map: symbol {symbols.max()}, but it lists {len(values)} values; send it again")
    return values[symbols]


def _coded(symbols, values, num_values):
    """Return the map in every container: a byte that names it, palette, body."""
    listed, palette = _palette(values, num_values)
    bodies = {CONTEXT: entropy_coding.encode(symbols, len(values))}
    bodies |= {LZMA: _lzma(symbols, 8), PACKED: _lzma(symbols, _depth(len(values)))} | _to_jxl(symbols)
    return [bytes([name | listed]) + palette + body for name, body in bodies.items() if body is not None]


def _palette(values, num_values):
    """Return (0, a bitmap of the values that occur), or (LISTED, their count and list) where that is shorter."""
    bitmap = np.zeros(num_values, bool)
    bitmap[values] = True
    listed = bytes([len(values) - 1, *values.tolist()])
    packed = np.packbits(bitmap).tobytes()
    return (LISTED, listed) if len(listed) < len(packed) else (0, packed)


def _read_palette(data, listed, num_values):
    """Undo `_palette`: return (values uint8 ascending, the bytes behind)."""
    size = data[0] + 2 if listed else -(-num_values // 8)
    head = np.frombuffer(data[:size], np.uint8)
    values = head[1:] if listed else np.flatnonzero(np.unpackbits(head)).astype(np.uint8)
    if len(head) < size or len(values) < 2 or values[-1] >= num_values or (np.diff(values.astype(int)) <= 0).any():
        raise InputError("coded map: damaged list of values; send it again")
    return values, data[size:]


def _depth(count):
    """Bits per symbol when packed: 1, 2, 4 or 8."""
    return next(depth for depth in (1, 2, 4, 8) if count <= 1 << depth)


def _lzma_options(size):
    # The decoder takes dict_size of memory.
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": max(4096, size), "lc": 0, "lp": 0, "pb": 0}]
    return {"format": lzma.FORMAT_RAW, "filters": filters}


def _lzma(symbols, depth):
    """LZMA of symbols of `depth` bits: for maps that are too large or irregular for the context coder."""
    bits = np.unpackbits(symbols.reshape(-1, 1), axis=1)[:, 8 - depth :]  # (h·w, depth)
    raw = np.packbits(bits).tobytes()
    return lzma.compress(raw, **_lzma_options(len(raw)))


def _from_lzma(data, height, width, depth):
    size = -(-height * width * depth // 8)
    reader = lzma.LZMADecompressor(**_lzma_options(size))
    with suppress(lzma.LZMAError, EOFError):
        raw = reader.decompress(data, max_length=size + 1)
        if len(raw) == size and reader.eof and not reader.unused_data:
            bits = np.unpackbits(np.frombuffer(raw, np.uint8))[: height * width * depth].reshape(-1, depth)
            return (np.packbits(bits, axis=1)[:, 0] >> (8 - depth)).reshape(height, width)
    raise InputError(f"coded map: LZMA data that is no map of {width}x{height} pixels; send it again")


#
# The head of a codestream (ISO/IEC 18181-1: picture size, 8-bit grey, one modular frame over the whole picture) follows
# from the map's size and is not sent. Its fields are texts of bits here, the lowest bit first.

_METADATA = "000001000001010001110110001"  # as the plugin writes it for mode "L", lossless
_RATIOS = ((1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))  # width : height


def _bits(value, count):
    return f"{value:0{count}b}"[::-1]


def _jxl_head(height, width, shift):
    """Return the codestream's bytes before its table of contents; groups are 128 << shift pixels wide."""
    ratio = next((k for k, (a, b) in enumerate(_RATIOS, 1) if height * a // b == width), 0)
    sides = [height] if ratio else [height, width]
    if small := all(side % 8 == 0 and side <= 256 for side in sides):
        sides = [_bits(side // 8 - 1, 5) for side in sides]
    else:
        sides = [_bits(side > 512, 2) + _bits(side - 1, 13 if side > 512 else 9) for side in sides]
    size = str(int(small)) + sides[0] + _bits(ratio, 3) + "".join(sides[1:])
    frame = "000100000" + _bits(shift, 2) + "000001" + "0" * 11  # no crop, the last frame, groups in their usual order
    packed = (np.packbits([*map(int, bits)], bitorder="little") for bits in (size + _METADATA, frame))
    return b"\xff\x0a" + b"".join(part.tobytes() for part in packed)


def _to_jxl(symbols):
    """Return {container: codestream without its head}; {} without the plugin, or where it writes another head."""
    if pillow_jxl is None:
        return {}
    files = []
    for effort in (7, 10) if symbols.size <= 2**17 else (7,):  # neither is best for all maps; 10 takes 4 µs per pixel
        file = io.BytesIO()
        # One thread: the bytes are the same, and starting many takes longer than a small map.
        Image.fromarray(symbols).save(file, "JXL", lossless=True, effort=effort, num_threads=0)
        files.append(file.getvalue())
    smallest = min(files, key=len)
    heads = {JXL | shift << 3: _jxl_head(*symbols.shape, shift) for shift in range(4)}
    return {container: smallest[len(head) :] for container, head in heads.items() if smallest.startswith(head)}


def _from_jxl(data, height, width, shift):
    if pillow_jxl is None:
        raise InputError("the message has a JPEG XL map, which needs a plugin: pip install pillow-jxl-plugin")
    try:
        with Image.open(io.BytesIO(_jxl_head(height, width, shift) + data), formats=["JXL"]) as image:
            return np.array(image)  # (height, width)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:  # the plugin's panics are not even Exceptions
        raise InputError("coded map: damaged JPEG XL data; send it again") from None


def choice_bits(bank_size, steps, candidates, atoms):
    """Bits of `pack_choices`: ceil(log2 bank_size) + steps (ceil(log2 C(candidates, atoms)) + atoms)."""
    return max(0, bank_size - 1).bit_length() + steps * ((comb(candidates, atoms) - 1).bit_length() + atoms)


def pack_choices(start_index, bank_size, codewords, candidates, atoms):
    """Write noise choices as bits, the highest first, without gaps, zeros at the end up to a whole byte.

    :param start_index: bank entry of x_T, or None where entry 0 is agreed on; not sent where bank_size is 0.
    :param codewords: per selected step (indices, signs): `atoms` ascending indices below `candidates`, and signs.
        The indices are sent as their set's rank in the combinatorial number system, then a bit per sign (1 is -1).
    """
    sent = start_index is not None and bank_size > 0
    value, bits = (start_index, choice_bits(bank_size, 0, candidates, atoms)) if sent else (0, 0)
    for indices, signs in codewords:
        rank = sum(comb(index, k) for k, index in enumerate(indices, 1))
        for sign in signs:
            rank = rank << 1 | (sign < 0)
        width = choice_bits(0, 1, candidates, atoms)
        value, bits = value << width | rank, bits + width
    size = -(-bits // 8)
    return (value << 8 * size - bits).to_bytes(size, "big")


def unpack_choices(data, bank_size, steps, candidates, atoms, prefix=False):
    """Undo `pack_choices`: return (start_index or None, codewords), a tuple of (indices, signs) tuples.

    :param prefix: `data` may be a beginning: return what it holds whole and valid, (None, ()) without the start.
    :raises InputError: what `pack_choices` never writes.
    """
    value, left = int.from_bytes(data, "big"), 8 * len(data)

    def take(bits):
        nonlocal left
        left -= bits
        return value >> left & (1 << bits) - 1

    start, codewords = None, []
    if bank_size:
        width = choice_bits(bank_size, 0, candidates, atoms)
        start = take(width) if left >= width else bank_size
        if start >= bank_size:
            start, left = None, 0
    width = choice_bits(0, 1, candidates, atoms)
    while len(codewords) < steps and left >= width:
        rank, signs = take(width - atoms), take(atoms)
        if rank >= comb(candidates, atoms):
            break
        signs = tuple(1 - 2 * (signs >> k & 1) for k in reversed(range(atoms)))
        codewords.append((_unrank(rank, candidates, atoms), signs))
    whole = len(data) == -(-choice_bits(bank_size, steps, candidates, atoms) // 8)
    if not prefix and not (whole and pack_choices(start, bank_size, codewords, candidates, atoms) == data):
        raise InputError(f"noise choices of {len(data)} bytes: damaged; send it again")
    return start, tuple(codewords)


def _unrank(rank, candidates, atoms):
    """Return the ascending index set of a rank: sum of C(index_k, k), k = 1...atoms (combinatorial number system)."""
    indices, index, below = [], candidates - 1, comb(candidates - 1, atoms)  # below: C(index, k)
    for k in range(atoms, 0, -1):
        while rank < below:
            below = below * (index - k) // index
            index -= 1
        indices.append(index)
        rank, below = rank - below, below * k // max(index, 1)
        index -= 1
    return tuple(reversed(indices))
