"""Random streams: draws that follow from (seed, purpose, position) alone."""

import numpy as np
import pytest
import torch

from guided_diffusion.random_streams import generator, integer, stream_seed, text_number, uniform


def test_streams_are_fixed_for_good():
    # A resumed run, and the other end of the link, may be a later version: these numbers must never change.
    assert stream_seed(0, "flip", 0) == 1081513711522073290
    assert stream_seed(150, "bank chain", 999) == 64767187872574822
    assert uniform(0, "drop", 7) == pytest.approx(0.6902620990722557, abs=1e-12)
    assert text_number("aachen/a_1") == 3648645769609415844


def test_stream_seed_has_63_bits_of_which_the_low_32_are_mixed():
    seeds = [stream_seed(0, "flip", p) for p in range(5000)]
    assert all(0 <= seed < 2**63 for seed in seeds) and max(seeds) > 2**62
    assert len({seed % 2**32 for seed in seeds}) >= 4999  # torch's CPU generator looks at these alone


@pytest.mark.parametrize(
    "other",
    [(1, "flip", 3, 4), (0, "crop", 3, 4), (0, "flip", 4, 3), (0, "flip", 3), (0, "flip", 3, 4, 0), (0, "flip", 3, -4)],
)
def test_stream_seed_depends_on_seed_purpose_and_every_position(other):
    assert stream_seed(0, "flip", 3, 4) != stream_seed(*other)


def test_stream_seed_takes_any_integer_type():
    assert stream_seed(np.int64(3), "flip", torch.tensor(5)) == stream_seed(3, "flip", 5)


@pytest.mark.parametrize("high", [1, 2, 7, 50])
def test_integer_is_even_and_uncorrelated_along_positions(high):
    draws = [integer(1, "bank index", high, p) for p in range(200 * high)]
    counts = np.bincount(draws, minlength=high)
    assert len(counts) == high
    np.testing.assert_allclose(counts, 200, atol=70)  # five standard deviations
    assert high < 7 or abs(np.corrcoef(draws[1:], draws[:-1])[0, 1]) < 0.1


def test_generator_repeats_and_leaves_the_global_stream_alone():
    before = torch.get_rng_state()
    first, again, other = (torch.randn(8, generator=generator(0, "noise", p)) for p in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(before, torch.get_rng_state())
