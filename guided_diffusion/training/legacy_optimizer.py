"""Optimizer files of the guided-diffusion family, fitted to our model.

The family's AdamW has the parameters in the order in which its model file lists them. GESCO and Diff-GO-n list the
unused `spade_norm` tensors too, which then take indices but never have a state. With use_fp16 (its MixedPrecisionTrainer)
the optimizer has two parameters: all tensors of at most one dimension in one row (n,), and all others in one (1, n).
"""

import math

import torch

from ..console import InputError
from .checkpoint import LEGACY_KEY

MOMENTS = ("exp_avg", "exp_avg_sq")


def fitted_state(saved, weights, model, where="the optimizer file"):
    """Return the "state" of an AdamW state dict over `model.parameters()`.

    :param saved: contents of an opt*.pt file, ours or the family's.
    :param weights: the raw contents of the model file of the same step: all keys, in the file's order.
    :param model: our network.
    :param where: the file's name, for messages.
    :return: dict from parameter index to {"step", "exp_avg", "exp_avg_sq"}: step () float32, the others in the
        parameter's shape. Parameters that had no state (no gradient yet) have none.
    :raises InputError: the file is no AdamW's, or does not fit the model.
    """
    states = _states(saved, where)
    names = [name for name in weights if not LEGACY_KEY.match(name)]
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    if set(names) != set(shapes):
        raise InputError(f"{where}: the model file beside it does not have this network's parameters; check the flags")
    if len(states) == len(names):
        fitted = dict(zip(names, states, strict=True))
    elif len(states) == len(weights):
        fitted = dict(zip(weights, states, strict=True))
    elif len(states) == 2:
        fitted = _unflattened(states, weights, where)
    else:
        raise InputError(
            f"{where}: it has {len(states)} parameters, the model file beside it {len(weights)}; use this step's"
        )
    return {
        k: _checked(fitted[name], shapes[name], f"{where}: {name}") for k, name in enumerate(shapes) if fitted[name]
    }


def _states(saved, where):
    """Return the state of each parameter in the optimizer's order, {} where it has none."""
    try:
        order = [key for group in saved["param_groups"] for key in group["params"]]
        states = [saved["state"].get(key, {}) for key in order]
        known = set(order) >= set(saved["state"]) and len(set(order)) == len(order)
    except (TypeError, KeyError, AttributeError):
        known = False
    if not known or not all(isinstance(state, dict) for state in states):
        raise InputError(
            f"{where}: expected the state of an optimizer; restore it, or use --resume_partial True without it"
        )
    return states


def _unflattened(states, weights, where):
    """Cut the two rows of the family's MixedPrecisionTrainer into a state per tensor of the model file."""
    fitted = {name: {} for name in weights}
    vectors = [name for name, value in weights.items() if value.ndim <= 1]
    others = [name for name, value in weights.items() if value.ndim > 1]
    for names, state, lead in zip((vectors, others), states, ((), (1,)), strict=True):
        if not state:
            continue
        sizes = [weights[name].numel() for name in names]
        _checked(state, (*lead, sum(sizes)), f"{where}: its row of {len(names)} tensors")
        rows = {moment: state[moment].flatten().split(sizes) for moment in MOMENTS}
        for k, name in enumerate(names):
            shape = weights[name].shape
            fitted[name] = {
                "step": state["step"],
                **{moment: rows[moment][k].reshape(shape).clone() for moment in MOMENTS},
            }
    return fitted


def _checked(state, shape, what):
    """Return a parameter's state with a tensor step, after checking it."""
    for moment in MOMENTS:
        value = state.get(moment)
        if not torch.is_tensor(value) or not value.is_floating_point() or value.shape != shape:
            found = tuple(value.shape) if torch.is_tensor(value) else type(value).__name__
            raise InputError(f"{what} has {moment} {found}, the network needs {shape}; is the file this model's?")
    step = state.get("step")
    if torch.is_tensor(step) and step.numel() == 1:
        step = step.item()
    if isinstance(step, bool) or not isinstance(step, int | float) or not math.isfinite(step) or step < 0:
        raise InputError(f"{what} has no step count; is the file an AdamW's?")
    return {"step": torch.tensor(float(step)), **{moment: state[moment] for moment in MOMENTS}}
