"""Noise schedules and respacing against closed forms."""

import math

import numpy as np
import pytest

from guided_diffusion import InputError
from guided_diffusion.diffusion.schedules import beta_schedule, respaced_betas, space_timesteps


def test_linear_schedule_is_that_of_ddpm_at_1000_steps():
    betas = beta_schedule("linear", 1000)
    assert betas.dtype == np.float64 and betas.shape == (1000,)
    expected = [1e-4 + (2e-2 - 1e-4) * t / 999 for t in range(1000)]
    np.testing.assert_allclose(betas, expected, rtol=1e-12)


def test_linear_schedule_covers_the_same_range_with_other_step_counts():
    np.testing.assert_allclose(beta_schedule("linear", 100)[[0, -1]], [1e-3, 0.2], rtol=1e-12)
    ends = [np.log(np.prod(1 - beta_schedule("linear", steps))) for steps in (500, 1000, 2000)]
    np.testing.assert_allclose(ends, ends[1], rtol=0.02)


def test_cosine_schedule_has_the_closed_alpha_bar():
    alphas_cumprod = np.cumprod(1 - beta_schedule("cosine", 1000))

    def level(t):
        return math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2

    expected = [level(t + 1) / level(0) for t in range(998)]
    np.testing.assert_allclose(alphas_cumprod[:998], expected, rtol=1e-9)  # the last betas are capped


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("steps", [1, 2, 4, 10, 1000])
def test_betas_stay_within_bounds(name, steps):
    betas = beta_schedule(name, steps)
    assert betas.shape == (steps,)
    assert (betas > 0).all() and (betas <= 0.999).all()
    assert (np.diff(betas) >= 0).all()


def test_the_last_cosine_beta_is_capped():
    assert beta_schedule("cosine", 1000)[-1] == 0.999


@pytest.mark.parametrize(
    "name, steps, words", [("sqrt", 10, "sqrt.*linear or cosine"), ("linear", 0, "at least 1 step")]
)
def test_schedule_errors(name, steps, words):
    with pytest.raises(InputError, match=words):
        beta_schedule(name, steps)


# -- respacing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", " ", "1000", "ddim1000"])
def test_all_steps(text):
    assert space_timesteps(beta_schedule("cosine", 1000), text) == list(range(1000))


def test_ddim_takes_a_whole_stride_from_zero():
    assert space_timesteps(beta_schedule("cosine", 1000), "ddim50") == list(range(0, 1000, 20))
    assert space_timesteps(beta_schedule("cosine", 1000), "ddim5") == [0, 200, 400, 600, 800]
    assert space_timesteps(beta_schedule("cosine", 100), "ddim1") == [0]
    assert space_timesteps(beta_schedule("cosine", 10), "ddim4") == [0, 3, 6, 9]  # the smallest stride that gives four


def _by_addition(steps, counts):
    """Guided diffusion's loop: sections, and a fractional stride added up."""
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


@pytest.mark.parametrize(
    "steps, text", [(1000, "250"), (1000, "100"), (1000, "25"), (1000, "10,20,30"), (100, "7"), (10, "3,2,1"), (5, "1")]
)
def test_sections_equal_the_public_loop(steps, text):
    counts = [int(count) for count in text.split(",")]
    chosen = space_timesteps(beta_schedule("cosine", steps), text)
    assert chosen == _by_addition(steps, counts)
    assert len(chosen) == sum(counts)


def test_even_spacing_includes_both_ends():
    chosen = space_timesteps(beta_schedule("cosine", 1000), "250")
    assert (chosen[0], chosen[-1], len(set(chosen))) == (0, 999, 250)
    assert set(np.diff(chosen)) == {4, 5}


def test_sections_have_their_own_counts():
    chosen = np.array(space_timesteps(beta_schedule("cosine", 1000), "10,20,30"))  # sections of 334, 333 and 333 steps
    assert [((chosen >= low) & (chosen < high)).sum() for low, high in ((0, 334), (334, 667), (667, 1000))] == [
        10,
        20,
        30,
    ]


def test_a_number_serves_as_well_as_a_text():
    assert space_timesteps(beta_schedule("cosine", 100), 10) == space_timesteps(beta_schedule("cosine", 100), "10")


@pytest.mark.parametrize(
    "text, words",
    [
        ("abc", "expected a count"),
        ("10,,20", "expected a count"),
        ("ddim", "expected a count"),
        ("ddim5,5", "expected a count"),
        ("2.5", "expected a count"),
        ("0", "at least 1"),
        ("10,-1", "at least 1"),
        ("101", "section of 100 steps cannot give 101"),
        ("10,60", "section of 50 steps cannot give 60"),
        ("ddim0", "no whole stride"),
        ("ddim30", "no whole stride takes 30 of 100"),
        ("ddim101", "no whole stride"),
    ],
)
def test_respacing_errors_name_the_flag(text, words):
    with pytest.raises(InputError, match=f"--timestep_respacing {text}: .*{words}"):
        space_timesteps(beta_schedule("cosine", 100), text)


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("text", ["", "250", "10,20,30", "ddim50", "1"])
def test_respaced_betas_keep_alpha_bar(name, text):
    betas, kept = beta_schedule(name, 1000), space_timesteps(beta_schedule("cosine", 1000), text)
    shorter = respaced_betas(betas, kept)
    assert shorter.dtype == np.float64 and len(shorter) == len(kept)
    np.testing.assert_allclose(np.cumprod(1 - shorter), np.cumprod(1 - betas)[kept], rtol=1e-9)


def test_respacing_to_all_steps_changes_nothing():
    betas = beta_schedule("linear", 1000)
    np.testing.assert_allclose(respaced_betas(betas, range(1000)), betas, rtol=1e-9)


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("count", [1, 2, 5, 20, 100, 1000])
def test_logsnr_takes_distinct_steps_from_the_noisiest_on(name, count):
    chosen = space_timesteps(beta_schedule(name, 1000), f"logsnr{count}")
    assert len(chosen) == count and chosen == sorted({*chosen}) and chosen[-1] == 999
    assert count == 1 or chosen[0] == 0


def test_logsnr_is_even_in_the_logarithm_of_the_signal_to_noise_ratio():
    betas = beta_schedule("linear", 1000)
    alphas_cumprod = np.cumprod(1 - betas)
    level = np.log(alphas_cumprod / (1 - alphas_cumprod))[space_timesteps(betas, "logsnr10")]
    np.testing.assert_allclose(np.diff(level), (level[-1] - level[0]) / 9, rtol=0.15)
    assert np.ptp(np.diff(np.log(alphas_cumprod / (1 - alphas_cumprod))[space_timesteps(betas, "10")])) > 2


@pytest.mark.parametrize(
    "text, words", [("logsnr", "expected a count"), ("logsnr0", "at least 1"), ("logsnr11", "has 10 steps")]
)
def test_bad_logsnr(text, words):
    with pytest.raises(InputError, match=words):
        space_timesteps(beta_schedule("linear", 10), text)
