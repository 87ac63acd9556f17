"""Steps of the reverse chain: ancestral (DDPM), DDIM (arXiv 2010.02502), DPM-Solver++(2M) (arXiv 2211.01095)."""

import math
from dataclasses import dataclass

from ..console import InputError


def ancestral_step(out, z=None):
    """x_{t-1} = mean + sigma z (DDPM, algorithm 2, line 4); z is None at t = 0."""
    return out["mean"] if z is None else out["mean"] + (0.5 * out["log_variance"]).exp() * z


def ddim_step(diffusion, out, x, t, z=None, eta=0.0):
    """One DDIM step (arXiv 2010.02502, eq. 12): deterministic without z; eta = 1 has the posterior's variance."""
    x_start = out["pred_xstart"]
    eps = diffusion.predict_eps(x_start, x, t)  # from the clipped x_0
    abar, previous = diffusion.at("alphas_cumprod", t), diffusion.at("alphas_cumprod_prev", t)
    if z is None:
        return previous.sqrt() * x_start + (1 - previous).sqrt() * eps
    sigma = eta * ((1 - previous) / (1 - abar) * (1 - abar / previous)).sqrt()  # 0 at t = 0
    return previous.sqrt() * x_start + (1 - previous - sigma**2).clamp(min=0).sqrt() * eps + sigma * z


class DPMSolver:
    """DPM-Solver++(2M): the probability-flow ODE by second-order steps, each with one prediction (algorithm 2).

    x_{t-1} = (sigma_{t-1} / sigma_t) x_t + alpha_{t-1} (1 - e^{-h}) D, where h is the step in log(alpha / sigma) and D
    extrapolates x_0's predictions to the middle of the step. The first and the last step are DDIM's: of first order.

    :param evaluated: steps at which the network runs; D is held between them.
    """

    def __init__(self, diffusion, evaluated):
        # Python numbers in float64, once per chain: a step reads nothing from the device.
        abar = [1.0, *diffusion.alphas_cumprod.tolist()]  # of the step's end, then of its start
        self.alpha, self.sigma = [math.sqrt(a) for a in abar], [math.sqrt(1 - a) for a in abar]
        points = sorted(evaluated, reverse=True)
        level = [math.log(self.alpha[t + 1] / self.sigma[t + 1]) for t in points]
        self.extrapolation = dict.fromkeys(points, 0.0)  # 1 / (2 r), r = h_last / h
        for k in range(1, len(points) - 1):
            self.extrapolation[points[k]] = (level[k + 1] - level[k]) / (level[k] - level[k - 1]) / 2
        self.previous = self.direction = None

    def step(self, x, x_start, step):
        """Return x_{t-1} from x_t and the prediction of x_0, each (N, 3, H, W), at step number t."""
        weight = self.extrapolation.get(step)
        if weight is not None:
            self.direction = x_start if weight == 0 else x_start + weight * (x_start - self.previous)
            self.previous = x_start
        keep = self.sigma[step] / self.sigma[step + 1]
        return keep * x + (self.alpha[step] - keep * self.alpha[step + 1]) * self.direction


@dataclass(frozen=True)
class SamplerSettings:
    """How a reverse chain is run: what a message's header carries, a `Chain` holds, and `run_chain` takes.

    :param method: "ddpm" (ancestral), "ddim" or "dpm++" (DPM-Solver++ 2M, deterministic: for 10 to 25 steps).
    :param steps: respacing of the chain (see `space_timesteps`); "" takes every step.
    :param s: guidance scale, at least 1.
    :param eta: share of fresh noise in DDIM, 0...1; 0 with the others.
    :param clip_denoised: clip the predicted x_0 to [-1, 1] at every step.
    :param variance: of ancestral steps: "model" (fixed or learned), or "posterior" (beta-tilde of the respaced chain).
    :param start_time: of a network with a colour layer: the chain begins at the original step below this, from the
        layer and noise alone (late start, DIRAC, arXiv 2301.05489); 0: at the last step.
    :param tail_steps: the last so many steps take no noise: they are DDIM's with eta = 0, or the solver's as ever.
    """

    method: str = "ddpm"
    steps: str = ""
    s: float = 1.0
    eta: float = 0.0
    clip_denoised: bool = True
    variance: str = "model"
    tail_steps: int = 0
    start_time: int = 0

    def __post_init__(self):
        if self.method not in ("ddpm", "ddim", "dpm++"):
            raise InputError(f"sampling method {self.method!r}: unknown; choose ddpm, ddim or dpm++")
        if not self.s >= 1:
            raise InputError(f"--s {self.s}: the guidance scale must be at least 1")
        if not 0 <= self.eta <= 1 or (self.eta and self.method != "ddim"):
            raise InputError(f"--eta {self.eta} with {self.method}: expected 0 to 1 with ddim, 0 with the others")


class StepRule:
    """One step of the sampler that `SamplerSettings` choose, in a chain whose network runs at `network_steps` steps."""

    def __init__(self, diffusion, settings, network_steps=None):
        steps, tail = diffusion.num_timesteps, settings.tail_steps
        if not 0 <= tail <= steps:
            raise InputError(f"--tail_steps {tail}: expected 0 to {steps}, the chain's steps")
        count = network_steps or steps
        self.evaluated = {steps - 1 - k * steps // count for k in range(count)}
        self.diffusion, self.settings = diffusion, settings
        self.solver = DPMSolver(diffusion, self.evaluated) if settings.method == "dpm++" else None

    def posterior(self, output, x, t, held=None):
        """Turn a denoiser's output into p(x_{t-1} | x_t); x_0 is the one `held` from an earlier step, where given."""
        out = self.diffusion.posterior(output, x, t, self.settings.clip_denoised)
        if held is not None:
            out["pred_xstart"], out["mean"] = held, self.diffusion.q_posterior(held, x, t)[0]
        if self.settings.variance == "posterior":
            for name in ("variance", "log_variance"):
                out[name] = self.diffusion.at(f"posterior_{name}", t).expand_as(x)
        return out

    def is_noisy(self, step):
        """Whether step number `step` takes a noise; the last one never does."""
        return (self.settings.method == "ddpm" or self.settings.eta > 0) and step >= max(1, self.settings.tail_steps)

    def keep(self, rows):
        """Go on with the samples at `rows` (n,) alone."""
        if self.solver is not None:
            self.solver.previous = self.solver.previous[rows]

    def __call__(self, step, out, x, t, z):
        """Return x_{t-1} (N, 3, H, W) from the posterior `out` of step `step`, x_t, t (N,) and a noise z or None."""
        if self.solver is not None:
            return self.solver.step(x, out["pred_xstart"], step)
        if self.settings.method == "ddim" or step < self.settings.tail_steps:
            return ddim_step(self.diffusion, out, x, t, z, self.settings.eta)
        return ancestral_step(out, z)
