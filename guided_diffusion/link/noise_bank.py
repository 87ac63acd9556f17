"""The noise bank NB(eta) that transmitter and receiver share by sharing one seed (Diff-GOn, arXiv 2412.06980, III)."""

import math

import torch

from ..random_streams import generator, integer, stream_seed

MAX_STATES = 1900  # of the generator, 5,056 bytes each: below 10 MB for any bank size


class NoiseBank:
    """`size` standard-normal tensors that follow from one seed; entry i is made when it is asked for.

    Equal, bit for bit, to `torch.manual_seed(seed); torch.randn(size, *shape)` on the CPU where 3HW is a multiple of
    16; otherwise to drawing entry after entry. CPUs without AVX2 may differ in the last bits (up to 2e-6).

    :param shape, size, seed: of one entry, such as (3, 256, 512); number of entries eta, at least 1; the shared seed.
    :param cache_entries: keep so many entries in memory, those used last, for searches over many.
    """

    def __init__(self, shape=(3, 256, 512), size=1000, seed=150, cache_entries=0):
        self.shape, self.size, self.seed, self.cache_entries = tuple(shape), size, seed, cache_entries
        self.stride = math.ceil(size / MAX_STATES)
        self._walker, self._states = torch.Generator().manual_seed(seed), []
        count = math.prod(self.shape)
        self._buffer = torch.empty(count) if count % 16 else torch.empty(count // 2, dtype=torch.int64)
        self._siblings, self._cache = {self.shape: self}, {}

    def __len__(self):
        return self.size

    @property
    def index_bits(self):
        """Bits that one index costs: ceil(log2(size))."""
        return max(0, self.size - 1).bit_length()

    def __getitem__(self, index):
        """Return entry `index` as a float32 CPU tensor of `shape`. Raises IndexError outside 0...size-1."""
        if not 0 <= index < self.size:
            raise IndexError(f"noise bank index {index}: the bank has {self.size} entries, 0...{self.size - 1}")
        entry = self._cache[index] = self._cache.pop(index) if index in self._cache else self._make(index)
        if len(self._cache) > self.cache_entries:
            del self._cache[next(iter(self._cache))]  # the first was used longest ago
        return entry.clone()

    def _make(self, index):
        while len(self._states) <= index // self.stride:
            self._states.append(self._walker.get_state())
            self._skip(self._walker, self.stride)
        stream = torch.Generator()
        stream.set_state(self._states[index // self.stride])
        self._skip(stream, index % self.stride)
        return torch.randn(self.shape, generator=stream)

    def _skip(self, stream, entries):
        # Where normals are drawn in whole blocks of 16, any numbers advance the stream as far, and integers are the
        # cheapest; one of 64 bits takes the place of two float32. The buffer stays: freeing it fragments the heap.
        for _ in range(entries):
            if self._buffer.is_floating_point():
                self._buffer.normal_(generator=stream)
            else:
                self._buffer.random_(-(2**63), None, generator=stream)

    def sized(self, *shape):
        """Return the bank of the same size and seed for entries of another shape (one is kept per shape)."""
        if shape not in self._siblings:
            self._siblings[shape] = NoiseBank(shape, self.size, self.seed, self.cache_entries)
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


class FreshNoise(NoiseBank):
    """Ordinary diffusion (--noise_bank_size 0): a bank with a noise for every position, and no index to send.

    :param purpose: random stream of a position's noise (see `random_streams`).
    """

    def __init__(self, shape, seed, purpose="picture noise"):
        self.shape, self.size, self.seed, self.purpose = tuple(shape), 0, seed, purpose

    def __getitem__(self, position):
        return torch.randn(self.shape, generator=generator(self.seed, self.purpose, position))

    def sized(self, *shape):
        return FreshNoise(shape, self.seed, self.purpose)

    def index_for(self, seed, purpose, position):
        return position

    def chain_seed(self, position):
        return stream_seed(self.seed, "picture chain", position)
