"""A network made ready for a device: memory layout, precision of its weights, torch.compile."""

import contextlib
import ctypes
import os
import shutil
import time

import torch
from torch import nn

from .errors import InputError
from .training.distributed import half_dtype

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def placed(model, device):
    """Put a network on its device, in the memory layout that it is fastest in."""
    if device.type == "cpu":
        keep_freed_memory()
    # Convolutions are faster on pixels than on planes, on CPUs and GPUs alike.
    return model.to(device, memory_format=torch.channels_last)


def keep_freed_memory():
    """Let this process keep freed memory for its next tensors, where glibc would give large blocks back at once.

    A step frees and takes the same blocks again and again; getting them back page by page costs it 3 to 5 %.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 2**30)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def for_sampling(model, device, precision, compiles=False, say=None):
    """Make a network ready for reverse chains: on its device, in evaluation mode, without gradients.

    :param precision: "fp32", "bf16" or "fp16" (see `rounded`).
    :param compiles: torch.compile it.
    :param say: function of a line, told of the compilation.
    """
    model = rounded(placed(model, device).eval().requires_grad_(False), precision)
    return compiled(model, say) if compiles else model


def rounded(model, precision):
    """Round a network's weights to `precision`, those that autocast would round at every call; return it."""
    dtype = half_dtype(precision)
    for module in model.modules() if dtype is not None else ():
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Linear):  # norms stay in float32
            module.to(dtype)
    return model


def compiled(model, say):
    """Let torch.compile make the network's code at its first call, and say what that took. State-dict names stay."""
    compiler = os.environ.get("CXX") or "g++"
    if next(model.parameters()).device.type == "cpu" and not any(map(shutil.which, (compiler, "clang++"))):
        raise InputError(f"--compile True: torch.compile needs a C++ compiler, and {compiler} was not found; install one or"
                         " drop the flag")  # fmt: skip
    # Sizes are fixed in the code; a batch that an early stop has shrunk makes torch compile once more, for any size.
    run, first = torch.compile(model.forward), True

    def forward(*arguments):
        nonlocal first
        if not first:
            return run(*arguments)
        started, first = time.monotonic(), False
        say("compiling the network: the first step takes longer, a minute or more")
        output = run(*arguments)
        say(f"compiled in {time.monotonic() - started:.0f} s")
        return output

    model.forward = forward
    return model
