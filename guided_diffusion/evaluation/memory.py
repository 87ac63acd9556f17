"""What a dry run says: labels, parameters, memory."""

import torch
from torch import nn

from ..diffusion.unet import ResBlock


def parameter_count(model):
    """Number of parameters of a module."""
    return sum(p.numel() for p in model.parameters())


def activation_elements(model, height, width):
    """Elements of all layer outputs in one forward pass of one picture, measured on the meta device.

    :param model: a `UNetModel` on the meta device.
    :return: (kept for the backward pass, largest block): with checkpointing only block outputs and one block's insides stay.
    """
    total, blocks, insides, handles = 0, 0, {}, []
    owners = {module: block for block in model.modules() if isinstance(block, ResBlock) for module in block.modules()}

    def count(module, _, output):
        nonlocal total
        total += output.numel()
        if module in owners:
            insides[owners[module]] = insides.get(owners[module], 0) + output.numel()

    def count_block(block, _, output):
        nonlocal blocks
        blocks += output.numel()

    for module in model.modules():
        if isinstance(module, ResBlock):
            handles.append(module.register_forward_hook(count_block))
        elif not any(True for _ in module.children()) and not isinstance(module, nn.Identity):
            handles.append(module.register_forward_hook(count))
    with torch.device("meta"), torch.no_grad():
        model(torch.empty(1, 3, height, width), torch.zeros(1), torch.empty(1, model.label_channels, height, width))
    for handle in handles:
        handle.remove()
    return total, blocks + max(insides.values(), default=0)


def label_map_bytes(model, height, width, batch, precision):
    """Return the memory, in bytes, of what follows from a batch's label maps alone."""
    return model.modulation_bytes(batch, height, width, 4 if precision == "fp32" else 2)


def describe_label_memory(model, height, width, batch, precision, limit):
    """Return a line that says whether the label maps' work is kept over a chain; `limit` is --label_memory, in GiB."""
    need = label_map_bytes(model, height, width, batch, precision) / 2**30
    line = f"label maps of {batch} picture{'s' if batch > 1 else ''}: {need:.2g} GiB of scales and shifts, "
    if need <= limit:
        return line + "computed once for each chain"
    return (
        line
        + f"more than --label_memory {limit:g}, so computed at every step: slower; raise the flag, or lower --batch_size"
    )


def memory_estimate(model, height, width, batch, precision, ema_count=None, s=1.0, label_memory=0.0):
    """Estimate memory in GiB, in parts: weights (with optimizer, gradients and averages in training) and activations.

    :param model: a `UNetModel` on the meta device.
    :param batch: pictures in memory at once.
    :param ema_count: number of averages in training; None for sampling.
    :param s, label_memory: guidance scale, and GiB that sampling may take for label maps.
    :return: dict of "weights" and "activations", in GiB; activations include the label maps that sampling keeps.
    """
    everything, checkpointed = activation_elements(model, height, width)
    width_bytes = 4 if precision == "fp32" else 2
    weights = parameter_count(model) * 4 * (1 if ema_count is None else 4 + ema_count)
    # Without a backward pass only the skip connections and the block at work stay.
    kept = checkpointed if ema_count is None or model.use_checkpoint else everything
    stored = 0
    if ema_count is None:
        kept *= 1 + (s > 1)  # both halves of guidance
        stored = label_map_bytes(model, height, width, batch, precision)
        stored = stored if stored <= label_memory * 2**30 else 0  # else computed at every step
    return {"weights": weights / 2**30, "activations": (kept * batch * width_bytes + stored) / 2**30}


def describe_labels(counts, width=24):
    """Return lines with the share of each class that occurs.

    :param counts: pixels per class id.
    :param width: length of the longest bar, in characters.
    """
    total = max(int(sum(counts)), 1)
    present = [(int(count), k) for k, count in enumerate(counts) if count]
    top = max(present, default=(1, 0))[0]
    bars = [(n, k, "#" * round(width * n / top)) for n, k in sorted(present, reverse=True)]
    return [f"  class {k:3d} {100 * n / total:6.2f} %  {bar}" for n, k, bar in bars]


def describe_network(create, height, width, batch, precision, ema_count=None, s=1.0, label_memory=0.0):
    """Return lines with parameter count and memory estimate (see `memory_estimate`).

    :param create: function that builds the network; called under the meta device, so that nothing is allocated.
    """
    with torch.device("meta"):
        model = create()
    need = memory_estimate(model, height, width, batch, precision, ema_count, s, label_memory)
    total = sum(need.values())
    lines = [
        f"parameters: {parameter_count(model):,}",
        f"memory estimate: {total:.1f} GiB ({need['weights']:.1f} weights"
        + (", gradients, optimizer and averages" if ema_count is not None else "")
        + f", {need['activations']:.1f} activations at batch {batch}, {height}x{width}, {precision})",
    ]
    if ema_count is None:
        lines.append(describe_label_memory(model, height, width, batch, precision, label_memory))
    return lines
