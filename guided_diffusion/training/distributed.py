"""Devices, their precisions and their backends: the only module that knows what an accelerator is called."""

import contextlib
import gc
import socket

import torch

from ..console import InputError

_DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def select_device(name="auto", ranks=None):
    """Return the torch device for --device auto | cpu | cuda[:N]. Raises InputError where there is none.

    :param ranks: this process's `Ranks`; of several processes on a node each takes the GPU of its local rank (or the only
        one that it is shown, as under srun's --gpus-per-task).
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise InputError(f"--device {name}: unknown; choose auto, cpu or cuda[:N]")
    found = torch.cuda.device_count() if device.type == "cuda" else 0
    if device.type == "cuda" and not 0 <= (device.index or 0) < found:  # torch wraps 128 to -128
        raise InputError(f"--device {name}: this machine shows {found} CUDA devices; choose another or cpu")
    if device.type == "cuda" and ranks is not None and ranks.world_size > 1:
        if device.index is not None:
            raise InputError(
                f"--device {name}: {ranks.world_size} processes cannot share one GPU; use --device cuda or auto"
            )
        if ranks.local_rank >= found > 1:
            raise InputError(
                f"process {ranks.local_rank + 1} of this node has no GPU left: {found} are shown; start fewer"
            )
        device = torch.device("cuda", ranks.local_rank if found > 1 else 0)
        torch.cuda.set_device(device)  # collectives take the current one
    return device


def backend_for(device):
    """Return torch.distributed's name of the backends for tensors on a device and in host memory."""
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def device_identity(device):
    """Return a text that tells a GPU from all others of a job, or None for a CPU."""
    if device.type != "cuda":
        return None
    facts = torch.cuda.get_device_properties(device)
    return f"{socket.gethostname()} {getattr(facts, 'uuid', None) or torch.cuda.current_device()}"


def usable_precision(device, precision):
    """Return the precision to use on a device, and a line that says why where it is not the one asked for."""
    if precision == "fp16" and device.type == "cpu":
        return "bf16", "fp16 is of no use on a CPU: using bf16"
    if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return "fp16", "this GPU has no bf16: using fp16"
    return precision, None


def half_dtype(precision):
    """Return torch's type for "bf16" and "fp16", None for "fp32"."""
    return _DTYPES[precision]


def autocast(device, precision):
    """Return a context in which the network runs in `precision`."""
    dtype = _DTYPES[precision]
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


# -- measuring --------------------------------------------------------------------------------------------------------


def device_name(device):
    """Return what a GPU calls itself and its memory in GiB, or None for a CPU."""
    if device.type != "cuda":
        return None
    facts = torch.cuda.get_device_properties(device)
    return f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB"


def synchronize(device):
    """Wait until a device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release_memory(device):
    """Give back the memory that tensors of the past held on a device."""
    gc.collect()  # compiled networks refer to themselves
    if device.type == "cuda":
        torch.cuda.empty_cache()


def reset_peak_memory(device):
    """Let `peak_memory` begin anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device):
    """Return the most bytes that tensors held on a device since `reset_peak_memory`, or None for a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def tf32(device):
    """Return whether (convolutions, products of matrices) in fp32 round to TF32 on a device, or None for a CPU."""
    return (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) if device.type == "cuda" else None


@contextlib.contextmanager
def products_as_convolutions(device):
    """In the block, let products of fp32 matrices round to TF32 where convolutions do; the two have a switch each."""
    if device.type != "cuda":
        yield
        return
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
