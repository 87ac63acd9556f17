"""The reverse process: the step rules of `solvers`, with guidance, seeded noise and early stopping per sample."""

from dataclasses import dataclass

import torch

from ..console import InputError
from ..random_streams import generator
from .conditioning import Conditioning
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
    """Pictures (N, 3, H, W) in [-1, 1], how many steps (N,) int64 each took, and evaluations of each beside those."""

    images: torch.Tensor
    steps: torch.Tensor
    further: int = 0


def sample(model, diffusion, y, noise, method="ddpm", s=1.0, eta=0.0, clip_denoised=True, **options):
    """Run the reverse chain from x_T = noise: `run_chain` (for the options) with `SamplerSettings` as arguments."""
    settings = SamplerSettings(method, s=s, eta=eta, clip_denoised=clip_denoised)
    return run_chain(model, diffusion, y, noise, settings, **options)


@torch.no_grad()
def run_chain(
    model, diffusion, y, noise, settings, seeds=None, step_noise=None, early_stop=None, on_step=None, network_steps=None
):
    """Run the reverse chain from x_T = noise.

    :param model: callable (x, timesteps, y) -> (N, 3 or 6, H, W); a module is put in evaluation mode for the run.
    :param diffusion: the (respaced) `GaussianDiffusion`.
    :param y: (N, C, H, W) conditioning; (1, C, H, W) serves all samples; or a `Conditioning`, whose guidance counts.
    :param noise: (N, 3, H, W) standard normal, such as bank entries.
    :param settings: the `SamplerSettings`; the respacing in them is the diffusion's.
    :param seeds: (N,) integers. Sample k's fresh noise at a step follows from seeds[k] and the original timestep alone,
        whatever the batch. Without it, torch's global generator is used.
    :param step_noise: function (t, x, out) -> z (n, 3, H, W), or None for the usual noise; out["rows"] (n,), on the
        host, says which samples still run.
    :param early_stop: an `EarlyStop`: finished samples leave the batch with their predicted x_0 as the answer.
    :param on_step: function (t, x, out), called at every step with the step number, x_t and the prediction.
    :param network_steps: run the network at so many steps only, evenly spread, and hold the predicted x_0 between them
        (not with early stopping). The noises stay those of the whole chain: a cheap look at its picture.
    """
    if y.shape[0] not in (1, len(noise)) or noise.shape[2:] != y.shape[2:]:
        raise InputError(f"noise {tuple(noise.shape)} and conditioning {tuple(y.shape)} differ in N, H or W")
    if seeds is not None and len(seeds) != len(noise):
        raise InputError(f"seeds: {len(seeds)} for {len(noise)} samples; one per sample is needed")
    rule, batch = StepRule(diffusion, settings, network_steps), _Batch(noise, early_stop)

    def draw(step, x, out):
        z = step_noise(step, x, out) if step_noise is not None else None
        return fresh_noise(x, batch.rows, seeds, diffusion.kept[step]) if z is None else z

    training = getattr(model, "training", False)
    try:
        if training:
            model.eval()
        condition = y if isinstance(y, Conditioning) else Conditioning(model, y, settings.s)
        _reverse_process(condition, rule, noise, batch, draw, on_step)
    finally:
        if training:
            model.train()
    return batch.result


def _reverse_process(condition, rule, x, batch, draw, on_step):
    """Run all steps from x_T = x; the pictures are then in the batch's result."""
    times = torch.arange(rule.diffusion.num_timesteps, device=x.device)
    denoiser = condition.denoiser(rule.diffusion, len(x))
    for step in reversed(range(len(times))):
        t = times[step].expand(len(x))
        if step in rule.evaluated:
            output, held = denoiser(x, t), None
        out = rule.posterior(output, x, t, held)
        held, out["rows"] = out["pred_xstart"], batch.rows
        if on_step is not None:
            on_step(step, x, out)
        left = batch.step(out["pred_xstart"])
        if left is not None:
            x, t, out = x[left], t[left], {name: value[left] for name, value in out.items()}
            if not len(x):
                return
            rule.keep(left)
            denoiser = condition.denoiser(rule.diffusion, len(x), batch.rows)
        z = draw(step, x, out) if rule.is_noisy(step) else None
        x = rule(step, out, x, t, z)
    batch.finish(x)


class _Batch:
    """The samples of a chain that still run, and the answers of those that are done."""

    def __init__(self, noise, early_stop):
        self.early_stop, self.previous, self.taken = early_stop, float("nan"), 0
        self.rows = torch.arange(len(noise))  # on the host: asking the device would wait for it at every step
        self.calm = torch.zeros(len(noise), dtype=torch.int64, device=noise.device)  # consecutive steps below tol
        self.result = SampleResult(torch.zeros_like(noise), torch.zeros_like(self.calm))

    def step(self, x_start):
        """Note a step's x_0 (n, 3, H, W); once samples are done, return the places (m,) of the others, on the host."""
        self.taken += 1
        if self.early_stop is None:
            return None
        moved = (x_start - self.previous).flatten(1).square().mean(1).sqrt()  # NaN at the first step
        self.calm, self.previous = torch.where(moved < self.early_stop.tol, self.calm + 1, 0), x_start
        runs_on = ((self.calm < self.early_stop.patience) | (self.taken < self.early_stop.min_steps)).cpu()
        if runs_on.all():
            return None
        self.finish(x_start)  # those that run on get another answer later
        left = runs_on.nonzero().flatten()
        self.rows, self.calm, self.previous = self.rows[left], self.calm[left], self.previous[left]
        return left

    def finish(self, images):
        """Note pictures (n, 3, H, W) as the answers."""
        self.result.images[self.rows], self.result.steps[self.rows] = images, self.taken


def fresh_noise(x, rows, seeds, timestep):
    """Return the usual noise (n, 3, H, W) of one step for the samples at `rows` (n,) of a chain (see `run_chain`)."""
    # Addressed by the original timestep, not drawn in sequence: other steps' choices cannot shift it.
    if seeds is None:
        return torch.randn_like(x)
    streams = (generator(int(seeds[row]), "chain", timestep) for row in rows.tolist())
    noise = torch.stack([torch.randn(x.shape[1:], generator=stream) for stream in streams])
    if not x.is_cpu:  # the next step's noise is drawn while the device still works
        noise = noise.pin_memory()
    return noise.to(x, non_blocking=True)
