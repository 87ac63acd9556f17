"""The reverse process: ancestral sampling (DDPM, algorithm 2) and DDIM (arXiv 2010.02502), with early stopping per sample."""

from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from ..errors import InputError
from ..random_streams import generator
from .gaussian_diffusion import guided_denoiser

METHODS = ("ddpm", "ddim")
REUSE_BYTES = 2**31  # memory that a chain may take for what it computes once from the label map


@dataclass(frozen=True)
class EarlyStop:
    """Stop a sample's chain when its predicted x_0 has settled (Diff-GOn, early stopping in sampling).

    :param tol: root-mean-square change of x_0 between steps, in units of the picture's [-1, 1] range.
    :param patience: so many consecutive steps below `tol`.
    :param min_steps: never before so many steps.
    """

    tol: float = 0.01
    patience: int = 3
    min_steps: int = 1

    def __post_init__(self):
        if not self.tol > 0 or self.patience < 1 or self.min_steps < 1:
            raise InputError(f"{self}: tol must be above 0, patience and min_steps at least 1")


@dataclass
class SampleResult:
    """Pictures (N, 3, H, W) in [-1, 1], and how many steps (N,) int64 each took."""

    images: torch.Tensor
    steps: torch.Tensor


class _Settled:
    """Counts, per sample, for how many consecutive steps x_0 has moved less than the tolerance."""

    def __init__(self, rule, n, device):
        self.rule, self.previous = rule, None
        self.count = torch.zeros(n, dtype=torch.int64, device=device)

    def update(self, pred_xstart, taken):
        """Return a mask (n,) of the samples that are done after `taken` steps."""
        if self.previous is not None:
            moved = (pred_xstart - self.previous).flatten(1).square().mean(1).sqrt()
            self.count = torch.where(moved < self.rule.tol, self.count + 1, 0)
        self.previous = pred_xstart
        return (self.count >= self.rule.patience) & (taken >= self.rule.min_steps)

    def keep(self, rows):
        self.count, self.previous = self.count[rows], self.previous[rows]


def ancestral_step(diffusion, out, x, t, z):
    """x_{t-1} = mean + sigma z, with no noise at t = 0 (DDPM, algorithm 2, line 4)."""
    noisy = (t != 0).float()[:, None, None, None]
    return out["mean"] + noisy * (0.5 * out["log_variance"]).exp() * z


def ddim_step(diffusion, out, x, t, z, eta=0.0):
    """One DDIM step (arXiv 2010.02502, eq. 12); eta = 0 is deterministic, eta = 1 has the posterior's variance."""
    x_start = out["pred_xstart"]
    eps = diffusion.predict_eps(x_start, x, t)  # from the clipped x_0
    abar, previous = diffusion.at("alphas_cumprod", t), diffusion.at("alphas_cumprod_prev", t)
    sigma = eta * ((1 - previous) / (1 - abar) * (1 - abar / previous)).sqrt()
    mean = previous.sqrt() * x_start + (1 - previous - sigma**2).clamp(min=0).sqrt() * eps
    return mean if z is None else mean + sigma * z  # sigma is 0 at t = 0


@torch.no_grad()
def sample(model, diffusion, y, noise, method="ddpm", s=1.0, eta=0.0, seeds=None, step_noise=None, early_stop=None,
           clip_denoised=True, on_step=None, reuse_bytes=REUSE_BYTES):  # fmt: skip
    """Run the reverse chain from x_T = noise.

    :param model: callable (x, timesteps, y) -> (N, 3 or 6, H, W); a module is put in evaluation mode for the run.
    :param diffusion: the (respaced) `GaussianDiffusion`.
    :param y: (N, C, H, W) conditioning, as received.
    :param noise: (N, 3, H, W) standard normal, such as bank entries.
    :param method: "ddpm" (ancestral) or "ddim".
    :param s: guidance scale, at least 1.
    :param eta: share of fresh noise in DDIM, 0...1.
    :param seeds: (N,) integers. Sample k's fresh noise at a step follows from seeds[k] and the original timestep alone,
        whatever the batch. Without it, torch's global generator is used.
    :param step_noise: function (t, x, out) -> z (n, 3, H, W), or None for the usual noise. n counts the samples still
        running; out["rows"] (n,) says which they are.
    :param early_stop: an `EarlyStop`: finished samples leave the batch with their predicted x_0 as the answer.
    :param clip_denoised: clip the predicted x_0 to [-1, 1] at every step.
    :param on_step: function (t, x, out), called at every step with the step number, x_t and the prediction.
    :param reuse_bytes: compute what depends on the conditioning alone once for the whole chain if it takes no more memory
        than this; 0 computes it at every step.
    :return: `SampleResult`.
    """
    _check_arguments(method, eta, noise, y, seeds)
    x, rows = noise, torch.arange(len(noise), device=noise.device)
    images, steps = torch.zeros_like(noise), torch.zeros_like(rows)
    settled = _Settled(early_stop, len(x), x.device) if early_stop else None
    with _evaluating(model):
        condition = _Conditioned(model, diffusion, y, s, reuse_bytes)
        denoiser = condition.denoiser()
        for taken, step in enumerate(reversed(range(diffusion.num_timesteps)), 1):
            t = torch.full((len(x),), step, dtype=torch.int64, device=x.device)
            out = diffusion.posterior(denoiser(x, t), x, t, clip_denoised)
            out["rows"] = rows
            if on_step is not None:
                on_step(step, x, out)
            if settled is not None:
                done = settled.update(out["pred_xstart"], taken)
                if done.any():
                    images[rows[done]], steps[rows[done]] = out["pred_xstart"][done], taken
                    x, t, rows, out = x[~done], t[~done], rows[~done], {k: v[~done] for k, v in out.items()}
                    settled.keep(~done)
                    if not len(x):
                        break
                    denoiser = condition.denoiser(rows)
            z = None
            if step and (method == "ddpm" or eta > 0):
                z = step_noise(step, x, out) if step_noise is not None else None
                z = _fresh_noise(x, rows, seeds, diffusion.kept[step]) if z is None else z
            elif method == "ddpm":
                z = torch.zeros_like(x)
            x = ancestral_step(diffusion, out, x, t, z) if method == "ddpm" else ddim_step(diffusion, out, x, t, z, eta)
    images[rows], steps[rows] = x, taken
    return SampleResult(images, steps)


class _Conditioned:
    """Makes denoisers for all samples or some, with the label-map work done once where the memory suffices."""

    def __init__(self, model, diffusion, y, s, reuse_bytes):
        self.model, self.diffusion, self.s = model, diffusion, s
        self.y, self.empty = y, torch.zeros_like(y[:1]) if s > 1 else None
        self.stored = hasattr(model, "modulations")
        if self.stored:
            n = len(y) + (s > 1)  # the empty conditioning is the same for all samples
            self.stored = model.modulation_bytes(n, *y.shape[2:]) <= reuse_bytes
        if self.stored:
            self.y = model.modulations(y)
            self.empty = model.modulations(self.empty) if s > 1 else None

    def denoiser(self, rows=None):
        """Return the denoiser of the samples at `rows`."""
        if self.stored:
            y, empty = self.y, self.empty
            if rows is not None:
                y = {spade: (gamma[rows], beta[rows]) for spade, (gamma, beta) in y.items()}
        else:
            y = self.y if rows is None else self.y[rows]
            empty = None  # as large as y
        return guided_denoiser(self.model, self.diffusion, y, self.s, empty)


def _fresh_noise(x, rows, seeds, timestep):
    # Addressed by the original timestep, not drawn in sequence: other steps' choices cannot shift it.
    if seeds is None:
        return torch.randn_like(x)
    streams = (generator(int(seeds[row]), "chain", timestep) for row in rows.tolist())
    return torch.stack([torch.randn(x.shape[1:], generator=stream) for stream in streams]).to(x)


def _check_arguments(method, eta, noise, y, seeds):
    if method not in METHODS:
        raise InputError(f"sampling method {method!r}: unknown; choose one of {', '.join(METHODS)}")
    if eta and method == "ddpm":
        raise InputError(f"eta {eta}: it belongs to DDIM; ancestral sampling has its own noise")
    if not 0 <= eta <= 1:
        raise InputError(f"--eta {eta}: expected 0 (deterministic) to 1 (as much fresh noise as ancestral sampling)")
    if len(noise) != len(y) or noise.shape[2:] != y.shape[2:]:
        raise InputError(f"noise {tuple(noise.shape)} and conditioning {tuple(y.shape)} differ in N, H or W")
    if seeds is not None and len(seeds) != len(noise):
        raise InputError(f"seeds: {len(seeds)} for {len(noise)} samples; one per sample is needed")


@contextmanager
def _evaluating(model):
    training = isinstance(model, nn.Module) and model.training
    if training:
        model.eval()
    try:
        yield
    finally:
        if training:
            model.train()
