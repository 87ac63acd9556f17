"""--dry_run: look at data, flags and weights, and say what a run would take, without doing it."""

import os

from . import build
from .data.datasets import label_histogram
from .evaluation.memory import describe_labels, describe_network
from .prepare import ema_rates
from .training.checkpoint import load_weights
from .training.checkpoint import resume_point
from .training.devices import select_device


def dry_run(config, log, weights=None):
    """Check data, labels, sizes and (given a path) weights; say what was found, and what the run would take.

    :param weights: path of the weights in sampling; None in training.
    """
    device = select_device(config.device)
    precision = build.precision_of(config, device, log)
    model = build.untrained_model(config)
    build.log_unused_attention(config, model, log)
    build.diffusion_from(config)
    build.semantic_coding(config)
    training = weights is None
    if not training and (config.role == "receive" or config.extractor != "gt"):
        _check_weights(config, weights, log)
        log("dry run: flags and weights were accepted; messages and extracted label maps are not looked at")
        return
    dataset = build.training_data(config, log)[0] if training else build.data_set(config, config.is_train, log)
    height, width = build.picture_size(dataset, model, skips=training and config.on_bad_image == "skip")
    if training:
        start = resume_point(config.checkpoint_dir, config.resume_checkpoint, config.resume_partial, log)
        log(
            f"checkpoints: {config.checkpoint_dir}, "
            + ("starting afresh" if start is None else f"resuming from step {start[1]}")
        )
    log(f"pictures: {len(dataset)} of {height}x{width}" + ("" if dataset.has_images else ", labels alone"))
    log("label histogram:")
    for line in describe_labels(label_histogram(dataset, progress=True)):
        log(line)
    count = len(ema_rates(config.ema_rate)) if training else None
    batch = build.pass_size(config, device) if training else config.batch_size
    chain = {} if training else {"s": config.s, "label_memory": config.label_memory}
    for line in describe_network(lambda: model, height, width, batch, precision, count, **chain):
        log(line)
    if not training:
        _check_weights(config, weights, log)
    log("dry run: everything was accepted; nothing was trained, sampled or saved")


def _check_weights(config, weights, log):
    if not os.path.exists(weights):
        log(f"--model_path {weights or '(empty)'}: does not exist yet, so the weights were not checked")
        return
    load_weights(build.untrained_model(config), weights)
    log(f"--model_path {weights}: fits the network")
