"""Noise selection by local generative feedback (Diff-GOn, arXiv 2412.06980): a chain's start, and its steps' noise.

Initial selection runs candidates from several bank entries and keeps the one whose picture is nearest to the original.
Per-step selection builds each step's noise from a few bank entries that point at what is still wrong (codebook
diffusion, DDCM, arXiv 2502.01189, and Turbo-DDCM, with the one shared bank in place of a codebook per step).
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..console import InputError
from ..diffusion.conditioning import CACHE_BYTES, Conditioning
from ..diffusion.sampling import EarlyStop, SampleResult, fresh_noise, run_chain
from ..diffusion.solvers import SamplerSettings, StepRule
from ..random_streams import generator
from .color_layer import from_residual, is_sent, residual

CODEBOOK_BYTES = 2**30  # memory that a codebook may take; otherwise every step makes its entries again
FINALISTS = 4  # candidates whose whole chains decide
BLOCK = 32  # entries whose inner products are computed at once


@dataclass(frozen=True)
class Chain:
    """Everything of a reverse chain but its conditioning and where it starts: both ends hold the same.

    :param model, diffusion, sampler, early_stop: as `run_chain` takes them; cache_bytes: as `Conditioning` does.
    :param bank: the shared `NoiseBank`, or `FreshNoise`; chains run at any picture size, with the bank of that size.
    :param selected_steps: the last so many steps that take a noise are selected (`selected`, in the chain's order);
        that needs ancestral steps with the posterior's variance, or DDIM with eta = 1.
    :param realism, whole: of a network with a colour layer: share of the sample in the picture, the rest being x_0's
        mean (the line between least error and realism, arXiv 2107.02555), and the process of all steps, for that mean.
    :param device, precision: where the model is, and a function that gives the context it runs in, such as autocast.
    """

    model: Callable
    diffusion: Any
    bank: Any
    sampler: SamplerSettings
    early_stop: EarlyStop | None = None
    selected_steps: int = 0
    device: Any = "cpu"
    precision: Callable = nullcontext
    cache_bytes: int = CACHE_BYTES
    realism: float = 1.0
    whole: Any = None
    selected: list = field(init=False)

    def __post_init__(self):
        rule = StepRule(self.diffusion, self.sampler)  # which refuses a wrong tail
        noisy = [t for t in reversed(range(self.diffusion.num_timesteps)) if rule.is_noisy(t)]
        if self.selected_steps > len(noisy):
            found = f"{len(noisy)} steps take a noise with --tail_steps {self.sampler.tail_steps}"
            raise InputError(f"--selected_steps {self.selected_steps}: {found}")
        object.__setattr__(self, "selected", noisy[len(noisy) - self.selected_steps :])

    def evaluations(self, result, network_steps=None):
        """NFE: network function evaluations that a `SampleResult` of this chain took; a guided step counts twice."""
        steps = int(result.steps.sum()) if network_steps is None else network_steps * len(result.steps)
        steps += len(result.steps) * result.further
        return steps * (2 if self.sampler.s > 1 else 1)

    def choice(self, result, index, codewords=(), score=None, spent=0):
        """Return the `Choice` of a `SampleResult` of one picture; `spent`: NFE of the search before it."""
        evaluations = spent + self.evaluations(result)
        return Choice(index, tuple(codewords), score, evaluations, result.images[0].cpu(), int(result.steps))

    def prepare(self, y):
        """Do the label-map work of y (1, C, H, W) once, for several runs."""
        with self.precision():
            return Conditioning(self.model, y.to(self.device), self.sampler.s, self.cache_bytes)

    def run(self, y, indices, codewords=(), on_step=None, network_steps=None, step_noise=None):
        """Run chains from x_T = bank[i], whose later noise follows from i, too, or from codewords: a `SampleResult`.

        :param y: (N or 1, C, H, W) conditioning, or what `prepare` makes of it.
        :param indices: bank index of each sample.
        :param codewords: per sample, those of its selected steps in the chain's order; further steps use seeded noise.
        :param on_step, network_steps, step_noise: as `run_chain` takes them; with network_steps no chain stops early.
        """
        conditioning = y if isinstance(y, Conditioning) else self.prepare(y)
        bank = self.bank.sized(3, *y.shape[2:])
        x, seeds = bank.entries(indices).to(self.device), [bank.chain_seed(i) for i in indices]

        def replay(t, x, out):
            z = fresh_noise(x, out["rows"], seeds, self.diffusion.kept[t])
            for n, row in enumerate(out["rows"].tolist()):
                codeword = dict(zip(self.selected, codewords[row], strict=False)).get(t)  # None behind the last
                if codeword is not None:
                    z[n] = codeword_noise(bank, codeword, self.diffusion.kept[t])
            return z

        options = {"seeds": seeds, "on_step": on_step, "network_steps": network_steps}
        options["step_noise"] = replay if any(codewords) else step_noise
        options["early_stop"] = self.early_stop if network_steps is None else None
        with self.precision():
            if not self.has_layer:
                return run_chain(self.model, self.diffusion, conditioning, x, self.sampler, **options)
            y, mean, further = conditioning.y, torch.zeros_like(x), 0
            if self.realism < 1 or (self.sampler.start_time and not is_sent(y).all()):
                mean, further = self._mean(conditioning, x), 1
            if self.realism or step_noise or self.early_stop:
                result = self._sample(conditioning, x, mean, options)
            else:
                result = SampleResult(mean, torch.zeros(len(x), dtype=torch.int64))
        images = torch.lerp(mean, result.images, self.realism) if self.realism < 1 else result.images
        return SampleResult(from_residual(images, y), result.steps, further)

    def _sample(self, conditioning, x, mean, options):
        """Run chains of what a layer lacks; a late start is at the noised layer, or without one at the noised mean."""
        if self.sampler.start_time:
            last = torch.full((len(x),), self.diffusion.num_timesteps - 1, device=x.device)
            x = self.diffusion.q_sample(torch.where(is_sent(conditioning.y), 0.0, mean), last, x)
        return run_chain(self.model, self.diffusion, conditioning, x, self.sampler, **options)

    @torch.no_grad()
    def _mean(self, conditioning, x):
        """Return x_0's mean (N, 3, H, W) as predicted at the last step from x_T = x, which says nothing of it."""
        last = torch.full((len(x),), self.whole.num_timesteps - 1, device=x.device)
        output = conditioning.denoiser(self.whole, len(x))(x, last)
        return self.whole.predict_xstart(output[:, :3], x, last)

    @property
    def has_layer(self):
        """Whether the network makes what a colour layer lacks."""
        return getattr(self.model, "layer_channels", 0) > 0


@dataclass(frozen=True)
class Choice:
    """What the transmitter chose.

    :param index: bank index of x_T.
    :param codewords: one per selected step, in the chain's order: (indices, ascending; signs, each 1 or -1), M each.
    :param score, evaluations: distance from the original, or None; NFE spent, those of the picture itself among them.
    :param picture, steps: (3, H, W) in [-1, 1], made alone as the receiver makes it, and the steps its chain took.
    """

    index: int
    codewords: tuple
    score: float | None
    evaluations: int
    picture: torch.Tensor
    steps: int


def mse(pictures, image):
    """Mean squared error (N,) over all pixels and channels of pictures in [-1, 1]; one original serves all."""
    return (pictures.float() - image.float()).square().flatten(1).mean(1)


def select_initial(chain, y, image, candidates, distance=mse, batch_size=8, feedback_steps=0, on_step=None):
    """Search i* = argmin over candidates of D(I, G(m, NB[i])): a `Choice`; equal scores go to the smaller index.

    :param y: (1, C, H, W) conditioning, as the receiver will have it.
    :param image: (1, 3, H, W) in [-1, 1], the original picture.
    :param candidates, batch_size: bank indices, and how many of them run together; samples are compared, whatever
        the chain's realism.
    :param distance: function (pictures (N, 3, H, W), image) -> (N,), smaller is better.
    :param feedback_steps: 0 runs every candidate's whole chain; otherwise see `halving_rungs`.
    """
    alive = sorted(set(candidates))
    image, prepared, evaluations, looks = image.to(chain.device), chain.prepare(y), 0, replace(chain, realism=1.0)
    for network_steps, keep in halving_rungs(len(alive), chain.diffusion.num_timesteps, feedback_steps):
        scores = {}
        for k in range(0, len(alive), batch_size):
            ids = alive[k : k + batch_size]
            result = looks.run(prepared, ids, on_step=on_step, network_steps=network_steps)
            evaluations += looks.evaluations(result, network_steps)
            scores |= zip(ids, distance(result.images, image).tolist(), strict=True)
        alive = sorted(sorted(alive, key=lambda i: (scores[i], i))[:keep])
    result = chain.run(prepared, alive, on_step=on_step)  # alone, as the receiver makes it
    return chain.choice(result, alive[0], score=float(distance(result.images, image)), spent=evaluations)


def halving_rungs(candidates, steps, feedback_steps):
    """Plan a successive halving: list of (network steps, candidates kept then); empty for one candidate.

    All candidates are looked at cheaply, in whole chains whose network runs at a few steps only: that says more than
    x_0's prediction after as many steps. Every rung keeps a quarter and doubles the network steps; whole chains
    (None, 1) decide among the last four, or where doubling would pass half the chain.
    """
    if not 0 <= feedback_steps < steps:
        raise InputError(f"--feedback_steps {feedback_steps}: expected 0 (whole chains) to {steps - 1}")
    if candidates == 1:
        return []
    rungs, left, network_steps = [], candidates, feedback_steps
    while left > FINALISTS and network_steps > 0 and (not rungs or network_steps <= steps / 2):
        left = max(FINALISTS, math.ceil(left / 4))
        rungs.append((network_steps, left))
        network_steps *= 2
    return [*rungs, (None, 1)]


def step_mask(bank, timestep):
    """The mask a_t (3, H, W) of 1 and -1 that turns the bank into the codebook of an original timestep."""
    stream = generator(bank.seed, "step mask", timestep)
    return torch.randint(2, bank.shape, generator=stream).float() * 2 - 1


def codeword_noise(bank, codeword, timestep):
    """Make the noise z (3, H, W) of a codeword (indices, signs) at an original timestep.

    It is the signed sum of the masked entries of the picture's `NoiseBank`, scaled to the norm sqrt(3HW).
    """
    z = torch.zeros(bank.shape)
    for k, sign in sorted(zip(*codeword, strict=True)):
        z += sign * bank[k]
    z *= step_mask(bank, timestep)
    return z * (math.sqrt(z.numel()) / float(z.double().norm()))


class StepCodebook:
    """Picks M = `atoms` of the first K = `candidates` bank entries, masked for a step, as the step's codeword."""

    def __init__(self, candidates, atoms):
        self.candidates, self.atoms, self._kept, self._key = candidates, atoms, [], None

    def pick(self, bank, residual, timestep):
        """Return the codeword of the M largest |inner products| with a residual (3, H, W); ties: the smaller entry."""
        vector = (step_mask(bank, timestep).to(residual) * residual).float().flatten()  # <a.NB[k], r> = <NB[k], a.r>
        with torch.autocast(vector.device.type, enabled=False):
            products = torch.cat([block @ vector for block in self._blocks(bank, vector.device)]).cpu()
        best = products.abs().sort(descending=True, stable=True).indices[: self.atoms].sort().values
        return tuple(best.tolist()), tuple(1 if product >= 0 else -1 for product in products[best].tolist())

    def _blocks(self, bank, device):
        """Return an iterable of the entries, (n, 3HW) each, n <= BLOCK."""
        key = bank.seed, bank.shape, device
        if self._key != key:
            numbers = torch.arange(self.candidates).split(BLOCK)
            blocks = (bank.entries(indices.tolist()).flatten(1).to(device) for indices in numbers)
            if self.candidates * math.prod(bank.shape) * 4 > CODEBOOK_BYTES:
                return blocks
            self._kept, self._key = list(blocks), key
        return self._kept


def rare_weights(label):
    """Weigh each pixel of a label map (1, 1, H, W) by its class's inverse share of the picture, 1 in the mean."""
    _, classes, counts = label.unique(return_inverse=True, return_counts=True)
    return (label.numel() / (len(counts) * counts.float()))[classes]  # (1, 1, H, W)


def select_per_step(chain, y, image, start, codebook, distance=mse, on_step=None, weight=1.0):
    """Choose the noise of the chain's selected steps: at each, the codeword points from x_0's prediction to x_0.

    x_{t-1} = mu(x_t, x0_t) + sqrt(posterior variance) z, z made of the M entries z_k = a_t * NB[k], k < K, with the
    largest |<z_k, x_0 - x0_t>| (after DDCM and Turbo-DDCM). x0_t is the guided, clipped prediction of the step.

    :param chain, y, image, distance: as in `select_initial`, the chain with `selected_steps`.
    :param start, codebook: bank index of x_T, and the `StepCodebook`.
    :param weight: of the pixels of x_0 - x0_t, (1, 1, H, W).
    """
    bank, kept = chain.bank.sized(3, *y.shape[2:]), chain.diffusion.kept
    image, codewords = image.to(chain.device), []
    target = residual(image, y.to(image)) if chain.has_layer else image

    def choose(t, x, out):
        if t not in chain.selected:
            return None
        codewords.append(codebook.pick(bank, (weight * (target - out["pred_xstart"]))[0], kept[t]))
        return codeword_noise(bank, codewords[-1], kept[t])[None].to(x)

    result = chain.run(y, [start], on_step=on_step, step_noise=choose)
    return chain.choice(result, start, codewords, float(distance(result.images, image)))


def select_both(chain, y, image, candidates, codebook, distance=mse, on_step=None, weight=1.0, **search):
    """Choose the start as `select_initial` does, with seeded steps, then the steps from there: a `Choice` of both."""
    first = select_initial(chain, y, image, candidates, distance, on_step=on_step, **search)
    second = select_per_step(chain, y, image, first.index, codebook, distance, on_step, weight)
    return replace(second, evaluations=first.evaluations + second.evaluations)
