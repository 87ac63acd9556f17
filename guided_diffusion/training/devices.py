"""Devices, their precisions, and networks made ready for them: the only module that names an accelerator."""

import contextlib
import ctypes
import gc
import os
import re
import shutil

import torch
from torch import nn

from ..console import InputError

DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
MAX_COMPILATIONS = 64
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def select_device(name="auto", ranks=None):
    """Return the torch device for --device auto | cpu | cuda[:N]. Raises InputError where there is none.

    :param ranks: this process's `Ranks`; of several on a node each takes the GPU of its local rank, or the only one
        that it is shown (srun's --gpus-per-task).
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise InputError(f"--device {name}: unknown; choose auto, cpu or cuda[:N]")
    if name == "cpu":
        return torch.device("cpu")
    found = torch.cuda.device_count()
    own = ranks.local_rank if ranks is not None and found > 1 else 0
    number = int(name[5:] or own)
    if number >= found:
        hint = "choose another or cpu, or start fewer processes per node"
        raise InputError(f"--device {name}: GPU {number} is asked for, but {found} are shown; {hint}")
    device = torch.device("cuda", number)
    torch.cuda.set_device(device)  # collectives, and the question for bf16, take the current one
    return device


def backend_for(device):
    """Return torch.distributed's name of the backends for tensors on a device and in host memory."""
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def usable_precision(device, precision):
    """Return the precision to use on a device, and a line that says why where it is not the one asked for."""
    if precision == "fp16" and device.type == "cpu":
        return "bf16", "fp16 is of no use on a CPU: using bf16"
    if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return "fp16", "this GPU has no bf16: using fp16"
    return precision, None


def autocast(device, precision):
    """Return a context in which the network runs in `precision`."""
    dtype = DTYPES[precision]
    return torch.autocast(device.type, dtype=dtype) if dtype is not None else contextlib.nullcontext()


def grad_scaler(device, precision):
    """Return a GradScaler, disabled unless the precision is fp16."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")


def pins_memory(device):
    """Whether the loader's memory should be pinned, for copies that do not block."""
    return device.type == "cuda"


def to_device(tensor, device):
    """Move a tensor from host memory without making the host wait, where the device can."""
    return tensor.pin_memory().to(device, non_blocking=True) if pins_memory(device) else tensor.to(device)


def placed(model, device):
    """Put a network on its device, in the memory layout in which convolutions are fastest."""
    if device.type == "cpu":
        keep_freed_memory()
    return model.to(device, memory_format=torch.channels_last)


def keep_freed_memory():
    """Let glibc keep freed blocks, which each step takes again: getting them back page by page costs it 3 to 5 %."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL(None)
        if libc.mallopt(M_MMAP_THRESHOLD, 2**30):  # an old glibc refuses it
            libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def for_sampling(model, device, precision, compiles=False, log=None):
    """Make a network ready for reverse chains: on its device, in evaluation mode, without gradients.

    Weights that autocast would round to `precision` at every call are rounded here, once.
    """
    model, dtype = placed(model, device).eval().requires_grad_(False), DTYPES[precision]
    for module in model.modules() if dtype is not None else ():
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Linear):  # norms stay in float32
            module.to(dtype)
    return compiled(model, log) if compiles else model


def check_compiler(device):
    """Raise InputError where torch.compile has no compiler for the code that it makes."""
    variable, usual = ("CXX", "g++") if device.type == "cpu" else ("CC", "gcc")  # a GPU's kernels are started from C
    compiler = (os.environ.get(variable) or usual).split()[0]
    if not shutil.which(compiler):
        raise InputError(f"--compile True: no {compiler} was found; install it, or name another one in {variable}")


def compiled(model, log):
    """Let torch.compile make the network's code at its first call; state-dict names stay."""
    # Another size (a search's batches, an early stop) makes torch compile again, and go on uncompiled beyond the limit.
    torch._dynamo.config.recompile_limit = MAX_COMPILATIONS
    log("compiling the network: the first step takes a minute or more")
    model.compile()
    return model


def device_name(device):
    """Return what a GPU calls itself and its memory in GiB, or None for a CPU."""
    if device.type != "cuda":
        return None
    facts = torch.cuda.get_device_properties(device)
    return f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB"


def device_memory(device):
    """Return the bytes of memory of a GPU, or of this machine for a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def release_memory(device):
    """Give back the memory that tensors of the past held on a device, and let `peak_memory` begin anew."""
    gc.collect()  # compiled networks refer to themselves
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device):
    """Return the most bytes that tensors held on a device since `release_memory`, or None for a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
