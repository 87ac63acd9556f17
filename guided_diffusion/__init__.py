"""Diff-GOn: goal-oriented communication of street scenes with noise-restricted diffusion.

Names are imported when first used, so that the command line answers without loading torch.
"""

import importlib

_HOMES = {
    "model_and_diffusion_defaults": "config",
    "create_model_and_diffusion": "build",
    "load_checkpoint": "build_link",
    "Checkpoint": "build_link",
    "load_weights": "training.checkpoint",
    "NoiseBank": "link.noise_bank",
    "Transmitter": "link.transceiver",
    "Receiver": "link.transceiver",
    "Message": "link.message",
    "AnalogChannel": "link.transceiver",
    "DigitalChannel": "link.transceiver",
    "load_data": "data.datasets",
    "encode_semantics": "data.semantics",
    "sample": "diffusion.sampling",
    "EarlyStop": "diffusion.sampling",
    "SampleResult": "diffusion.sampling",
    "metrics": "evaluation.metrics",
    "InputError": "console",
}
__all__ = sorted(_HOMES)


def __getattr__(name):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f".{_HOMES[name]}", __name__)
    return module if name == "metrics" else getattr(module, name)


def __dir__():
    return sorted({*globals(), *_HOMES})
