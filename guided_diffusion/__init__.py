"""Diff-GOn: goal-oriented communication of street scenes with noise-restricted diffusion.

Names are imported when first used, so that the command line answers without loading torch.
"""

import importlib

_HOMES = {"model_and_diffusion_defaults": "config", "create_model_and_diffusion": "build", "InputError": "console"}
_HOMES |= {"load_data": "data.datasets", "encode_semantics": "data.semantics", "NoiseBank": "link.noise_bank"}
_HOMES |= {"load_weights": "training.checkpoint"}
_HOMES |= dict.fromkeys(("sample", "EarlyStop", "SampleResult"), "diffusion.sampling")
__all__ = sorted(_HOMES)


def __getattr__(name):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__():
    return sorted({*globals(), *_HOMES})
