"""--dry_run: look at data, flags and weights, and report what a run would take, without doing it."""

import dataclasses
import json
import os

import torch
from torch import nn

from . import build
from .build_link import describe_label_memory
from .config import parts_of
from .data.datasets import label_histogram
from .diffusion.unet import ResBlock
from .training.checkpoint import load_weights, resume_point
from .training.devices import select_device

GIB = 2**30


def dry_run(config, log, weights=None):
    """Log a configuration; check data, labels and (of sampling, a path) weights; log what the run would take."""
    log(json.dumps(dataclasses.asdict(config), indent=1))
    precision = build.precision_of(config, select_device(config.device), log)
    model = build.untrained_model(config)
    build.log_unused_attention(config, model, log)
    build.diffusion_from(config)
    build.semantic_coding(config)
    training = weights is None
    if weights and os.path.exists(weights):
        load_weights(build.untrained_model(config), weights)
        log(f"--model_path {weights}: fits the network")
    elif not training:
        log(f"--model_path {weights or '(empty)'}: does not exist yet, so the weights were not checked")
    if not training and (config.role == "receive" or config.extractor != "gt"):
        log("dry run: flags and weights were accepted; messages and extracted label maps are not looked at")
        return
    dataset = build.training_data(config, log)[0] if training else build.data_set(config, config.is_train, log)
    height, width = build.picture_size(dataset, model)
    log(f"pictures: {len(dataset)} of {height}x{width}" + ("" if dataset.has_images else ", labels alone"))
    labels = describe_labels(label_histogram(dataset))
    for line in ["label histogram:", *labels, *describe_network(model, config, height, width, precision)]:
        log(line)
    if training:  # last: a folder that holds a run is an error
        start = resume_point(config.checkpoint_dir, config.resume_checkpoint, config.resume_partial, log)
        found = "starting afresh" if start is None else f"resuming from step {start[1]}"
        log(f"checkpoints: {config.checkpoint_dir}, {found}")
    log("dry run: everything was accepted; nothing was trained, sampled or saved")


def describe_labels(counts, width=24):
    """Return lines with the share of each class, from its pixels; the longest bar has `width` characters."""
    total, top = max(int(sum(counts)), 1), max(map(int, counts))
    present = sorted(((int(count), k) for k, count in enumerate(counts) if count), reverse=True)
    return [f"  class {k:3d} {100 * n / total:6.2f} %  {'#' * round(width * n / top)}" for n, k in present]


def describe_network(model, config, height, width, precision):
    """Return lines with parameter count and memory estimate of a training or sampling run; the model is on meta."""
    training, half = hasattr(config, "ema_rate"), precision != "fp32"
    batch = build.pass_size(config, select_device(config.device)) if training else config.batch_size
    count = len(parts_of(config.ema_rate)) if training else None
    weights = weight_bytes(model, precision, count) / GIB
    everything, checkpointed = activation_bytes(model, height, width, precision)
    # Without a backward pass only the skip connections and the block at work stay.
    activations = batch * (everything if training and not config.use_checkpoint else checkpointed) / GIB
    lines = []
    if not training:
        activations *= 1 + (config.s > 1)  # both halves of guidance
        cached = model.modulation_bytes(batch, height, width, 2 if half else 4) / GIB
        activations += cached if cached <= config.label_memory else 0  # else computed at every step
        lines.append(describe_label_memory(model, height, width, batch, precision, config.label_memory))
    parts = f"{weights:.1f} weights{', gradients, optimizer and averages' if training else ''}"
    parts += f", {activations:.1f} activations at batch {batch}, {height}x{width}, {precision}"
    parameters = f"parameters: {sum(p.numel() for p in model.parameters()):,}"
    return [parameters, f"memory estimate: {weights + activations:.1f} GiB ({parts})", *lines]


def weight_bytes(model, precision, ema_count=None):
    """Bytes of the weights; in training also of gradients, AdamW's moments, averages and half copies."""
    copies = 4 if ema_count is None else 4 * (4 + ema_count) + (0 if precision == "fp32" else 2)
    return copies * sum(p.numel() for p in model.parameters())


def activation_bytes(model, height, width, precision):
    """Bytes of all layer outputs in one forward pass of one picture, counted on the meta device.

    Under autocast a norm, and what follows it up to the next convolution, runs in fp32.

    :return: (kept for the backward pass, with checkpointing: the blocks' outputs and the largest block's insides).
    """
    itemsize = 4 if precision == "fp32" else 2
    sizes = {}  # of the outputs, by module

    def count(module, _, output):
        size = 4 if isinstance(module, (nn.GroupNorm, nn.SiLU)) else itemsize
        sizes[module] = sizes.get(module, 0) + output.numel() * size

    blocks = [module for module in model.modules() if isinstance(module, ResBlock)]
    layers = [module for module in model.modules() if not list(module.children()) and type(module) is not nn.Identity]
    handles = [module.register_forward_hook(count) for module in blocks + layers]
    planes = model.label_channels + model.layer_channels
    with torch.device("meta"), torch.no_grad():
        model(torch.empty(1, 3, height, width), torch.zeros(1), torch.empty(1, planes, height, width))
    for handle in handles:
        handle.remove()
    insides = [sum(sizes.get(module, 0) for module in block.modules() if module is not block) for block in blocks]
    return sum(sizes.get(layer, 0) for layer in layers), sum(sizes[block] for block in blocks) + max(insides)
