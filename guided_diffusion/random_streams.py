"""Random streams addressed by (seed, purpose, position) instead of by history.

Batch size, worker count and rank count cannot change a draw, and resuming a run is starting at a position.
"""

import hashlib
import struct

import torch


def stream_seed(seed, purpose, *position):
    """Return a 63-bit integer whose low 32 bits, all that torch's CPU generator uses, are as well mixed as the rest.

    :param seed, position: any integers, such as the place in the data order.
    :param purpose: a name of at most 16 characters, such as "flip": two purposes never share a stream.
    """
    words = struct.pack(f"<{len(position) + 1}q", *(int(word) for word in (seed, *position)))
    digest = hashlib.blake2b(words, digest_size=8, person=purpose.encode()).digest()  # refuses longer names
    return int.from_bytes(digest, "little") >> 1


def text_number(text):
    """Return a 63-bit integer that follows from a text, as the position of things that have names."""
    return int.from_bytes(hashlib.blake2b(str(text).encode(), digest_size=8).digest(), "little") >> 1


def uniform(seed, purpose, *position):
    """Return one float in [0, 1)."""
    return (stream_seed(seed, purpose, *position) >> 10) * 2.0**-53


def integer(seed, purpose, high, *position):
    """Return one integer in 0...high-1."""
    return int(uniform(seed, purpose, *position) * high)


def generator(seed, purpose, *position):
    """Return a CPU `torch.Generator`."""
    return torch.Generator().manual_seed(stream_seed(seed, purpose, *position))
