"""Noise schedules and respacing."""

import math
from itertools import accumulate

import numpy as np

from ..console import InputError


def beta_schedule(name, steps):
    """Return the betas of a named schedule.

    :param name: "linear" (DDPM, scaled so that any number of steps covers the same range: 1e-4...2e-2 at 1000) or
        "cosine" (improved diffusion, arXiv 2102.09672, eq. 17).
    :param steps: number of diffusion steps.
    :return: (steps,) float64 in (0, 0.999].
    """
    if name == "linear":
        scale = 1000 / steps
        betas = np.linspace(scale * 1e-4, scale * 2e-2, steps, dtype=np.float64)
    elif name == "cosine":
        levels = np.cos((np.arange(steps + 1, dtype=np.float64) / steps + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = 1 - levels[1:] / levels[:-1]
    else:
        raise InputError(f"--noise_schedule {name}: unknown; choose linear or cosine")
    return np.minimum(betas, 0.999)  # beta = 1 would leave nothing of x_0, and the posterior undefined


def space_timesteps(betas, respacing):
    """Choose which of the original steps a shorter chain uses (improved diffusion, section 4).

    :param betas: (T,) of the original process.
    :param respacing: "" (all of them), "250" (evenly spaced), "10,20,30" (so many in each of three equal sections),
        "ddim50" (a fixed whole stride from step 0, as in the DDIM paper) or "logsnr20" (evenly spaced in the logarithm
        of the signal-to-noise ratio, as DPM-Solver's steps are, arXiv 2206.00927, section 3.4).
    :return: ascending list of original step numbers.
    """
    steps, text = len(betas), str(respacing).strip()
    if not text:
        return list(range(steps))
    kind = next((kind for kind in ("ddim", "logsnr") if text.startswith(kind)), "")
    try:
        counts = [int(text[len(kind) :])] if kind else [int(part) for part in text.split(",")]
    except ValueError:
        counts = [0]
    if min(counts) < 1:
        forms = 'a count ("250"), counts per section ("10,20,30"), "ddim50" or "logsnr20"'
        raise InputError(f"--timestep_respacing {text}: expected {forms}")
    if kind == "ddim":
        strides = [stride for stride in range(1, steps + 1) if len(range(0, steps, stride)) == counts[0]]
        if not strides:
            raise InputError(f"--timestep_respacing {text}: no whole stride takes {counts[0]} of {steps} steps")
        return list(range(0, steps, strides[0]))
    sizes = [steps // len(counts) + (i < steps % len(counts)) for i in range(len(counts))]
    if any(size < count for size, count in zip(sizes, counts, strict=True)):
        raise InputError(f"--timestep_respacing {text}: sections of {sizes} steps cannot give {counts}")
    if kind == "logsnr":
        return _even_in_logsnr(betas, counts[0])
    chosen, start = [], 0
    for size, count in zip(sizes, counts, strict=True):
        stride = (size - 1) / max(1, count - 1)
        # Added up, as guided-diffusion does: a product would round some ties the other way.
        chosen += [start + round(place) for place in accumulate([0.0, *[stride] * (count - 1)])]
        start += size
    return chosen


def _even_in_logsnr(betas, count):
    alphas_cumprod = np.cumprod(1 - betas)
    logsnr = np.log(alphas_cumprod / (1 - alphas_cumprod))  # falls
    wanted = np.linspace(logsnr[-1], logsnr[0], count)
    chosen = np.abs(logsnr[:, None] - wanted).argmin(0)[::-1]  # ascending
    # Near t = 0 one step is worth several points: each takes the next one that is free.
    for k in range(1, count):
        chosen[k] = max(chosen[k], chosen[k - 1] + 1)
    return np.minimum(chosen, len(betas) - count + np.arange(count)).tolist()


def respaced_betas(betas, kept):
    """Return the betas of the shorter chain over the original steps `kept` (same alpha-bar at those steps)."""
    alphas_cumprod = np.cumprod(1 - betas)[kept]
    return 1 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1])
