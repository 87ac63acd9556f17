"""A low-variance validation score and preview pictures: fixed items, fixed timesteps, fixed bank indices, EMA weights."""

from contextlib import contextmanager

import torch

from ..diffusion.sampling import sample
from ..evaluation.metrics import colour_error
from ..data.pictures import to_uint8
from ..evaluation.panels import picture_grid, show_semantics
from .distributed import autocast
from .group import Group
from .sharding import is_sharded


class Validation:
    """Looks at a run's weights through the same items every time.

    :param items: loaded batches of one picture each (host memory); the same ones at every call.
    :param rules: the run's `TrainingInputs`; its channel and drop settings do not apply here.
    :param diffusion: the training process, for the score.
    :param preview_diffusion: its respaced form, for the pictures.
    :param device, precision: where and how the network runs.
    """

    def __init__(self, items, rules, diffusion, preview_diffusion, device, precision):
        self.items, self.rules, self.diffusion, self.preview_diffusion = items, rules, diffusion, preview_diffusion
        self.device, self.precision = device, precision

    @torch.no_grad()
    def score(self, model, weights, count, group=None):
        """Return the mean training loss of `count` items with the given weights (a dict of tensors).

        Item k is seen at the middle of the k-th of `count` equal parts of the time axis, and at that of the part half
        way round, with bank entries from (seed, k) alone.

        :param group: the `Group` whose ranks share the items out, and all of whom must call this; None: alone.
        """
        group = group or Group()
        losses, steps = [], self.diffusion.num_timesteps
        rounds = -(-count // group.world_size)
        with _using(model, weights), autocast(self.device, self.precision):
            for turn in range(rounds):
                # A rank without an item left looks at the last one again: sharded weights need everybody in each pass.
                k = min(turn * group.world_size + group.rank, count - 1)
                batch = self.items[k % len(self.items)]
                x_start = batch["image"].to(self.device)
                y = self.rules.condition(batch).to(self.device)
                noise = self.rules.noise([k], x_start.shape[1:]).to(self.device)
                for part in (k, (k + count // 2) % count):
                    t = torch.tensor([int((part + 0.5) / count * steps)], device=self.device)
                    losses.append(self.diffusion.training_losses(model, x_start, t, y=y, noise=noise)["loss"])
        # In the items' order, so that the sum is the same for any number of ranks.
        found = group.joined(torch.stack(losses).reshape(1, rounds, -1))  # (ranks, rounds, 2)
        return float(found.transpose(0, 1).reshape(-1, found.shape[-1])[:count].mean())

    @torch.no_grad()
    def preview(self, model, weights, count):
        """Regenerate the first `count` items by deterministic DDIM: original | label map | regenerated.

        :return: the panel (H, W, 3) uint8, and the mean colour error (see `metrics.colour_error`).
        """
        rows, errors = [], []
        # Only the whole forward pass brings sharded weights together, not that of a single layer.
        reuse = {"cache_bytes": 0} if is_sharded(model) else {}
        with _using(model, weights), autocast(self.device, self.precision):
            for k, batch in enumerate(self.items[:count]):
                y = self.rules.condition(batch)
                noise = self.rules.noise([k], batch["image"].shape[1:]).to(self.device)
                result = sample(model, self.preview_diffusion, y.to(self.device), noise, "ddim", **reuse)
                regenerated = result.images.cpu()
                errors.append(colour_error(regenerated, batch["image"]))
                semantics = show_semantics(y, self.rules.num_classes, self.rules.one_hot)
                rows.append([to_uint8(batch["image"])[0], semantics[0], to_uint8(regenerated)[0]])
        panel = picture_grid(rows, ["original", "label map and edges", "regenerated"])
        return panel, float(torch.stack(errors).mean())


@contextmanager
def _using(model, weights):
    """Lend a model other weights, and evaluation mode."""
    training, own = model.training, {key: value.clone() for key, value in model.state_dict().items()}
    try:
        model.load_state_dict(weights)
        yield model.eval()
    finally:
        model.load_state_dict(own)
        model.train(training)
