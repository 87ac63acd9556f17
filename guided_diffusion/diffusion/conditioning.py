"""What a reverse chain needs of a label map, made ready once."""

import torch

from ..errors import InputError
from .gaussian_diffusion import guided_denoiser
from .unet import LabelMaps

REUSE_BYTES = 2**31  # memory that a chain may take for what it computes once from the label map


class Conditioning:
    """A label map made ready for a model: what follows from it alone is computed once, where the memory suffices.

    :param model: callable (x, timesteps, y).
    :param y: (N, C, H, W) conditioning; (1, C, H, W) serves any number of samples.
    :param s: guidance scale that it will be used with.
    :param reuse_bytes: bound on the memory; 0 computes everything at every step.
    """

    @torch.no_grad()
    def __init__(self, model, y, s=1.0, reuse_bytes=REUSE_BYTES):
        self.model, self.s, self.shape = model, s, y.shape
        self.y, self.empty = y, torch.zeros_like(y[:1]) if s > 1 else None  # the empty one is the same for all samples
        networked = hasattr(model, "modulations")
        self.stored = networked and model.modulation_bytes(len(y) + (s > 1), *y.shape[2:]) <= reuse_bytes
        if self.stored:
            self.y = model.modulations(y)
            self.empty = model.modulations(self.empty) if s > 1 else None
        elif networked and len(y) == 1:
            self.y = LabelMaps(y)
            self.empty = LabelMaps(self.empty) if s > 1 else None
        self.broadcasts = networked and (self.stored or len(y) == 1)

    def denoiser(self, diffusion, s, n, rows=None):
        """Return the denoiser of n samples, those at `rows` (n,) where not all are left."""
        if s != self.s:
            raise InputError(f"--s {s:g}: this conditioning was made ready for {self.s:g}")
        if not self.broadcasts:
            y = self.y.expand(n, -1, -1, -1) if len(self.y) == 1 else self.y if rows is None else self.y[rows]
            return guided_denoiser(self.model, diffusion, y, s)  # the empty one is as large as y
        y = self.y
        if rows is not None and self.shape[0] > 1:
            y = {spade: (gamma[rows], beta[rows]) for spade, (gamma, beta) in y.items()}
        return guided_denoiser(self.model, diffusion, y, s, self.empty)
