"""From a loaded batch to what one training step needs.

Every random draw that belongs to a sample follows from (seed, position in the data order). All of it happens in host
memory, so that an accelerator never waits for a decision.
"""

from dataclasses import dataclass

import torch

from ..data.semantics import SemanticCoding, encode_semantics, received_semantics
from ..link.channel import TRAINING_SIGMAS, transmit
from ..random_streams import generator, integer, uniform


@dataclass(frozen=True)
class TrainingInputs:
    """How pictures become training samples.

    :param num_classes, one_hot, edge_plane: see `encode_semantics`.
    :param bank: a `NoiseBank`, or None for fresh noise.
    :param drop_rate: share of samples whose conditioning is all zero.
    :param add_noise: send the conditioning over the analog channel.
    :param sigma: its standard deviation; None draws one of GESCO's training values per sample.
    :param noise_to: "semantics" or "label".
    :param seed: the run's seed.
    :param coding: the `SemanticCoding` that the link will use, so that training sees what a receiver will have; None: as
        the data set has the semantics.
    """

    num_classes: int
    one_hot: bool
    edge_plane: bool
    bank: object
    drop_rate: float = 0.0
    add_noise: bool = False
    sigma: float | None = None
    noise_to: str = "semantics"
    seed: int = 0
    coding: SemanticCoding | None = None

    def __call__(self, batch):
        """Return (x_start, y, noise, u) of a loaded batch, in host memory; u are the draws for the timesteps."""
        positions = batch["position"].tolist()
        x_start = batch["image"]  # (N, 3, H, W)
        y = self.received(self.condition(batch), positions)
        return x_start, y, self.noise(positions, x_start.shape[1:]), self.timestep_draws(positions)

    def condition(self, batch):
        """Return the clean conditioning (N, C, H, W) of a loaded batch."""
        semantics = batch["label"], batch.get("instance"), batch.get("image_edge")
        if self.coding is None:
            return encode_semantics(*semantics, self.num_classes, self.one_hot, self.edge_plane)
        return received_semantics(*semantics, self.num_classes, self.one_hot, self.edge_plane, self.coding)

    def noise(self, positions, shape):
        """Return the forward process's noise (N, *shape): a bank entry per sample (NR-FD), or fresh noise without a bank."""
        if self.bank is not None:
            indices = [integer(self.seed, "bank index", len(self.bank), p) for p in positions]
            return self.bank.sized(*shape).entries(indices)
        return torch.stack([torch.randn(shape, generator=generator(self.seed, "noise", p)) for p in positions])

    def received(self, y, positions):
        """Return the conditioning as training sees it: through the channel, and empty for dropped samples."""
        if self.add_noise:
            sigmas = [self._sigma(p) for p in positions]
            streams = [generator(self.seed, "channel", p) for p in positions]
            y = transmit(
                y,
                sigmas,
                generators=streams,
                num_classes=self.num_classes,
                one_hot=self.one_hot,
                noise_to=self.noise_to,
            )
        if self.drop_rate:
            kept = [float(uniform(self.seed, "drop", p) >= self.drop_rate) for p in positions]
            y = y * torch.tensor(kept)[:, None, None, None]
        return y

    def timestep_draws(self, positions):
        """Return uniform draws (N,) float64 from which the timestep sampler makes steps."""
        return torch.tensor([uniform(self.seed, "timestep", p) for p in positions], dtype=torch.float64)

    def _sigma(self, position):
        if self.sigma is not None:
            return self.sigma
        return TRAINING_SIGMAS[integer(self.seed, "sigma", len(TRAINING_SIGMAS), position)]
