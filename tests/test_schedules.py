"""Noise schedules and respacing against closed forms."""

import math

import numpy as np
import pytest

from guided_diffusion import InputError
from guided_diffusion.diffusion.schedules import beta_schedule, respaced_betas, space_timesteps

COSINE = beta_schedule("cosine", 1000)


def test_beta_schedule_linear_is_that_of_ddpm_at_1000_steps():
    betas = beta_schedule("linear", 1000)
    assert betas.dtype == np.float64
    np.testing.assert_allclose(betas, [1e-4 + (2e-2 - 1e-4) * t / 999 for t in range(1000)], rtol=1e-12)
    np.testing.assert_allclose(beta_schedule("linear", 100)[[0, -1]], [1e-3, 0.2], rtol=1e-12)  # the same range


def test_beta_schedule_cosine_has_the_closed_alpha_bar():
    def level(t):
        return math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2

    expected = [level(t + 1) / level(0) for t in range(998)]
    np.testing.assert_allclose(np.cumprod(1 - COSINE)[:998], expected, rtol=1e-9)
    assert COSINE[-1] == 0.999  # capped


def test_beta_schedule_names_a_bad_flag():
    with pytest.raises(InputError, match="sqrt: unknown; choose linear or cosine"):
        beta_schedule("sqrt", 10)


def test_space_timesteps_takes_all_or_a_whole_stride_from_zero():
    for text in ("", " ", "1000", "ddim1000", 1000):
        assert space_timesteps(COSINE, text) == list(range(1000))
    assert space_timesteps(COSINE, "ddim50") == list(range(0, 1000, 20))
    assert space_timesteps(beta_schedule("cosine", 10), "ddim4") == [0, 3, 6, 9]  # the smallest stride that gives four


def guided_diffusions_loop(steps, counts):
    """The loop of guided-diffusion's respace.py: sections, and a fractional stride added up."""
    chosen, start = set(), 0
    for i, count in enumerate(counts):
        size = steps // len(counts) + (1 if i < steps % len(counts) else 0)
        stride = 1 if count <= 1 else (size - 1) / (count - 1)
        place = 0.0
        for _ in range(count):
            chosen.add(start + round(place))
            place += stride
        start += size
    return sorted(chosen)


def test_space_timesteps_equals_guided_diffusion_for_every_count():
    for count in range(1, 1001):
        assert space_timesteps(COSINE, str(count)) == guided_diffusions_loop(1000, [count]), count
    # The tenth of 20 strides of 49.95 is 499.5 as a product, and 499.49999999999994 as a sum.
    assert space_timesteps(COSINE, "21")[10] == 499


@pytest.mark.parametrize("steps, text", [(1000, "10,20,30"), (10, "3,2,1"), (5, "1,1")])
def test_space_timesteps_gives_every_section_its_count(steps, text):
    counts = [int(count) for count in text.split(",")]
    chosen = space_timesteps(beta_schedule("cosine", steps), text)
    assert chosen == guided_diffusions_loop(steps, counts) and len(chosen) == sum(counts)


@pytest.mark.parametrize(
    "text, words",
    [
        ("abc", "expected a count"),
        ("ddim5,5", "expected a count"),
        ("logsnr0", "expected a count"),
        ("logsnr101", "sections of .100. steps"),
        ("10,60", "sections of .50, 50. steps"),
        ("ddim30", "no whole stride takes 30 of 100"),
    ],
)
def test_space_timesteps_names_a_bad_flag(text, words):
    with pytest.raises(InputError, match=f"--timestep_respacing {text}: .*{words}"):
        space_timesteps(beta_schedule("cosine", 100), text)


def test_space_timesteps_logsnr_takes_distinct_steps_even_in_the_logarithm_of_the_signal_to_noise_ratio():
    betas = beta_schedule("linear", 1000)
    for count in (1, 2, 20, 1000):
        chosen = space_timesteps(betas, f"logsnr{count}")
        assert len(chosen) == count and chosen == sorted({*chosen}) and chosen[-1] == 999
        assert count == 1 or chosen[0] == 0
    alphas_cumprod = np.cumprod(1 - betas)
    level = np.log(alphas_cumprod / (1 - alphas_cumprod))[space_timesteps(betas, "logsnr10")]
    np.testing.assert_allclose(np.diff(level), (level[-1] - level[0]) / 9, rtol=0.15)


@pytest.mark.parametrize("text", ["", "250", "10,20,30", "1"])
def test_respaced_betas_keep_alpha_bar(text):
    kept = space_timesteps(COSINE, text)
    shorter = respaced_betas(COSINE, kept)
    assert shorter.dtype == np.float64
    np.testing.assert_allclose(np.cumprod(1 - shorter), np.cumprod(1 - COSINE)[kept], rtol=1e-9)
