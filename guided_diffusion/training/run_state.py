"""What a training run saves and takes over: everything that the next step depends on."""

import torch

from ..errors import InputError
from .checkpoint import check_weights, file_name, load_parts, prune_checkpoints, save_parts, with_legacy_keys
from .legacy_optimizer import MOMENTS, fitted_state
from .sharding import like, take_over, whole


def parts_of(loop):
    """Return the parts of a checkpoint of a `TrainLoop` as it stands: dict from kind to contents.

    All ranks must call it; what it returns is meant for rank 0.
    """
    keep = loop.group.main
    weights, emas = whole(loop.model.state_dict(), keep), whole(loop.emas, keep)
    if loop.settings.export_legacy:
        weights = with_legacy_keys(weights, loop.model)
        emas = {rate: with_legacy_keys(ema, loop.model) for rate, ema in emas.items()}
    parts = {"model": weights, "opt": whole(loop.optimizer.state_dict(), keep), "state": _state(loop)}
    return parts | {f"ema_{rate}_": ema for rate, ema in emas.items()}


def save(loop, parts):
    """Write a checkpoint of the current step, and remove older ones beyond --keep_checkpoints; return their steps."""
    s = loop.settings
    save_parts(s.checkpoint_dir, loop.step, parts, {"config": s.config, "val_score": loop.newest_score})
    removed = prune_checkpoints(s.checkpoint_dir, s.keep_checkpoints)
    return ", ".join(map(str, removed))


def _state(loop):
    return {
        "step": loop.step,
        "position": loop.position,
        "batch_size": loop.batch_size,  # of all ranks
        "seed": loop.settings.seed,
        "sampler": loop.sampler.state_dict(),
        "scaler": loop.scaler.state_dict(),
        "early_stopping": loop.early_stopping.state_dict(),
        "newest_score": loop.newest_score,
        "skipped": int(loop.skipped),
        "skipped_now": int(loop.skipped_now),
    }


def resume(loop, directory, step, partial=False):
    """Let a `TrainLoop` take over checkpoint `step` of a folder. Returns the names of missing parts (`partial` only)."""
    parts, missing = load_parts(directory, step, loop.settings.ema_rates, partial)
    name = f"{directory}/{file_name('model', step)}"
    take_over(loop.model.state_dict(), check_weights(loop.model, parts["model"], name))
    loop.step, loop.position = step, step * loop.batch_size
    for rate, ema in loop.emas.items():
        kind = f"ema_{rate}_" if f"ema_{rate}_" in parts else "model"
        take_over(ema, check_weights(loop.model, parts[kind], f"{directory}/{file_name(kind, step)}"))
    try:
        if "opt" in parts:
            _restore_optimizer(loop, parts, f"{directory}/{file_name('opt', step)}")
        if "state" in parts:
            _restore(loop, parts["state"], name)
    except (KeyError, RuntimeError, ValueError, AttributeError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{name}: its opt or state file does not fit this run ({error}); check the flags") from None
    return missing


def _restore_optimizer(loop, parts, where):
    optimizer = loop.optimizer
    state, parameters = fitted_state(parts["opt"], parts["model"], loop.model, where), list(loop.model.parameters())
    for k, values in state.items():
        for name in MOMENTS:  # in the parameter's own memory layout, which the fused optimizer relies on without a look
            values[name] = torch.empty_like(parameters[k]).copy_(like(values[name], parameters[k]))
    # The flags rule over the file's weight decay; the rest of the settings never changes.
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _restore(loop, state, name):
    if state["seed"] != loop.settings.seed:
        raise InputError(f"--seed {loop.settings.seed} contradicts the checkpoint {name}, made with {state['seed']}:"
                         " the data order would change; use the same value")  # fmt: skip
    if state["batch_size"] != loop.batch_size:
        ranks = f" in each of {loop.group.world_size} processes" if loop.group.world_size > 1 else ""
        raise InputError(f"--batch_size {loop.settings.batch_size}{ranks} contradicts the checkpoint {name}, made with"
                         f" {state['batch_size']} in all: the data order would change; keep the product")  # fmt: skip
    loop.position = state["position"]
    loop.sampler.load_state_dict(state["sampler"])
    if loop.scaler.is_enabled() and state["scaler"]:
        loop.scaler.load_state_dict(state["scaler"])
    loop.early_stopping.load_state_dict(state["early_stopping"])
    loop.newest_score = state.get("newest_score")
    loop.skipped.fill_(state["skipped"])
    loop.skipped_now.fill_(state.get("skipped_now", 0))
