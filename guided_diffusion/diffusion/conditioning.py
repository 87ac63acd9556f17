"""What a reverse chain needs of a label map, computed once."""

import torch

from .gaussian_diffusion import guide, guided_denoiser
from .spade import GuidedModulation, NullModulation

CACHE_BYTES = 2**32  # memory that a chain may take for what it computes once from the label map (--label_memory)


class Conditioning:
    """A label map made ready for a model: what follows from it alone is computed once, where the memory suffices.

    :param model: callable (x, timesteps, y). A `UNetModel` runs both halves of guidance in one batch of two, and its
        encoder, where that has no SPADE, for one of them only.
    :param y: (N, C, H, W) conditioning; (1, C, H, W) serves any number of samples.
    :param s: guidance scale.
    :param cache_bytes: bound on the memory; 0 computes everything at every step.
    """

    @torch.no_grad()
    def __init__(self, model, y, s=1.0, cache_bytes=CACHE_BYTES):
        self.model, self.s, self.y, self.shape, self.modulation = model, s, y, y.shape, None
        if not hasattr(model, "cached_modulation"):
            return
        itemsize = 2 if torch.is_autocast_enabled(y.device.type) else 4

        def cached(modulation, maps):
            fits = model.modulation_bytes(maps, *y.shape[2:], itemsize) <= cache_bytes
            return model.cached_modulation(modulation) if fits else modulation

        self.modulation = cached(model.label_modulation(y), len(y))
        self.null = cached(NullModulation(y[:, : model.label_channels]), len(y) + 1) if s > 1 else None

    def denoiser(self, diffusion, n, rows=None):
        """Return the denoiser of n samples, those at `rows` (n,) where not all are left."""
        y, modulation = self.y, self.modulation
        if rows is not None and len(y) > 1:
            rows = rows.to(y.device)  # once: not at every step and layer
            y, modulation = y[rows], modulation and modulation.rows(rows)
        if modulation is None:
            return guided_denoiser(self.model, diffusion, y.expand(n, -1, -1, -1), self.s)
        layer = y[:, self.model.label_channels :].expand(n, -1, -1, -1)  # no planes without a colour layer
        if self.s > 1:
            modulation = GuidedModulation(modulation, self.null)

        def denoiser(x, t):
            x = torch.cat([x, layer], dim=1) if layer.shape[1] else x
            output = self.model(x, diffusion.model_timesteps(t), modulation)
            return guide(*output.chunk(2), self.s) if self.s > 1 else output

        return denoiser
