"""From a loaded batch to what one training step needs; each draw follows from (seed, position in the data order)."""

from dataclasses import dataclass, replace

import torch

from ..data.pictures import to_uint8
from ..data.semantics import LABEL_SCALES, SemanticCoding, conditioning_channels, received_semantics
from ..link.channel import TRAINING_SIGMAS, sent_planes, transmit
from ..link.color_layer import TRAINED, ColorPrior, coarse, layer_planes, residual
from ..link.noise_bank import FreshNoise, NoiseBank
from ..random_streams import generator, integer, uniform


@dataclass(frozen=True)
class TrainingInputs:
    """How pictures become training samples: picklable, and called in the loader's workers.

    :param num_classes, one_hot, edge_plane: see `encode_semantics`.
    :param bank: the `NoiseBank` (NR-FD), or `FreshNoise` of the purpose "noise".
    :param coding: the `SemanticCoding` that the link will use, so that training sees what a receiver will have.
    :param drop_rate: share of samples whose conditioning is null.
    :param add_noise, noise_to: send the conditioning over the analog channel; see `transmit`.
    :param color_prior: of a network with a colour layer; the picture to learn is then what the layer lacks.
    :param color_drop: share of samples without a layer.
    :param crop: rows of the random part of a picture that is learned, in the picture's aspect; 0: whole pictures.
    :param sigma: the channel's standard deviation; None draws one of GESCO's training values per sample.
    """

    num_classes: int
    one_hot: bool
    edge_plane: bool
    bank: NoiseBank | FreshNoise
    coding: SemanticCoding
    drop_rate: float = 0.0
    add_noise: bool = False
    sigma: float | None = None
    noise_to: str = "semantics"
    seed: int = 0
    color_prior: ColorPrior | None = None
    crop: int = 0
    color_drop: float = 0.1

    def __call__(self, batch):
        """Return a prepared batch, in host memory.

        image, path, position as loaded; noise (N, 3, H, W); u (N,) float64 in [0, 1), from which the timesteps follow;
        kept (N,), 0 for dropped conditioning; the conditioning in a compact form: label (N, 1, H, W) uint8 and edges
        (N, 0 or 1, H, W), or after a channel the sent planes (K, H, W) and their place (2, K).
        """
        positions, shape = batch["position"].tolist(), batch["image"].shape[1:]
        indices = [self.bank.index_for(self.seed, "bank index", position) for position in positions]
        prepared = {key: batch[key] for key in ("image", "path", "position")}
        prepared["noise"] = self.bank.sized(*shape).entries(indices)
        draws = [[uniform(self.seed, purpose, position) for position in positions] for purpose in ("timestep", "drop")]
        prepared["u"], drop = torch.tensor(draws, dtype=torch.float64)
        prepared["kept"] = (drop >= self.drop_rate).float()
        if self.color_prior:
            prepared["layer"] = torch.stack(list(map(self._layer, to_uint8(batch["image"]), positions)))  # (N, 4, H, W)
            prepared["image"] = residual(batch["image"], prepared["layer"])
        one_hot = self.one_hot and self.add_noise
        y = torch.cat([self._semantics(batch, k, one_hot) for k in range(len(positions))])
        if self.crop:
            parts = [self._part(position, *shape[1:]) for position in positions]
            for name in {"image", "noise", "layer"} & {*prepared}:
                prepared[name] = torch.stack([value[part] for value, part in zip(prepared[name], parts, strict=True)])
            y = torch.stack([value[part] for value, part in zip(y, parts, strict=True)])
        if self.add_noise:
            place = sent_planes(y, self.num_classes, one_hot).nonzero().T  # (2, K): sample and plane
            return prepared | {"planes": self._received(y, positions)[tuple(place)], "place": place}
        return prepared | {"label": y[:, :1].to(torch.uint8), "edges": y[:, 1:].clone()}

    def conditioning(self, batch):
        """Return y (N, C, H, W) of a prepared batch, on its device."""
        n, _, height, width = batch["noise"].shape
        channels = conditioning_channels(self.num_classes, self.one_hot, not self.edge_plane)
        y = torch.zeros(n, channels, height, width, device=batch["noise"].device)
        if "planes" in batch:
            y[tuple(batch["place"])] = batch["planes"]
        elif self.one_hot:
            y.scatter_(1, batch["label"].long(), 1.0)
            y[:, self.num_classes :] = batch["edges"]
        else:
            y[:, :1], y[:, 1:] = batch["label"], batch["edges"]
        y = y * batch["kept"][:, None, None, None] if self.drop_rate else y
        return torch.cat([y, batch["layer"]], dim=1) if self.color_prior else y

    def _semantics(self, batch, k, one_hot):
        """Return the conditioning of sample k (1, C, H, W), as a receiver has it."""
        coding, names = self.coding, ("label", "instance", "image_edge")
        if not coding.label_scale:
            number = integer(self.seed, "label scale", len(LABEL_SCALES), int(batch["position"][k]))
            coding = replace(coding, label_scale=LABEL_SCALES[number])
        semantics = (batch[name][k : k + 1] if name in batch else None for name in names)
        return received_semantics(*semantics, self.num_classes, one_hot, self.edge_plane, coding)

    def _part(self, position, height, width):
        """Return the index of a random part in (C, H, W) tensors."""
        sides = self.crop, width * self.crop // height
        rows, columns = (
            slice(start := integer(self.seed, purpose, whole - side + 1, position), start + side)
            for purpose, whole, side in zip(("part_top", "part_left"), (height, width), sides, strict=True)
        )
        return slice(None), rows, columns

    def _layer(self, picture, position):
        """Return the colour layer's planes of one picture (H, W, 3) uint8, with a step of its own, or none."""
        step = TRAINED[integer(self.seed, "color step", len(TRAINED), position)]
        planes = layer_planes(coarse(picture, step, self.color_prior), step)
        return planes * (uniform(self.seed, "color drop", position) >= self.color_drop)

    def _received(self, y, positions):
        sigma = self.sigma
        if sigma is None:
            sigma = [TRAINING_SIGMAS[integer(self.seed, "sigma", len(TRAINING_SIGMAS), p)] for p in positions]
        streams = [generator(self.seed, "channel", position) for position in positions]
        options = {"num_classes": self.num_classes, "one_hot": self.one_hot, "noise_to": self.noise_to}
        return transmit(y, sigma, generators=streams, **options)
