"""Diff-GOn: goal-oriented communication of street scenes with noise-restricted diffusion.

Names are imported when first used, so that the command line answers without loading torch.
"""

import importlib

_HOMES = {
    "model_and_diffusion_defaults": "config",
    "create_model_and_diffusion": "build",
    "load_weights": "training.checkpoint",
    "NoiseBank": "link.noise_bank",
    "load_data": "data.datasets",
    "encode_semantics": "data.semantics",
    "sample": "diffusion.sampling",
    "EarlyStop": "diffusion.sampling",
    "SampleResult": "diffusion.sampling",
    "InputError": "console",
}
__all__ = sorted(_HOMES)


def __getattr__(name):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__():
    return sorted({*globals(), *_HOMES})
