"""The noise bank NB(eta) that transmitter and receiver share by sharing one seed (Diff-GOn, arXiv 2412.06980, section III)."""

import math
import time
from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from ..console import InputError
from ..random_streams import generator, integer, stream_seed

MAX_STATES = 1900  # of 5,056 bytes each: below 10 MB for any bank size


class NoiseBank:
    """`size` standard-normal tensors that follow from one seed; entry i is made when it is asked for.

    Equal, bit for bit, to `torch.manual_seed(seed); torch.randn(size, *shape)` on the CPU where 3HW is a multiple of 16;
    otherwise to drawing entry after entry. CPUs without AVX2 may differ in the last bits (up to 2e-6).

    The generator's stream is run over once, as far as entries are asked for, and its state kept at every entry (every few
    entries in banks of more than 1,900), so the bank itself is never in memory.

    :param shape: shape of one entry, such as (3, 256, 512).
    :param size: number of entries eta, at least 1.
    :param seed: the shared seed.
    :param cache_entries: keep so many entries in memory, most recently used first, for searches over many.

    `seconds` is the time that this pass has taken so far, up to the highest entry asked for.
    """

    def __init__(self, shape=(3, 256, 512), size=1000, seed=150, cache_entries=0):
        if size < 1:
            raise InputError(f"--noise_bank_size {size}: a noise bank needs at least 1 entry")
        self.shape, self.size, self.seed = tuple(int(side) for side in shape), int(size), int(seed)
        self.stride = math.ceil(self.size / MAX_STATES)
        self._walker = torch.Generator().manual_seed(self.seed)
        self._states, self._walked, self._buffer = None, 0, None
        self._siblings, self._seconds = {}, 0.0
        self._cache, self._cache_entries = OrderedDict(), cache_entries

    def __len__(self):
        return self.size

    @property
    def index_bits(self):
        """Bits that one index costs: ceil(log2(size))."""
        return (self.size - 1).bit_length()

    @property
    def seconds(self):
        """Seconds spent so far on running over the stream, for entries of all shapes."""
        return self._seconds + sum(bank.seconds for bank in self._siblings.values())

    def __getitem__(self, index):
        """Return entry `index` as a float32 CPU tensor of `shape`. Raises IndexError outside 0...size-1."""
        index = int(index)
        if not 0 <= index < self.size:
            raise IndexError(f"noise bank index {index}: the bank has {self.size} entries, 0...{self.size - 1}")
        if index in self._cache:
            self._cache.move_to_end(index)
            return self._cache[index].clone()
        stream = torch.Generator()
        stream.set_state(self._state(index // self.stride))
        for _ in range(index % self.stride):
            self._skip(stream)
        entry = torch.randn(self.shape, generator=stream)
        if self._cache_entries:
            self._cache[index] = entry.clone()
            if len(self._cache) > self._cache_entries:
                self._cache.popitem(last=False)
        return entry

    def sized(self, *shape):
        """Return the bank of the same size and seed for entries of another shape (one is kept per shape)."""
        if tuple(shape) == self.shape:
            return self
        if shape not in self._siblings:
            self._siblings[shape] = NoiseBank(shape, self.size, self.seed, self._cache_entries)
        return self._siblings[shape]

    def index_for(self, seed, purpose, position):
        """Return the index that follows from (seed, purpose, position) alone, uniform over the bank."""
        return integer(seed, purpose, self.size, position)

    def draw(self, n, generator):
        """Draw n indices uniformly with a CPU `torch.Generator`; return (indices (n,) int64, noise (n, *shape))."""
        indices = torch.randint(self.size, (n,), generator=generator)
        return indices, self.entries(indices.tolist())

    def entries(self, indices):
        """Return the entries at `indices`, stacked: (n, *shape)."""
        return torch.stack([self[index] for index in indices])

    def chain_seed(self, index):
        """Return the seed of all later noise in a reverse chain that starts from entry `index`."""
        return stream_seed(self.seed, "bank chain", index)

    def _state(self, k):
        if self._states is None:
            self._states = torch.empty(
                math.ceil(self.size / self.stride), len(self._walker.get_state()), dtype=torch.uint8
            )
        started = time.monotonic()
        while self._walked <= k:
            self._states[self._walked] = self._walker.get_state()
            self._walked += 1
            for _ in range(self.stride):
                self._skip(self._walker)
        self._seconds += time.monotonic() - started
        return self._states[k].clone()  # set_state does not accept a view into a larger tensor

    def _skip(self, stream):
        # Where normals are drawn in whole blocks of 16, any numbers advance the stream as far, and integers are the
        # cheapest; one of 64 bits takes the place of two float32. The buffer stays: freeing it fragments the heap.
        if self._buffer is None:
            count = math.prod(self.shape)
            self._buffer = torch.empty(count) if count % 16 else torch.empty(count // 2, dtype=torch.int64)
        if self._buffer.dtype == torch.int64:
            self._buffer.random_(-(2**63), None, generator=stream)
        else:
            self._buffer.normal_(generator=stream)


@dataclass(frozen=True)
class FreshNoise:
    """Ordinary diffusion with a bank's interface, for --noise_bank_size 0: a noise per position, which no message can name.

    :param shape: shape of one noise.
    :param purpose, chain_purpose: random streams of the noise and of the later chain (see `random_streams`).
    """

    shape: tuple
    seed: int
    purpose: str = "picture noise"
    chain_purpose: str = "picture chain"
    size: ClassVar = 0
    index_bits: ClassVar = 0
    seconds: ClassVar = 0.0

    def __getitem__(self, position):
        return torch.randn(self.shape, generator=generator(self.seed, self.purpose, position))

    def entries(self, positions):
        """Return the noise at `positions`, stacked: (n, *shape)."""
        return torch.stack([self[position] for position in positions])

    def index_for(self, seed, purpose, position):
        """Return the position itself: every position has a noise of its own."""
        return position

    def chain_seed(self, position):
        """Return the seed of all later noise in the reverse chain of a position."""
        return stream_seed(self.seed, self.chain_purpose, position)

    def sized(self, *shape):
        """Return the fresh noise of another shape."""
        return replace(self, shape=shape)
