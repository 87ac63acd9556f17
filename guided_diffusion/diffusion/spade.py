"""SPADE normalisation (arXiv 1903.07291), and the ways in which a network is given its label map.

A network's SPADE layers ask their `maps` to modulate: `LabelModulation` computes scale and shift there and then, `CachedModulation`
looks them up, `GuidedModulation` serves both halves of guidance. All three give the same result.
"""

import torch
from torch import nn


class SPADEGroupNorm(nn.Module):
    """GroupNorm whose scale and shift are maps computed from the label map (SPADE, eq. 1).

    :param channels: width of the normalised tensor, a multiple of 32.
    :param label_channels: planes of the conditioning y.
    :param stride: by how much this layer's tensor is smaller than the picture.
    """

    hidden = 128

    def __init__(self, channels, label_channels, stride):
        super().__init__()
        self.stride = stride
        self.number = 0  # the network counts its layers: the place in CachedModulation
        self.norm = nn.GroupNorm(32, channels, affine=False)
        self.mlp_shared = nn.Sequential(nn.Conv2d(label_channels, self.hidden, 3, padding=1), nn.ReLU())
        self.mlp_gamma = nn.Conv2d(self.hidden, channels, 3, padding=1)
        self.mlp_beta = nn.Conv2d(self.hidden, channels, 3, padding=1)

    def scale_shift(self, y):
        """Return (1 + gamma, beta), each (N, channels, h, w), for y already at this layer's size (N, C, h, w)."""
        hidden = self.mlp_shared(y)
        return 1 + self.mlp_gamma(hidden), self.mlp_beta(hidden)

    def forward(self, x, maps):
        return maps.modulate(self, self.norm(x))


class _Maps:
    """What the kinds of maps share: a subclass has scale_shift(spade) -> (1 + gamma, beta)."""

    def modulate(self, spade, x):
        """Return x (N, channels, h, w), already normalised, times the layer's scale plus its shift."""
        scale, shift = self.scale_shift(spade)
        return torch.addcmul(shift, x.to(scale.dtype), scale)


class LabelModulation(_Maps):
    """Label maps y (N, C, H, W), whose modulation is computed whenever it is asked for."""

    def __init__(self, y):
        self.at_stride = {1: y}

    def scale_shift(self, spade):
        """Return the layer's (1 + gamma, beta)."""
        stride = spade.stride
        if stride not in self.at_stride:
            # Nearest resizing by a whole factor takes the first pixel of each block.
            self.at_stride[stride] = self.at_stride[1][..., ::stride, ::stride].contiguous()
        return spade.scale_shift(self.at_stride[stride])

    def rows(self, rows):
        """Return the label maps of some samples."""
        return LabelModulation(self.at_stride[1][rows])


class NullModulation(LabelModulation):
    """The empty label map of one picture size, as `LabelModulation` of zeros (1, C, H, W), at next to no cost.

    Two 3x3 convolutions of a constant are constant but for the two outermost rows and columns: a 5x5 map says it all.
    """

    def scale_shift(self, spade):
        """Return the layer's (1 + gamma, beta)."""
        y, stride = self.at_stride[1], spade.stride
        sizes = [-(-side // stride) for side in y.shape[2:]]
        pair = spade.scale_shift(y.new_zeros(1, y.shape[1], *(min(side, 5) for side in sizes)))
        rows, columns = (self._spread(side, y.device) for side in sizes)
        pixels = (values.permute(0, 2, 3, 1)[:, rows][:, :, columns] for values in pair)
        return tuple(values.permute(0, 3, 1, 2) for values in pixels)  # channels last

    @staticmethod
    def _spread(side, device):
        """Return where each of `side` rows is found among the at most five that were computed."""
        place = torch.arange(side, device=device)
        return torch.where(place < side - 2, place.clamp(max=2), place - side + 5) if side > 5 else place


class CachedModulation(_Maps):
    """The (1 + gamma, beta) of every SPADE layer, in the layers' order: all that follows from the label map alone.

    :param pairs: list of (1 + gamma, beta), each (N, channels, h, w).
    :param chosen: the samples to use, a mask or indices; None: all.
    """

    def __init__(self, pairs, chosen=None):
        self.pairs, self.chosen = pairs, chosen

    def scale_shift(self, spade):
        """Return the layer's (1 + gamma, beta)."""
        pair = self.pairs[spade.number]
        return pair if self.chosen is None else tuple(values[self.chosen] for values in pair)

    def rows(self, rows):
        """Return the maps of some samples; they are picked layer by layer, so that no second set is in memory."""
        return CachedModulation(self.pairs, rows)


class GuidedModulation:
    """Two kinds of maps for a batch of 2N: the first N rows are conditional, the others see the empty label map."""

    def __init__(self, conditional, empty):
        self.halves = conditional, empty

    def modulate(self, spade, x):
        """Return x (2N, channels, h, w), already normalised, times the layer's scales plus its shifts."""
        parts = x.chunk(2)
        pairs = [maps.scale_shift(spade) for maps in self.halves]
        # Into one tensor, where joining two would copy them; guidance has no backward pass.
        out = torch.empty_like(x, dtype=pairs[0][0].dtype)
        for target, part, (scale, shift) in zip(out.chunk(2), parts, pairs, strict=True):
            torch.addcmul(shift, part.to(scale.dtype), scale, out=target)
        return out
