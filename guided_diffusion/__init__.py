"""Diff-GOn: goal-oriented communication of street scenes with noise-restricted diffusion.

Names are imported when first used, so that the command line answers without loading torch.
"""

import importlib

_HOMES = {
    "config": "model_and_diffusion_defaults",
    "build": "create_model_and_diffusion",
    "build_link": "load_checkpoint Checkpoint",
    "training.checkpoint": "load_weights",
    "link.noise_bank": "NoiseBank",
    "link.message": "Message",
    "link.transceiver": "Transmitter Receiver AnalogChannel",
    "link.channel_coding": "DigitalChannel",
    "data.datasets": "load_data",
    "data.semantics": "encode_semantics",
    "diffusion.sampling": "sample EarlyStop SampleResult",
    "evaluation.metrics": "metrics",
    "console": "InputError",
}
_HOMES = {name: home for home, names in _HOMES.items() for name in names.split()}
__all__ = sorted(_HOMES)


def __getattr__(name):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f".{_HOMES[name]}", __name__)
    return module if name == "metrics" else getattr(module, name)


def __dir__():
    return sorted({*globals(), *_HOMES})
