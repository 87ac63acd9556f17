"""What is measured: one network at one picture size on one device."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from .. import build
from ..config import TrainConfig
from ..data.semantics import encode_semantics
from ..diffusion.conditioning import Conditioning
from ..diffusion.gaussian_diffusion import guided_denoiser
from ..diffusion.solvers import ancestral_step
from ..training.checkpoint import load_weights
from ..training.devices import autocast, for_sampling, keep_freed_memory


def _silent(what):
    del what


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What the parts share. It travels to the processes in which memory is measured, so it holds no tensors.

    :param flags: the network's flags, as training takes them.
    :param device: torch device.
    :param precisions: of the fast path: any of fp32, bf16, fp16.
    :param scenes: folder of toy scenes, for the training steps. The folder that it is in is the benchmark's own.
    :param s: guidance scale.
    :param cache_bytes: as `Conditioning` takes it.
    :param weights: a checkpoint's file, or "" for random weights.
    :param stop_tol: tolerance of the early stop.
    :param rounds: alternations behind one median.
    :param quick: leave out what takes long.
    :param side: of the square matrices by whose product the machine is judged.
    :param data_dir: Cityscapes folder for the loader; "" draws scenes.
    :param tell: function of a text: what is measured now.
    """

    flags: TrainConfig
    device: torch.device
    precisions: tuple
    scenes: str
    s: float = 2.0
    cache_bytes: int = 2**32
    weights: str = ""
    stop_tol: float = 0.02
    rounds: int = 10
    quick: bool = False
    side: int = 4096
    data_dir: str = ""
    tell: Callable[[str], Any] = _silent

    @property
    def chain(self):
        """Steps of chains that are compared, or timed and scaled."""
        return min(5 if self.quick else 20, self.flags.diffusion_steps)

    @property
    def size(self):
        """(H, W) of the pictures: Cityscapes' 1:2."""
        return self.flags.image_size, 2 * self.flags.image_size

    def silent(self):
        """Return a copy for another process."""
        return replace(self, tell=_silent)

    def diffusion(self, steps=""):
        """Return the diffusion process on the device, respaced to `steps` where given."""
        return build.diffusion_from(self.flags, timestep_respacing=str(steps)).to(self.device)


# -- the network, in both layouts -------------------------------------------------------------------------------------


def plain_network(setup):
    """Return the network as it is built: contiguous. Random weights leave no layer at zero, so that every layer counts."""
    if setup.device.type == "cpu":
        keep_freed_memory()  # as `placed` does for the fast path, whichever is first
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = build.model_from(setup.flags)
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
    if setup.weights:
        load_weights(model, setup.weights)
    return model.to(setup.device).eval().requires_grad_(False)


def fast_network(setup, plain, precision, compiles=None, log=_silent):
    """Return the network as a sampling run makes it ready for a precision, with the weights of `plain`, which stays.

    :param compiles: torch.compile it; None: as the setup's flags say.
    :param say: function of a line, told what compiling takes.
    """
    compiles = setup.flags.compile if compiles is None else compiles
    return for_sampling(copy.deepcopy(plain), setup.device, precision, compiles, log)


def parameter_count(setup):
    """Return the network's number of parameters."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build.model_from(setup.flags).parameters())


# -- one reverse step -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inputs:
    """What one reverse step takes: x_t and z (n, 3, H, W), t (n,), and one conditioning y (1, C, H, W)."""

    x: torch.Tensor
    z: torch.Tensor
    t: torch.Tensor
    y: torch.Tensor


def inputs(setup, n=1, size=None, step=None):
    """Draw the inputs of a reverse step from a stream of their own.

    :param n: samples, all of one label map.
    :param size: (H, W); None: the setup's.
    :param step: step number t; None: in the middle of the whole process.
    """
    (height, width), flags = size or setup.size, setup.flags
    stream = torch.Generator().manual_seed(0)
    x, z = (torch.randn(n, 3, height, width, generator=stream) for _ in range(2))
    coarse = torch.randint(flags.num_classes, (1, 1, -(-height // 8), -(-width // 8)), generator=stream)
    label = coarse.repeat_interleave(8, 2).repeat_interleave(8, 3)[..., :height, :width]
    y = encode_semantics(label, None, None, flags.num_classes, flags.one_hot_label, not flags.no_instance)
    t = torch.full((n,), flags.diffusion_steps // 2 if step is None else step, dtype=torch.int64)
    return Inputs(*(tensor.to(setup.device) for tensor in (x, z, t, y)))


def plain_denoiser(setup, model, diffusion, given):
    """The reference path: everything computed from y at every step, guidance in two passes."""
    return guided_denoiser(model, diffusion, given.y.expand(len(given.x), -1, -1, -1), setup.s)


def conditioning(setup, model, given):
    """Do the label-map work of one picture, as `sample` does; in the context of the model's precision."""
    return Conditioning(model, given.y, setup.s, setup.cache_bytes)


def fast_denoiser(setup, model, diffusion, given):
    """What `sample` runs; to be made and called in the context of its precision."""
    return conditioning(setup, model, given).denoiser(diffusion, setup.s, len(given.x))


def reverse_step(denoiser, diffusion, given):
    """One ancestral step with guidance; returns x_{t-1}."""
    out = diffusion.posterior(denoiser(given.x, given.t), given.x, given.t)
    return ancestral_step(diffusion, out, given.x, given.t, given.z)


def precision_context(setup, precision):
    """Return the function that opens the context of a precision."""
    return lambda: autocast(setup.device, precision)
