"""From labels, instances and edges to the conditioning tensor. Training and sampling both come here."""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from ..console import InputError

LABEL_SCALES = (1, 2, 4)  # among which training draws, and a transmitter with a target chooses


@dataclass(frozen=True)
class SemanticCoding:
    """What source coding keeps of the semantics.

    :param label_scale: 1, 2, 4 or 8: every so many pixels' label is sent (nearest), and repeated at the receiver; 0:
        one of `LABEL_SCALES` for each picture.
    :param edge_levels: values of an image-edge pixel: 0 (not sent), 2 (a threshold decides) ... 256 (as it is).
    :param edge_threshold: with 2 levels: image edges from here on are 1.
    :param edge_scale: 1, 2, 4 or 8: one pixel of the sent edges for so many, the strongest of them.
    :param label_smooth: the label map goes through `smooth_labels` first, to regions of so many pixels; 0: as it is.
    """

    label_scale: int = 1
    edge_levels: int = 256
    edge_threshold: float = 0.3
    edge_scale: int = 1
    label_smooth: int = 0

    def __post_init__(self):
        for name, scale in (("label_scale", self.label_scale or 1), ("edge_scale", self.edge_scale)):
            if scale not in (1, 2, 4, 8):
                raise InputError(f"--{name} {scale}: expected 1, 2, 4 or 8")
        if self.edge_levels not in (0, *range(2, 257)):
            raise InputError(f"--edge_levels {self.edge_levels}: expected 0 (no image edges), or 2 to 256 levels")
        if not 0 < self.edge_threshold <= 1:
            raise InputError(f"--edge_threshold {self.edge_threshold:g}: expected a value above 0, at most 1")


def shrink_labels(label, scale):
    """Downsample (N, 1, H, W) to (N, 1, ceil(H/scale), ceil(W/scale)) by nearest: the middle pixel of each block."""
    rows, columns = ((torch.arange(0, side, scale) + scale // 2).clamp(max=side - 1) for side in label.shape[2:])
    return label[:, :, rows][:, :, :, columns]


def _neighbours(maps, count=5):
    """Return (count, N, 1, H, W) of (N, 1, H, W): each pixel, its 4 neighbours, the 4 diagonal ones; frames repeat."""
    rows, columns = (torch.arange(-1, side + 1).clamp(0, side - 1) for side in maps.shape[2:])
    padded, (height, width) = maps[:, :, rows][:, :, :, columns], maps.shape[2:]
    places = ((1, 1), (1, 0), (1, 2), (0, 1), (2, 1), (0, 0), (0, 2), (2, 0), (2, 2))
    return torch.stack([padded[:, :, y : y + height, x : x + width] for y, x in places[:count]])


def smooth_labels(label, least):
    """Smooth label maps (N, 1, H, W): the majority of 3x3 pixels, then no 4-connected region below `least` pixels.

    Smaller regions go, ring by ring, to those beside them; a map without any region of that size keeps all.
    """
    near = _neighbours(label, 9)
    votes = torch.stack([(near == each).sum(0) for each in near])
    label = near.gather(0, votes.argmax(0, keepdim=True))[0]  # of equal votes the pixel's own
    same, region = _neighbours(label) == label, torch.arange(label.numel()).view_as(label)
    while True:  # the lowest number of each region spreads: to neighbours, to all that have one number, by jumps
        lowest = torch.where(same, _neighbours(region), region).amin(0)
        if torch.equal(lowest, region):
            break
        joined = region.flatten().scatter_reduce(0, region.flatten(), lowest.flatten(), "amin")
        region = joined[joined][lowest]
    kept = region.flatten().bincount()[region] >= least
    kept |= ~kept.flatten(1).any(1)[:, None, None, None]
    while not kept.all():
        sure = _neighbours(kept)
        label = _neighbours(label).gather(0, sure.int().argmax(0, keepdim=True))[0]
        kept = sure.any(0)
    return label


def enlarge(small, scale, height, width):
    """Repeat pixels of (N, 1, h, w) to (N, 1, height, width)."""
    return small.repeat_interleave(scale, 2).repeat_interleave(scale, 3)[:, :, :height, :width]


def boundaries(ids, label=None):
    """Mark pixels with a 4-neighbour of another id (given label: and of the same class): (N, 1, H, W) ints -> bool."""
    marked = torch.zeros(ids.shape, dtype=torch.bool, device=ids.device)
    for axis in (2, 3):
        last = ids.shape[axis] - 1
        border = ids.narrow(axis, 0, last) != ids.narrow(axis, 1, last)
        if label is not None:
            border &= label.narrow(axis, 0, last) == label.narrow(axis, 1, last)
        for side in (0, 1):
            marked.narrow(axis, side, last).logical_or_(border)
    return marked


def edge_symbols(image_edge, coding):
    """Quantise image edges (N, 1, H, W) in [0, 1] to (N, 1, h, w) uint8 symbols 0...levels-1; None with 0 levels."""
    if coding.edge_levels == 0:
        return None
    if coding.edge_scale > 1:
        image_edge = F.max_pool2d(image_edge, coding.edge_scale, ceil_mode=True)
    if coding.edge_levels == 2:
        return (image_edge >= coding.edge_threshold).to(torch.uint8)
    return (image_edge * (coding.edge_levels - 1)).round().to(torch.uint8)


def describe(label, instance, image_edge, coding):
    """Reduce the semantics, (N, 1, H, W) each or None, to what is sent.

    :return: label ids (N, 1, h, w), `boundaries` in classes (N, 1, H, W) or None, `edge_symbols` (N, 1, h', w') or None
    """
    boundary = None if instance is None else boundaries(instance, label)
    symbols = None if image_edge is None else edge_symbols(image_edge.float(), coding)
    label = smooth_labels(label, coding.label_smooth) if coding.label_smooth else label
    return shrink_labels(label, coding.label_scale), boundary, symbols


def restore(label, boundary, symbols, coding, size, num_classes, one_hot=True, edge_plane=True):
    """Build the conditioning tensor from what was sent: the semantics as the receiver has them.

    Boundaries between classes follow from the label map; they take part wherever boundaries within classes do.

    :param label, boundary, symbols: as `describe` returns them. :param size: (H, W) of the picture.
    :return: (N, C, H, W) float32, as from `encode_semantics`.
    """
    label = enlarge(label, coding.label_scale, *size)
    edges = 0 if boundary is None else (boundaries(label) | boundary.bool()).float()
    if symbols is not None:
        edges = edges + enlarge(symbols, coding.edge_scale, *size).float() / (coding.edge_levels - 1)
    return encode_semantics(label, None, edges, num_classes, one_hot, edge_plane)


def received_semantics(label, instance, image_edge, num_classes, one_hot=True, edge_plane=True, coding=None):
    """Build the conditioning tensor as it is after source coding, for both ends: decode(encode(m))."""
    coding = coding or SemanticCoding()
    sent = describe(label, instance, image_edge, coding)
    return restore(*sent, coding, label.shape[2:], num_classes, one_hot, edge_plane)


def conditioning_channels(num_classes, one_hot=True, no_instance=False):
    """Number of planes of y: one per class (or one with the label ids), and one for the edges unless `no_instance`."""
    return (num_classes if one_hot else 1) + (0 if no_instance else 1)


def encode_semantics(label, instance, image_edge, num_classes, one_hot=True, edge_plane=None):
    """Build the conditioning tensor m (GESCO, arXiv 2306.04321, section III; SDM's label map and instance edges).

    :param label: (N, 1, H, W) integer class ids in 0...num_classes-1.
    :param instance: (N, 1, H, W) integer instance ids, or None.
    :param image_edge: (N, 1, H, W) in [0, 1], or None.
    :param one_hot: one plane per class; otherwise one plane with the raw ids.
    :param edge_plane: whether y has the edge plane (zero without edges); by default where there are edges.
    :return: (N, C, H, W) float32; class planes 0 or 1, the edge plane (instance edge + image edge) in [0, 2].
    """
    label = label.long()
    if label.device.type == "cpu":  # an accelerator would have to wait; its labels were checked where they were read
        low, high = map(int, label.aminmax())
        if low < 0 or high >= num_classes:
            raise InputError(f"label map has id {low if low < 0 else high}, but num_classes is {num_classes}")
    planes = label.float()
    if one_hot:
        planes = planes.new_zeros(len(label), num_classes, *label.shape[2:]).scatter_(1, label, 1.0)
    if edge_plane is None:
        edge_plane = instance is not None or image_edge is not None
    if not edge_plane:
        return planes
    edges = torch.zeros_like(planes[:, :1])
    if instance is not None:
        edges += boundaries(instance)
    if image_edge is not None:
        edges += image_edge
    return torch.cat([planes, edges], dim=1)
