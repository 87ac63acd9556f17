"""The noise bank against one long stream of normals, and fresh noise with the bank's interface."""

import pickle

import pytest
import torch

from guided_diffusion.link.noise_bank import FreshNoise, NoiseBank
from guided_diffusion.random_streams import generator, integer, stream_seed

PUBLISHED = [-0.35526115, -1.2102110, -0.23894458, -0.23477638]  # first floats of entry 0 at seed 150


def entry_by_entry(shape, size, seed):
    stream = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randn(shape, generator=stream) for _ in range(size)])


def test_noise_bank_has_the_published_entries():
    stream, entry, kept = torch.Generator().manual_seed(150), torch.empty(3, 256, 512), {}
    for i in range(1000):
        entry.normal_(generator=stream)
        if i in (0, 1, 999):
            kept[i] = entry.clone()
    bank = NoiseBank(shape=(3, 256, 512), size=1000, seed=150)
    for index in (1, 999, 0, 1):
        assert bank[index].dtype == torch.float32 and torch.equal(bank[index], kept[index])
    # CPUs without AVX2 may differ by 2e-6.
    torch.testing.assert_close(bank[0].flatten()[:4], torch.tensor(PUBLISHED), rtol=0, atol=2e-6)
    assert sum(state.nbytes for state in bank._states) <= 10 * 10**6 and bank._buffer.nbytes <= 4 * 3 * 256 * 512


@pytest.mark.parametrize(("shape", "size"), [((3, 5, 7), 12), ((3, 64, 128), 5), ((1, 2, 4), 6), ((1, 1, 1), 5)])
def test_noise_bank_of_any_size_is_drawn_entry_by_entry(shape, size):
    bank, expected = NoiseBank(shape, size, seed=7), entry_by_entry(shape, size, 7)
    assert all(torch.equal(bank[i], expected[i]) for i in reversed(range(size)))


@pytest.mark.parametrize(("shape", "size"), [((1, 4, 4), 1901), ((1, 5, 5), 4001)])
def test_noise_bank_of_many_entries_keeps_fewer_states(shape, size):
    bank, expected = NoiseBank(shape, size, seed=3), entry_by_entry(shape, size, 3)
    for i in (size - 1, 0, 1, 2, size // 2, 1899, 17):
        assert torch.equal(bank[i], expected[i])
    assert len(bank._states) <= 1900


def test_noise_bank_cache_is_bounded_and_cannot_be_written_to(monkeypatch):
    bank, plain = NoiseBank((3, 4, 8), 9, cache_entries=2), NoiseBank((3, 4, 8), 9)
    for i in (0, 1, 0, 2):
        assert torch.equal(bank[i], plain[i])
    assert list(bank._cache) == [0, 2]
    expected = plain[2]
    for each in (bank, plain):
        each[2].zero_()
        assert torch.equal(each[2], expected)
    monkeypatch.setattr(torch, "randn", None)
    assert torch.equal(bank[2], expected)  # not drawn again


def test_noise_bank_draw_gives_indices_and_their_entries():
    bank, before = NoiseBank((3, 4, 8), 10), torch.get_rng_state()
    indices, noise = bank.draw(64, torch.Generator().manual_seed(0))
    assert indices.dtype == torch.int64 and set(indices.tolist()) == set(range(10)) and noise.shape == (64, 3, 4, 8)
    assert torch.equal(noise, bank.entries(indices.tolist()))
    assert torch.equal(before, torch.get_rng_state())  # the global stream is left alone


def test_noise_bank_indices_and_chain_seeds_follow_from_seeds_alone():
    bank = NoiseBank((3, 4, 8), 1000, seed=150)
    seeds = [bank.chain_seed(i) for i in range(1000)]
    assert len(set(seeds)) == 1000 and seeds[7] == NoiseBank((1, 4, 4), 2000, seed=150).chain_seed(7)
    assert not set(seeds) & {NoiseBank((3, 4, 8), 1000, seed=151).chain_seed(i) for i in range(1000)}
    assert all(bank.index_for(3, "bank index", p) == integer(3, "bank index", 1000, p) for p in range(9))


def test_noise_bank_index_bits_and_limits():
    for size, bits in ((1, 0), (2, 1), (3, 2), (1000, 10), (1024, 10), (1025, 11)):
        bank = NoiseBank((3, 4, 8), size)
        assert bank.index_bits == bits and len(bank) == size
    for index in (-1, 10):
        with pytest.raises(IndexError, match=rf"index {index}: the bank has 10 entries, 0\.\.\.9"):
            NoiseBank((3, 4, 8), 10)[index]


def test_noise_bank_of_another_shape_shares_size_and_seed():
    bank = NoiseBank((3, 4, 8), 5, 7)
    other = bank.sized(3, 4, 16)
    assert bank.sized(3, 4, 8) is bank and bank.sized(3, 4, 16) is other
    assert torch.equal(other[3], NoiseBank((3, 4, 16), 5, 7)[3])
    assert torch.equal(pickle.loads(pickle.dumps(bank))[4], bank[4])  # loader workers get copies


def test_fresh_noise_has_a_noise_for_every_position():
    fresh = FreshNoise((3, 4, 8), 5)
    position = 2**62 + 3  # of a picture's name
    expected = torch.randn(3, 4, 8, generator=generator(5, "picture noise", position))
    assert torch.equal(fresh[position], expected) and torch.equal(fresh.entries([1, position])[1], expected)
    assert fresh.index_for(0, "picture index", position) == position
    assert fresh.chain_seed(position) == stream_seed(5, "picture chain", position)
    assert (fresh.size, fresh.index_bits) == (0, 0)
    expected = torch.randn(3, 4, 16, generator=generator(5, "noise", 2))
    assert torch.equal(FreshNoise((3, 4, 8), 5, "noise").sized(3, 4, 16)[2], expected)
