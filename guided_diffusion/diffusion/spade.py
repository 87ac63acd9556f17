"""SPADE normalisation (arXiv 1903.07291), and the forms in which a network is given its conditioning.

A network's SPADE layers ask a modulation for their scale and shift: `LabelModulation` computes them there and then,
`CachedModulation` looks them up, `GuidedModulation` serves both halves of guidance. All give the same result.
"""

import torch
from torch import nn


class SPADEGroupNorm(nn.Module):
    """GroupNorm whose scale and shift are maps computed from the label map (SPADE, eq. 1).

    :param channels, label_channels: width of the normalised tensor, a multiple of 32; planes of the conditioning y.
    :param stride: by how much this layer's tensor is smaller than the picture.
    :param hidden: width between the two convolutions.
    """

    def __init__(self, channels, label_channels, stride, hidden=128):
        super().__init__()
        self.stride, self.number = stride, 0  # the network counts its layers: the place in CachedModulation
        self.norm = nn.GroupNorm(32, channels, affine=False)
        self.mlp_shared = nn.Sequential(nn.Conv2d(label_channels, hidden, 3, padding=1), nn.ReLU())
        self.mlp_gamma = nn.Conv2d(hidden, channels, 3, padding=1)
        self.mlp_beta = nn.Conv2d(hidden, channels, 3, padding=1)

    def scale_shift(self, y):
        """Return (1 + gamma, beta), each (N, channels, h, w), for y already at this layer's size (N, C, h, w)."""
        hidden = self.mlp_shared(y)
        return 1 + self.mlp_gamma(hidden), self.mlp_beta(hidden)

    def forward(self, x, modulation):
        return modulation.modulate(self, self.norm(x))


class Modulation:
    """What a network takes in place of y: gives every SPADE layer its scale_shift(spade) -> (1 + gamma, beta).

    Those of label maps have `rows`, which returns the modulation of the samples at rows (n,).
    """

    def modulate(self, spade, x):
        """Return x (N, channels, h, w), already normalised, times the layer's scale plus its shift."""
        scale, shift = self.scale_shift(spade)
        return torch.addcmul(shift, x.to(scale.dtype), scale)


class LabelModulation(Modulation):
    """The modulation by label maps y (N, C, H, W), computed whenever a layer asks.

    :param strides: those of the network's SPADE layers. All sizes of y are made here: a layer that changed this object
        would break the graph of torch.compile.
    """

    def __init__(self, y, strides):
        self.y = y  # nearest resizing by a whole factor takes the first pixel of each block
        self.resized = {stride: y[..., ::stride, ::stride].contiguous() for stride in strides}

    def scale_shift(self, spade):
        return spade.scale_shift(self.resized[spade.stride])

    def rows(self, rows):
        return LabelModulation(self.y[rows], self.resized)


class NullModulation(Modulation):
    """The modulation by the null conditioning, all zeros, of the size of y (N, C, H, W), at next to no cost.

    Two 3x3 convolutions of a constant are constant but for the two outermost rows and columns: a 5x5 map says it all.
    """

    def __init__(self, y):
        self.y = y

    def scale_shift(self, spade):
        sizes = [-(-side // spade.stride) for side in self.y.shape[2:]]
        zeros = self.y.new_zeros(1, self.y.shape[1], *(min(side, 5) for side in sizes))
        rows, columns = (_spread(side, self.y.device) for side in sizes)
        pixels = (values.permute(0, 2, 3, 1)[:, rows][:, :, columns] for values in spade.scale_shift(zeros))
        return tuple(values.permute(0, 3, 1, 2) for values in pixels)  # channels last


def _spread(side, device):
    """Return where each of `side` rows is found among the at most five that were computed."""
    place = torch.arange(side, device=device)
    return torch.where(place < side - 2, place.clamp(max=2), place - side + min(side, 5))


class CachedModulation(Modulation):
    """Every SPADE layer's (1 + gamma, beta): all that follows from the label maps alone.

    :param pairs: list of (1 + gamma, beta), each (N, channels, h, w), in the layers' order.
    :param chosen: (n,) the samples to use; None: all. They are picked layer by layer: no second set is in memory.
    """

    def __init__(self, pairs, chosen=None):
        self.pairs, self.chosen = pairs, chosen

    def scale_shift(self, spade):
        pair = self.pairs[spade.number]
        return pair if self.chosen is None else tuple(values[self.chosen] for values in pair)

    def rows(self, rows):
        return CachedModulation(self.pairs, rows)


class GuidedModulation(Modulation):
    """Two modulations for a batch of 2N: the first N samples are conditional, the others see the null conditioning."""

    def __init__(self, conditional, null):
        self.halves = conditional, null

    def modulate(self, spade, x):
        pairs = [half.scale_shift(spade) for half in self.halves]
        # Into one tensor, where joining two would copy them; guidance has no backward pass.
        out = torch.empty_like(x, dtype=pairs[0][0].dtype)
        for target, part, (scale, shift) in zip(out.chunk(2), x.chunk(2), pairs, strict=True):
            torch.addcmul(shift, part.to(scale.dtype), scale, out=target)
        return out
