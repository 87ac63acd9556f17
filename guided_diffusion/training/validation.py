"""A low-variance validation score and preview pictures: fixed items, timesteps and bank indices, EMA weights."""

from contextlib import contextmanager

import torch

from ..diffusion.sampling import sample
from ..link.color_layer import from_residual
from .devices import autocast
from .distributed import Group


class Validation:
    """Looks at a run's weights through the same items every time.

    :param items: loaded batches of one picture each (host memory); the same ones at every call.
    :param inputs: the run's `TrainingInputs`, without channel noise and dropped conditioning.
    :param diffusion, preview_diffusion: the training process, for the score; its respaced form, for the pictures.
    :param panel: function (images, y, regenerated) -> panel (H, W, 3) uint8, mean colour error; see `preview_panel`.
    :param device, precision: where and how the network runs.
    """

    def __init__(self, items, inputs, diffusion, preview_diffusion, panel, device, precision):
        self.items, self.inputs, self.diffusion, self.preview_diffusion = items, inputs, diffusion, preview_diffusion
        self.panel, self.device, self.precision = panel, device, precision

    def _item(self, k):
        """Return image, y and noise of the k-th item, whose noise is that of position k."""
        batch = self.inputs(self.items[k % len(self.items)] | {"position": torch.tensor([k])})
        batch = {key: value.to(self.device) for key, value in batch.items() if torch.is_tensor(value)}
        return batch["image"], self.inputs.conditioning(batch), batch["noise"]

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
                # A rank without an item left looks at the last one again, so that all have as many losses.
                k = min(turn * group.world_size + group.rank, count - 1)
                x_start, y, noise = self._item(k)
                for part in (k, (k + count // 2) % count):
                    t = torch.tensor([int((part + 0.5) / count * steps)], device=self.device)
                    losses.append(self.diffusion.training_losses(model, x_start, t, y=y, noise=noise)["loss"])
        # In the items' order, so that the sum is the same for any number of ranks.
        found = group.joined(torch.stack(losses).reshape(1, rounds, -1))  # (ranks, rounds, 2)
        return float(found.transpose(0, 1).reshape(-1, found.shape[-1])[:count].mean())

    @torch.no_grad()
    def preview(self, model, weights, count):
        """Regenerate the first `count` items by deterministic DDIM; return the panel and the mean colour error."""
        images, ys, pictures = [], [], []
        with _using(model, weights), autocast(self.device, self.precision):
            for k in range(min(count, len(self.items))):
                x_start, y, noise = self._item(k)
                if images and x_start.shape != images[0].shape:
                    continue  # a panel shows pictures of one size
                clip = not self.inputs.color_prior
                made = sample(model, self.preview_diffusion, y, noise, "ddim", clip_denoised=clip).images
                if self.inputs.color_prior:
                    x_start, made = (from_residual(values, y) for values in (x_start, made))
                pictures.append(made.cpu())
                images.append(x_start.cpu())
                ys.append(y.cpu())
        return self.panel(torch.cat(images), torch.cat(ys), torch.cat(pictures))


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
