"""On what, and with what, a benchmark ran."""

import os
import platform
import subprocess
from pathlib import Path

import torch

from ..training.devices import device_name

# What decides how fast products are in reduced precision.
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "asimd", "bf16", "i8mm")


def hardware(device):
    """Return a dict of what the machine says about itself; None where it says nothing."""
    facts = _proc("/proc/cpuinfo")
    flags = set((facts.get("flags") or facts.get("Features") or "").split())
    memory = _proc("/proc/meminfo").get("MemTotal", "").split()
    affinity = getattr(os, "sched_getaffinity", lambda pid: range(os.cpu_count() or 1))
    return {
        "cpu": facts.get("model name") or platform.processor() or platform.machine(),
        "cores": len(affinity(0)),
        "threads": torch.get_num_threads(),
        "memory_gib": int(memory[0]) / 2**20 if memory else None,
        "cpu_flags": [flag for flag in CPU_FLAGS if flag in flags],
        "device": str(device),
        "gpu": device_name(device),
    }


def _proc(path):
    """Read the first value of each key of a file of /proc."""
    facts = {}
    try:
        with open(path) as f:
            for line in f:
                key, _, value = line.partition(":")
                facts.setdefault(key.strip(), value.strip())
    except OSError:
        pass
    return facts


def versions():
    """Return the versions of Python, torch and this package's commit (None outside a clone, + where files were edited)."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": _commit(),
        "system": f"{platform.system()} {platform.release()}",
    }


def _commit(root=Path(__file__).parents[2]):
    try:
        run = {"cwd": root, "capture_output": True, "text": True, "check": True, "timeout": 10}
        top = subprocess.run(["git", "rev-parse", "--show-toplevel"], **run).stdout.strip()
        if Path(top).resolve() != Path(root).resolve():
            return None  # another project's clone, in which this package is installed
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], **run).stdout.strip()
        edited = subprocess.run(["git", "status", "--porcelain", "--untracked-files=no"], **run).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+" if edited else "")
