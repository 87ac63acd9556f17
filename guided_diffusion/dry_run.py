"""--dry_run: look at flags, scenes and weights, and estimate what a run would take, without doing it."""

import os
import time
from dataclasses import fields
from datetime import timedelta

import numpy as np
import torch
from torch import nn

from . import build
from .build_link import describe_label_memory
from .config import parts_of, sweep
from .data.datasets import survey
from .diffusion.unet import ResBlock
from .training.checkpoint import load_weights, resume_point
from .training.devices import autocast, device_memory, for_sampling, placed, select_device

GIB = 2**30
LOOKED_AT, SHOWN = 8, 12  # scenes of each split without --check_all; classes of the histogram


def dry_run(config, log, weights=None):
    """Check flags, scenes and (of sampling, a path) weights; log, on one screen, what the run would take."""
    precision = build.precision_of(config, select_device(config.device), log)
    model, diffusion, training = build.untrained_model(config), build.diffusion_from(config), weights is None
    build.log_unused_attention(config, model, log)
    build.semantic_coding(config)
    if weights and os.path.exists(weights):
        load_weights(build.untrained_model(config), weights)
        log(f"--model_path {weights}: fits the network")
    elif not training:
        log(f"warning: --model_path {weights or '(empty)'} does not exist: the weights were not checked")
    if not training and (config.role == "receive" or config.extractor != "gt"):
        log("dry run: flags and weights were accepted; messages and extracted label maps are not looked at")
        return
    splits = build.training_data(config, log) if training else [build.data_set(config, config.is_train, log)]
    height, width = build.picture_size(splits[0], model)
    if training and config.crop:
        build.check_crop(config.crop, height, width, model)
        height, width = config.crop, width * config.crop // height
    describe_scenes(config, [split for split in splits if split], log)
    if training:  # a folder that holds a run is an error
        start = resume_point(config.checkpoint_dir, config.resume_checkpoint, config.resume_partial, log)
        found = "starting afresh" if start is None else f"resuming from step {start[1]}"
        log(f"checkpoints: {config.checkpoint_dir}, {found}")
    describe_cost(config, model, diffusion, len(splits[0]), height, width, precision, log)
    changed = {f.name: getattr(config, f.name) for f in fields(config) if getattr(config, f.name) != f.default}
    log(f"flags not at --help's defaults: {' '.join(f'--{name} {value}' for name, value in changed.items())}")
    log("dry run: everything was accepted; nothing was trained, sampled or saved")


def describe_scenes(config, splits, log):
    """Decode scenes of the splits; log facts, warnings and the labels' histogram."""
    counts = 0
    for split in splits:
        most = len(split) if config.check_all else min(LOOKED_AT, len(split))
        found, void, (wide, high) = survey(split, most)
        counts, name = counts + found, f"{split.facts.splits[not split.is_train]} split"
        kind, (height, width) = "pictures" if split.has_images else "label maps alone", split.sample_size(0)
        hint = " (--check_all True: all)" * (most < len(split))
        log(f"{name}: {len(split)} {kind} of {height}x{width}; {most} decoded{hint}")
        if min(wide, high) < config.image_size:
            log(f"warning: {name}: files of {high}x{wide} pixels are enlarged to --image_size {config.image_size}")
        if void:
            became = split.facts.map_ids(np.array(255))
            log(f"warning: {name}: label 255 ({void / found.sum():.2%} of the pixels) became class {became}")
    absent = int((counts == 0).sum())
    if absent > len(counts) / 2:
        log(f"warning: {absent} of {len(counts)} classes are in no decoded scene; the network has a channel for each")
    for line in describe_labels(counts, splits[0].facts.names):
        log(line)


def describe_labels(counts, names=(), width=24):
    """Return lines with the share of each class, from its pixels; the longest bar has `width` characters."""
    total, top, lines = max(int(sum(counts)), 1), max(map(int, counts)), []
    present = sorted(((int(count), k) for k, count in enumerate(counts) if count), reverse=True)
    for n, k in present[:SHOWN]:
        name = f" {names[k]:20}" if names else ""
        lines.append(f"  class {k:3d}{name} {100 * n / total:6.2f} %  {'#' * round(width * n / top)}")
    rest = [n for n, _ in present[SHOWN:]]
    return lines + [f"  and {len(rest)} others {100 * sum(rest) / total:.2f} %"] * bool(rest)


def describe_cost(config, model, diffusion, pictures, height, width, precision, log):
    """Log parameters, memory, and from one pass the time of a run on so many pictures; the model is on meta."""
    device, training = select_device(config.device), hasattr(config, "ema_rate")
    if training:
        batch, of = build.pass_size(config, device), "forward and backward"
        passes, steps = -(-config.batch_size // batch), build.loop_settings(config, precision, device).last_step
    else:
        pictures, of = min(pictures, config.num_samples), "evaluation, without noise selection and local pictures"
        batch, passes = min(config.batch_size, pictures), 1 + (config.s > 1)
        steps = diffusion.num_timesteps * -(-pictures // batch) * len(sweep(config))
    weights, activations = memory_gib(config, model, batch, height, width, precision)
    memory, there = weights + activations, device_memory(device) / GIB
    log(f"parameters: {sum(p.numel() for p in model.parameters()):,}")
    parts = f"{weights:.1f} weights{', gradients, optimizer and averages' if training else ''}"
    parts += f", {activations:.1f} activations at batch {batch}, {height}x{width}, {precision}"
    log(f"memory estimate: {memory:.1f} GiB ({parts}) of {there:.0f}")
    if not training:
        log(describe_label_memory(model, height, width, batch, precision, config.label_memory))
    if memory > there:
        log(f"warning: --device {device} has {there:.1f} GiB, which is less: no step was timed")
        return
    log("timing a step with random weights")
    shape = batch, 3, height, width
    seconds = passes * pass_seconds(build.create_model(vars(config)), diffusion, shape, precision, device, training)
    whole = f"{timedelta(seconds=round(seconds * steps))} for {steps} of them" if steps else "no last step is set"
    log(f"time: {seconds:.2f} s for a step ({of}), {whole}")


def pass_seconds(model, diffusion, shape, precision, device, training):
    """Return the seconds of a pass of pictures (N, 3, H, W): an evaluation, or in training forward and backward."""
    model = placed(model, device) if training else for_sampling(model, device, precision)
    x, t = torch.randn(shape, device=device), torch.zeros(shape[0], dtype=torch.int64, device=device)
    y = torch.zeros(shape[0], model.label_channels + model.layer_channels, *shape[2:], device=device)
    for _ in range(2):  # the first one may choose algorithms
        started = time.monotonic()
        with autocast(device, precision):
            found = diffusion.training_losses(model, x, t, y=y, noise=x)["loss"].mean()
            if training:
                found.backward()
        found.item()  # waits for the device
        if (seconds := time.monotonic() - started) > 5:
            break
    return seconds


def memory_gib(config, model, batch, height, width, precision):
    """Estimate the GiB of weights (and what training keeps beside them) and of activations; the model is on meta."""
    training, half = hasattr(config, "ema_rate"), precision != "fp32"
    # Of each weight 4 bytes; in training also of its gradient, AdamW's moments and averages, and 2 of a half copy.
    copies = 4 * (4 + len(parts_of(config.ema_rate))) + 2 * half if training else 4
    everything, checkpointed = activation_bytes(model, height, width, precision)
    # Without a backward pass only the skip connections and the block at work stay.
    activations = batch * (everything if training and not config.use_checkpoint else checkpointed)
    if not training:
        activations *= 1 + (config.s > 1)  # both halves of guidance
        cached = model.modulation_bytes(batch, height, width, 2 if half else 4)
        activations += cached if cached <= config.label_memory * GIB else 0  # else computed at every step
    return copies * sum(p.numel() for p in model.parameters()) / GIB, activations / GIB


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
