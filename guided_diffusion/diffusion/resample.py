"""Which timesteps training looks at (improved diffusion, arXiv 2102.09672, section 3.3)."""

import torch
from torch import nn


class UniformSampler(nn.Module):
    """Each of T `steps` equally often."""

    def __init__(self, steps):
        super().__init__()
        self.steps = steps

    def probabilities(self):
        """Return p(t), (T,) float64, or None where all are equal."""
        return None

    def sample(self, u):
        """Turn uniform draws into steps by the inverse of the cumulative distribution.

        :param u: (N,) float64 in [0, 1).
        :return: steps (N,) int64 and importance weights 1/(T p_t) (N,) float32; the weights keep the loss unbiased.
        """
        p = self.probabilities()
        if p is None:
            return (u * self.steps).long().clamp(max=self.steps - 1), torch.ones_like(u, dtype=torch.float32)
        t = torch.searchsorted(p.cumsum(0), u, right=True).clamp(max=self.steps - 1)
        return t, (1 / (self.steps * p[t])).float()

    def update(self, t, losses):
        """Note the losses (N,) seen at steps t (N,)."""


class LossSecondMomentSampler(UniformSampler):
    """Steps in proportion to sqrt(E[loss^2]) over the last losses seen at each (improved diffusion, eq. 18).

    Uniform until every step has been seen `history` times. All state is in buffers: it is saved with a state dict, and
    never leaves the device.
    """

    def __init__(self, steps, history=10, uniform_share=0.001):
        super().__init__(steps)
        self.history, self.uniform_share = history, uniform_share
        self.register_buffer("losses", torch.zeros(steps, history, dtype=torch.float64))
        self.register_buffer("counts", torch.zeros(steps, dtype=torch.int64))

    def probabilities(self):
        p = self.losses.square().mean(1).sqrt()
        warm = (self.counts >= self.history).all() & (p.sum() > 0)
        p = p / p.sum() * (1 - self.uniform_share) + self.uniform_share / self.steps
        return torch.where(warm, p, torch.full_like(p, 1 / self.steps))

    def update(self, t, losses):
        # A non-finite loss would poison a step's probability for good.
        losses = torch.nan_to_num(losses.detach().double(), nan=0.0, posinf=0.0, neginf=0.0)
        for i in range(len(t)):  # one by one: a step may occur twice in a batch
            step = t[i : i + 1]
            self.losses[step, self.counts[step] % self.history] = losses[i]
            self.counts[step] += 1


SCHEDULE_SAMPLERS = {"uniform": UniformSampler, "loss-second-moment": LossSecondMomentSampler}
