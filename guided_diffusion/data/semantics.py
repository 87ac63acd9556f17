"""From labels, instances and edges to the conditioning tensor. Training and sampling both come here."""

import torch

from ..errors import InputError


def conditioning_channels(num_classes, one_hot=True, no_instance=False):
    """Number of planes of y: one per class (or one with the label ids), and one for the edges unless `no_instance`."""
    return (num_classes if one_hot else 1) + (0 if no_instance else 1)


def instance_edges(instance):
    """Mark the pixels that have a 4-neighbour with another instance id.

    :param instance: (N, 1, H, W) integers.
    :return: (N, 1, H, W) float32, 0 or 1.
    """
    edge = torch.zeros(instance.shape, dtype=torch.bool, device=instance.device)
    across = instance[..., :, 1:] != instance[..., :, :-1]
    down = instance[..., 1:, :] != instance[..., :-1, :]
    edge[..., :, 1:] |= across
    edge[..., :, :-1] |= across
    edge[..., 1:, :] |= down
    edge[..., :-1, :] |= down
    return edge.float()


def encode_semantics(label, instance, image_edge, num_classes, one_hot=True, edge_plane=None):
    """Build the conditioning tensor m (GESCO, arXiv 2306.04321, section III; SDM's label map and instance edges).

    :param label: (N, 1, H, W) integer class ids in 0...num_classes-1.
    :param instance: (N, 1, H, W) integer instance ids, or None.
    :param image_edge: (N, 1, H, W) in [0, 1], or None.
    :param one_hot: one plane per class; otherwise one plane with the raw ids.
    :param edge_plane: whether y has the edge plane; by default when instances or image edges are given. A plane that is
        wanted and has neither is zero.
    :return: (N, C, H, W) float32; class planes 0 or 1, the edge plane (instance edge + image edge) in [0, 2].
    """
    if label.ndim != 4 or label.shape[1] != 1:
        raise InputError(f"label map: expected shape (N, 1, H, W), found {tuple(label.shape)}")
    low, high = int(label.min()), int(label.max())
    if low < 0 or high >= num_classes:
        found = low if low < 0 else high
        raise InputError(f"label map has id {found}, but num_classes is {num_classes}: ids must be 0...{num_classes - 1}")
    if one_hot:
        n, _, h, w = label.shape
        planes = torch.zeros(n, num_classes, h, w, device=label.device).scatter_(1, label.long(), 1.0)
    else:
        planes = label.float()
    edges = [instance_edges(instance)] if instance is not None else []
    edges += [image_edge.float()] if image_edge is not None else []
    if edge_plane is None:
        edge_plane = bool(edges)
    if not edge_plane:
        return planes
    return torch.cat([planes, sum(edges) if edges else torch.zeros_like(planes[:, :1])], dim=1)
