"""The reverse process: any of the step rules of `solvers`, with guidance, seeded noise and early stopping per sample."""

from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from ..console import InputError
from ..random_streams import generator
from .conditioning import CACHE_BYTES, Conditioning
from .solvers import SamplerSettings, StepRule


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
        """Return a mask (n,), on the host, of the samples that are done after `taken` steps."""
        if self.previous is not None:
            moved = (pred_xstart - self.previous).flatten(1).square().mean(1).sqrt()
            self.count = torch.where(moved < self.rule.tol, self.count + 1, 0)
        self.previous = pred_xstart
        return ((self.count >= self.rule.patience) & (taken >= self.rule.min_steps)).cpu()

    def keep(self, rows):
        self.count, self.previous = self.count[rows], self.previous[rows]


def sample(
    model,
    diffusion,
    y,
    noise,
    method="ddpm",
    s=1.0,
    eta=0.0,
    seeds=None,
    step_noise=None,
    early_stop=None,
    clip_denoised=True,
    on_step=None,
    cache_bytes=CACHE_BYTES,
):
    """Run the reverse chain from x_T = noise: `run_chain` with its most used settings as arguments.

    :param method, s, eta, clip_denoised: see `SamplerSettings`. The others: see `run_chain`.
    :return: `SampleResult`.
    """
    settings = SamplerSettings(method=method, s=s, eta=eta, clip_denoised=clip_denoised)
    options = {"seeds": seeds, "step_noise": step_noise, "early_stop": early_stop, "on_step": on_step}
    return run_chain(model, diffusion, y, noise, settings, cache_bytes=cache_bytes, **options)


@torch.no_grad()
def run_chain(
    model,
    diffusion,
    y,
    noise,
    settings,
    *,
    seeds=None,
    step_noise=None,
    early_stop=None,
    on_step=None,
    cache_bytes=CACHE_BYTES,
    network_steps=None,
):
    """Run the reverse chain from x_T = noise.

    :param model: callable (x, timesteps, y) -> (N, 3 or 6, H, W); a module is put in evaluation mode for the run.
    :param diffusion: the (respaced) `GaussianDiffusion`.
    :param y: (N, C, H, W) conditioning, as received; (1, C, H, W) serves all samples, with the label-map work done once;
        or a `Conditioning`, to share that work between calls.
    :param noise: (N, 3, H, W) standard normal, such as bank entries.
    :param settings: the `SamplerSettings`; the respacing in them is the diffusion's.
    :param seeds: (N,) integers. Sample k's fresh noise at a step follows from seeds[k] and the original timestep alone,
        whatever the batch. Without it, torch's global generator is used.
    :param step_noise: function (t, x, out) -> z (n, 3, H, W), or None for the usual noise. n counts the samples still
        running; out["rows"] (n,), on the host, says which they are.
    :param early_stop: an `EarlyStop`: finished samples leave the batch with their predicted x_0 as the answer.
    :param on_step: function (t, x, out), called at every step with the step number, x_t and the prediction.
    :param cache_bytes: compute what depends on the conditioning alone once for the whole chain if it takes no more memory
        than this; 0 computes it at every step.
    :param network_steps: run the network at so many of the steps only, evenly spread, and hold the predicted x_0 between
        them ("dpm++": its extrapolation). The noises stay those of the whole chain: a cheap look at the same picture.
    :return: `SampleResult`.
    """
    _check_arguments(noise, y, seeds)
    evaluated = _network_steps(diffusion.num_timesteps, network_steps, early_stop)
    update = StepRule(diffusion, settings, evaluated)
    draw = _noise_source(diffusion, seeds, step_noise)
    x, rows = noise, torch.arange(len(noise))  # rows on the host: asking the device would wait for it at every step
    images, steps = torch.zeros_like(noise), torch.zeros(len(noise), dtype=torch.int64, device=noise.device)
    times = torch.arange(diffusion.num_timesteps, device=noise.device)
    settled = _Settled(early_stop, len(x), x.device) if early_stop else None
    with _evaluating(model):
        condition = y if isinstance(y, Conditioning) else Conditioning(model, y, settings.s, cache_bytes)
        denoiser = condition.denoiser(diffusion, settings.s, len(x))
        for taken, step in enumerate(reversed(range(diffusion.num_timesteps)), 1):
            t = times[step].expand(len(x))
            if step in evaluated:
                output, held = denoiser(x, t), None
            out = update.posterior(output, x, t, held)
            held, out["rows"] = out["pred_xstart"], rows
            if on_step is not None:
                on_step(step, x, out)
            if settled is not None and (done := settled.update(out["pred_xstart"], taken)).any():
                images[rows[done]], steps[rows[done]] = out["pred_xstart"][done], taken
                x, t, rows, out = x[~done], t[~done], rows[~done], {k: v[~done] for k, v in out.items()}
                if not len(x):
                    break
                settled.keep(~done)
                update.keep(~done)
                denoiser = condition.denoiser(diffusion, settings.s, len(x), rows)
            z = draw(step, x, out) if update.is_noisy(step) else None
            x = update(step, out, x, t, z)
    images[rows], steps[rows] = x, taken
    return SampleResult(images, steps)


def _noise_source(diffusion, seeds, step_noise):
    """Return a function (t, x, out) -> z (n, 3, H, W): what `step_noise` gives, or else the usual noise."""
    seeds = seeds.tolist() if isinstance(seeds, torch.Tensor) else seeds

    def draw(t, x, out):
        z = step_noise(t, x, out) if step_noise is not None else None
        return fresh_noise(x, out["rows"], seeds, diffusion.kept[t]) if z is None else z

    return draw


def fresh_noise(x, rows, seeds, timestep):
    """Return the usual noise (n, 3, H, W) of one step for the samples at `rows` (n,) of a chain (see `sample`)."""
    # Addressed by the original timestep, not drawn in sequence: other steps' choices cannot shift it.
    if seeds is None:
        return torch.randn_like(x)
    streams = (generator(int(seeds[row]), "chain", timestep) for row in rows.tolist())
    noise = torch.stack([torch.randn(x.shape[1:], generator=stream) for stream in streams])
    if not x.is_cpu:  # the next step's noise is drawn while the device still works
        return noise.pin_memory().to(x, non_blocking=True)
    return noise.to(x)


def _check_arguments(noise, y, seeds):
    if y.shape[0] not in (1, len(noise)) or noise.shape[2:] != y.shape[2:]:
        raise InputError(f"noise {tuple(noise.shape)} and conditioning {tuple(y.shape)} differ in N, H or W")
    if seeds is not None and len(seeds) != len(noise):
        raise InputError(f"seeds: {len(seeds)} for {len(noise)} samples; one per sample is needed")


def _network_steps(steps, count, early_stop):
    """Return the step numbers t at which the network runs: all, or `count` of them, the first among them."""
    if count is None:
        return set(range(steps))
    if not 1 <= count <= steps:
        raise InputError(f"network_steps {count}: expected 1 to {steps}, the chain's steps")
    if early_stop and count < steps:
        raise InputError("early stopping needs the network at every step: drop it or network_steps")
    return {steps - 1 - k * steps // count for k in range(count)}


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
