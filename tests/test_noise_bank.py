"""The noise bank against one long stream of normals."""

import pytest
import torch

from guided_diffusion.console import InputError
from guided_diffusion.link.noise_bank import NoiseBank

PUBLISHED = [-0.35526115, -1.2102110, -0.23894458, -0.23477638]  # first floats of entry 0 at seed 150
STATE_BYTES = 5056


@pytest.fixture(scope="module")
def published_bank():
    """The bank of the published weights, and entries 0, 1 and 999 from one generator that runs over all of it."""
    stream, entry, kept = torch.Generator().manual_seed(150), torch.empty(3, 256, 512), {}
    for i in range(1000):
        entry.normal_(generator=stream)
        if i in (0, 1, 999):
            kept[i] = entry.clone()
    bank = NoiseBank(shape=(3, 256, 512), size=1000, seed=150)
    bank[999]
    return bank, kept


def entry_by_entry(shape, size, seed):
    stream = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randn(shape, generator=stream) for _ in range(size)])


@pytest.mark.parametrize("index", [999, 0, 1, 999])
def test_published_entries(published_bank, index):
    bank, kept = published_bank
    assert bank[index].dtype == torch.float32 and torch.equal(bank[index], kept[index])


def test_first_floats_of_the_published_bank(published_bank):
    # CPUs without AVX2 may differ by 2e-6.
    torch.testing.assert_close(published_bank[0][0].flatten()[:4], torch.tensor(PUBLISHED), rtol=0, atol=2e-6)


def test_memory_of_the_published_bank(published_bank):
    bank = published_bank[0]
    assert bank._states.nbytes == 1000 * STATE_BYTES <= 10 * 10**6
    assert bank._buffer.nbytes <= 4 * 3 * 256 * 512


@pytest.mark.parametrize(("shape", "size"), [((3, 4, 8), 20), ((3, 16, 16), 7), ((1, 4, 4), 1), ((3, 64, 128), 5)])
def test_multiples_of_16_equal_one_draw(shape, size):
    bank = NoiseBank(shape, size, seed=7)
    expected = torch.randn(size, *shape, generator=torch.Generator().manual_seed(7))
    for i in reversed(range(size)):
        assert torch.equal(bank[i], expected[i])


@pytest.mark.parametrize(
    ("shape", "size"),
    [((3, 5, 7), 12), ((3, 33, 65), 4), ((1, 1, 3), 9), ((3, 2, 4), 6), ((1, 2, 4), 6), ((1, 1, 1), 5)],
)
def test_other_sizes_are_drawn_entry_by_entry(shape, size):
    bank = NoiseBank(shape, size, seed=7)
    expected = entry_by_entry(shape, size, 7)
    for i in reversed(range(size)):
        assert torch.equal(bank[i], expected[i])


@pytest.mark.parametrize("shape", [(1, 4, 4), (1, 3, 3), (1, 5, 5)])
@pytest.mark.parametrize("size", [1900, 1901, 4001])
def test_large_banks(shape, size):
    bank = NoiseBank(shape, size, seed=3)
    expected = entry_by_entry(shape, size, 3)
    for i in (size - 1, 0, 1, 2, size // 2, 1899, 17):
        assert torch.equal(bank[i], expected[i])


@pytest.mark.parametrize("size", [1, 1000, 1900, 1901, 5000, 1_000_000])
def test_states_take_at_most_10_mb(size):
    bank = NoiseBank((1, 4, 4), size)
    bank[0]
    assert bank._states.nbytes <= 10 * 10**6
    assert bank._states.shape[1] == STATE_BYTES


def test_a_seed_is_a_bank():
    a, same, other = (NoiseBank((3, 4, 8), 6, seed=seed)[3] for seed in (150, 150, 151))
    assert torch.equal(a, same) and not torch.equal(a, other)


def test_entries_are_standard_normal():
    values = torch.stack(list(NoiseBank((3, 32, 32), 16)))
    assert values.shape == (16, 3, 32, 32)
    assert abs(values.mean()) < 0.02 and abs(values.std() - 1) < 0.02


@pytest.mark.parametrize("cache_entries", [0, 2])
def test_writing_to_an_entry_does_not_change_the_bank(cache_entries):
    bank = NoiseBank((3, 4, 8), 4, cache_entries=cache_entries)
    before = bank[2].clone()
    for _ in range(2):  # drawn, then from the cache
        bank[2].zero_()
    assert torch.equal(bank[2], before)


def test_cache_is_bounded_and_keeps_the_most_recently_used():
    bank, plain = NoiseBank((3, 4, 8), 9, cache_entries=2), NoiseBank((3, 4, 8), 9)
    for i in (0, 1, 0, 2):
        assert torch.equal(bank[i], plain[i])
    assert list(bank._cache) == [0, 2]


def test_a_cached_entry_is_not_drawn_again(monkeypatch):
    bank = NoiseBank((3, 4, 8), 9, cache_entries=2)
    expected = bank[5]
    monkeypatch.setattr(torch, "randn", None)
    assert torch.equal(bank[5], expected)


def test_draw_gives_indices_and_their_entries():
    bank = NoiseBank((3, 4, 8), 10)
    indices, noise = bank.draw(64, torch.Generator().manual_seed(0))
    assert indices.shape == (64,) and indices.dtype == torch.int64 and noise.shape == (64, 3, 4, 8)
    assert set(indices.tolist()) == set(range(10))
    assert all(torch.equal(noise[k], bank[i]) for k, i in enumerate(indices.tolist()))
    assert torch.equal(indices, bank.draw(64, torch.Generator().manual_seed(0))[0])


def test_chain_seeds_follow_from_bank_seed_and_index():
    bank = NoiseBank((3, 4, 8), 1000, seed=150)
    seeds = [bank.chain_seed(i) for i in range(1000)]
    assert len(set(seeds)) == 1000
    assert seeds == [NoiseBank((1, 4, 4), 2000, seed=150).chain_seed(i) for i in range(1000)]
    assert not set(seeds) & {NoiseBank((3, 4, 8), 1000, seed=151).chain_seed(i) for i in range(1000)}


@pytest.mark.parametrize(("size", "bits"), [(1, 0), (2, 1), (3, 2), (1000, 10), (1024, 10), (1025, 11)])
def test_index_bits(size, bits):
    bank = NoiseBank((3, 4, 8), size)
    assert bank.index_bits == bits and len(bank) == size


@pytest.mark.parametrize("index", [-1, 10, 11, 10**9])
def test_indices_outside_the_bank(index):
    with pytest.raises(IndexError, match=rf"index {index}: the bank has 10 entries, 0\.\.\.9"):
        NoiseBank((3, 4, 8), 10)[index]


@pytest.mark.parametrize("size", [0, -3])
def test_a_bank_needs_an_entry(size):
    with pytest.raises(InputError, match=f"--noise_bank_size {size}: .* at least 1"):
        NoiseBank((3, 4, 8), size)


@pytest.mark.parametrize("shape", [(3, 4, 8), (3, 5, 7)])
def test_the_global_stream_is_left_alone(shape):
    before = torch.get_rng_state()
    bank = NoiseBank(shape, 2000)
    bank[1999]
    bank.draw(3, torch.Generator().manual_seed(0))
    assert torch.equal(before, torch.get_rng_state())


def test_other_shapes_share_size_and_seed():
    bank = NoiseBank((3, 4, 8), 5, 7)
    other = bank.sized(3, 4, 16)
    assert bank.sized(3, 4, 8) is bank and bank.sized(3, 4, 16) is other
    assert torch.equal(other[3], NoiseBank((3, 4, 16), 5, 7)[3])


def test_the_stream_is_run_over_as_far_as_asked_for_and_the_time_is_known():
    bank = NoiseBank((3, 16, 16), 1000)
    assert bank.seconds == 0
    bank[40]
    assert bank._walked == 41 and bank.seconds > 0
    spent = bank.seconds
    bank[7]
    assert bank._walked == 41
    bank.sized(3, 16, 32)[3]
    assert bank.seconds > spent
