"""A network made ready for a device: memory layout, precision of its weights, torch.compile."""

import contextlib
import ctypes
import os
import shlex
import shutil
import time

import torch
from torch import nn

from ..console import InputError
from .distributed import half_dtype

MAX_COMPILATIONS = 64
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
        if libc.mallopt(M_MMAP_THRESHOLD, 2**30):  # an old glibc refuses it
            libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def for_sampling(model, device, precision, compiles=False, log=None):
    """Make a network ready for reverse chains: on its device, in evaluation mode, without gradients.

    :param precision: "fp32", "bf16" or "fp16" (see `rounded`).
    :param compiles: torch.compile it.
    :param say: function of a line, told of the compilation.
    """
    model = rounded(placed(model, device).eval().requires_grad_(False), precision)
    return compiled(model, log) if compiles else model


def rounded(model, precision):
    """Round a network's weights to `precision`, those that autocast would round at every call; return it."""
    dtype = half_dtype(precision)
    for module in model.modules() if dtype is not None else ():
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Linear):  # norms stay in float32
            module.to(dtype)
    return model


def check_compiler(device):
    """Raise InputError where torch.compile has no compiler for the code that it makes."""
    variable, usual = ("CXX", "g++") if device.type == "cpu" else ("CC", "gcc")  # a GPU's kernels are started from C
    compiler = (shlex.split(os.environ.get(variable, "")) or [usual])[0]
    if not shutil.which(compiler):
        raise InputError(
            f"--compile True: torch.compile needs a compiler, and {compiler} was not found; install one, name it"
            f" in {variable}, or drop the flag"
        )


def compiled(model, log):
    """Let torch.compile make the network's code at its first call, and say what that took. State-dict names stay."""
    # Sizes are fixed in the code. Another size (a search's batches, an early stop) makes torch compile again, by its rule for
    # all networks of a process together, and go on uncompiled beyond the limit.
    torch._dynamo.config.recompile_limit = max(MAX_COMPILATIONS, torch._dynamo.config.recompile_limit)
    run, first = torch.compile(model.forward), True

    def forward(*arguments):
        nonlocal first
        if not first:
            return run(*arguments)
        started, first = time.monotonic(), False
        log("compiling the network: the first step takes longer, a minute or more")
        output = run(*arguments)
        log(f"compiled the forward pass in {time.monotonic() - started:.0f} s")
        return output

    model.forward = forward
    return model
