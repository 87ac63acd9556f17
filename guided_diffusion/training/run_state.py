"""What a training run saves and takes over: everything that the next step depends on."""

import torch

from ..console import InputError
from .checkpoint import check_weights, file_name, load_parts, prune_checkpoints, save_parts, with_legacy_keys
from .group import is_connection_error
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
    """Write a checkpoint of the current step, and remove older ones beyond --keep_checkpoints; say what was removed."""
    s = loop.settings
    save_parts(s.checkpoint_dir, loop.step, parts, {"config": s.config, "val_score": loop.newest_score})
    try:
        removed = prune_checkpoints(s.checkpoint_dir, s.keep_checkpoints)
    except OSError as error:  # the new one is safe all the same
        return f"; older ones could not be removed ({error})"
    return f", removed {', '.join(map(str, removed))}" if removed else ""


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
    names = {}  # of the weights, in the file's order, without their values

    def take(kind, contents):
        where = f"{directory}/{file_name(kind, step)}"
        try:
            if kind == "opt":
                _restore_optimizer(loop, contents, names, where)
            elif kind == "state":
                _restore(loop, contents, where)
            else:
                _take_weights(loop, kind, check_weights(loop.model, contents, where))
            if kind == "model":
                names.update({name: value.to("meta") for name, value in contents.items()})
        except (KeyError, RuntimeError, ValueError, AttributeError, TypeError) as error:
            if isinstance(error, InputError) or is_connection_error(error):
                raise
            raise InputError(f"{where}: it does not fit this run ({error}); check the flags") from None

    loop.step, loop.position = step, step * loop.batch_size
    return load_parts(directory, step, loop.settings.ema_rates, partial, take)[1]


def _take_weights(loop, kind, weights):
    """Take over the model's weights, also as averages until these come; or those of an average."""
    own = [ema for rate, ema in loop.emas.items() if kind in ("model", f"ema_{rate}_")]
    for state in [loop.model.state_dict(), *own] if kind == "model" else own:
        take_over(state, weights)


def _restore_optimizer(loop, saved, names, where):
    optimizer, parameters = loop.optimizer, list(loop.model.parameters())
    state = fitted_state(saved, names, loop.model, where)
    for k, values in state.items():
        for name in MOMENTS:  # in the parameter's own memory layout, which the fused optimizer relies on without a look
            values[name] = torch.empty_like(parameters[k]).copy_(like(values[name], parameters[k]))
    # The flags rule over the file's weight decay; the rest of the settings never changes.
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _restore(loop, state, name):
    if state["seed"] != loop.settings.seed:
        raise InputError(
            f"--seed {loop.settings.seed} contradicts the checkpoint {name}, made with {state['seed']}:"
            " the data order would change; use the same value"
        )
    if state["batch_size"] != loop.batch_size:
        ranks = f" in each of {loop.group.world_size} processes" if loop.group.world_size > 1 else ""
        raise InputError(
            f"--batch_size {loop.settings.batch_size}{ranks} contradicts the checkpoint {name}, made with"
            f" {state['batch_size']} in all: the data order would change; keep the product"
        )
    loop.position = state["position"]
    loop.sampler.load_state_dict(state["sampler"])
    if loop.scaler.is_enabled() and state["scaler"]:
        loop.scaler.load_state_dict(state["scaler"])
    loop.early_stopping.load_state_dict(state["early_stopping"])
    loop.newest_score = state.get("newest_score")
    loop.skipped.fill_(state["skipped"])
    loop.skipped_now.fill_(state.get("skipped_now", 0))
