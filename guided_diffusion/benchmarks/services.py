"""What surrounds the network: reading pictures, starting up, the noise bank."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from .. import build
from ..config import TrainConfig, save_config
from ..data.datasets import SceneDataset
from ..data.toy_scenes import write_toy_scenes
from ..link.noise_bank import NoiseBank
from .timing import in_fresh_process, resident

SOURCES = (1024, 2048)  # height and width of Cityscapes' pictures
DRAWN = 3  # of these; the others are links to them
BANK_SHAPE, BANK_SIZE = (3, 256, 512), 1000
# A small network for the start-up, and its checkpoints: short side of the pictures, entries of the bank.
CHECKPOINTS = {"small": (32, 1000), "full": (256, 1000), "bankless": (256, 0)}
TINY = {
    "num_channels": 32,
    "channel_mult": "1,1",
    "num_res_blocks": 1,
    "num_head_channels": 32,
    "attention_resolutions": "1",
    "resblock_updown": True,
}


# -- loader -----------------------------------------------------------------------------------------------------------


def loader(setup):
    """Pictures per second of one process, as training reads them: from the files, and from the cache."""
    count = 4 if setup.quick else 32
    with tempfile.TemporaryDirectory() as folder:
        setup.tell("drawing scenes" if not setup.data_dir else "opening scenes")
        data_dir = setup.data_dir or _sources(Path(folder) / "scenes", count)
        uncached, cached = (
            _dataset(setup, data_dir, cache_dir, count) for cache_dir in ("", str(Path(folder) / "cache"))
        )
        count = len(uncached)
        rates = {"files": _rate(setup, uncached, count, "files"), "cache": _rate(setup, cached, count, "cache")}
        same = all(_same(uncached.item(k, k), cached.item(k, k)) for k in range(count))
    rows = [{"from": name, "images/s": rate, "times_faster": rate / rates["files"]} for name, rate in rates.items()]
    source = setup.data_dir or f"drawn scenes of {SOURCES[1]}x{SOURCES[0]}"
    return {
        "rows": rows,
        "notes": [
            f"one process, {count} pictures of {source} to short side {setup.flags.image_size}, flips"
            f" and edges included; arrays {'identical' if same else 'DIFFERENT'}"
        ],
    }


def _rate(setup, dataset, count, name):
    """Return samples per second, after a pass that is not timed: it fills the system's file cache and verifies ours."""
    setup.tell(f"reading from {name}")
    for k in range(count):
        dataset.item(k, k)
    start, k = time.perf_counter(), 0
    while k < count or time.perf_counter() - start < 1:
        dataset.item(k % count, k)
        k += 1
    return k / (time.perf_counter() - start)


class _First(SceneDataset):
    """The first scenes of a split: a cache is made of these alone."""

    def __init__(self, count, *arguments, cache_dir, **flags):
        super().__init__(*arguments, **flags)
        self.pairs = self.pairs[:count]
        self.cache = self._cache(*arguments[:2], False, cache_dir) if cache_dir else None


def _dataset(setup, data_dir, cache_dir, count):
    return _First(count, "cityscapes", data_dir, setup.flags.image_size, augment=True, cache_dir=cache_dir)


def _sources(folder, count):
    """Draw a few large scenes, and link the others to them."""
    write_toy_scenes(str(folder), train=min(DRAWN, count), val=0, height=SOURCES[0], width=SOURCES[1], progress=False)
    for path in sorted(folder.rglob("*.png")):
        number = int(path.name.split("_")[1])
        for k in range(number + DRAWN, count, DRAWN):
            os.link(path, path.with_name(path.name.replace(f"_{number:06d}_", f"_{k:06d}_")))
    return str(folder)


def _same(first, second):
    return first.keys() == second.keys() and all(np.array_equal(first[name], second[name]) for name in first)


# -- start-up ---------------------------------------------------------------------------------------------------------

# Runs the script to where it would say how long its first reverse step took; prints the seconds of the noise bank's pass, and
# the peak of resident memory in KiB.
_TO_FIRST_STEP = """
import json, os, sys
sys.argv[0] = "image_sample.py"
sys.path.insert(0, "")
import image_sample
from guided_diffusion.console import StartUp

def stop(self, noise_bank=None):
    with open("/proc/self/status") as f:
        peak = next(line.split()[1] for line in f if line.startswith("VmHWM:"))
    print(json.dumps({"bank_s": noise_bank, "peak_mib": int(peak) / 1024}), flush=True)
    os._exit(0)

StartUp.line = stop
image_sample.main()
"""


def startup(setup):
    """Seconds from starting Python: imports, --help, and the sampling script to its first reverse step."""
    root = Path(__file__).parents[2]
    rounds = 1 if setup.quick else 5
    with tempfile.TemporaryDirectory() as folder:
        jobs = {
            "import torch": ["-c", "import torch"],
            "import guided_diffusion": ["-c", "import guided_diffusion"],
            "import guided_diffusion.build": ["-c", "import guided_diffusion.build"],
        }
        if (root / "image_sample.py").exists() and os.path.exists("/proc/self/status"):
            to_first_step = ["-c", _TO_FIRST_STEP, *_small_checkpoints(Path(folder))]
            jobs |= {
                "image_sample.py --help": ["image_sample.py", "--help"],
                "image_sample.py to its first step, 32x64": [*to_first_step, *_run_flags(folder, "small")],
            }
            if not setup.quick:
                jobs |= {
                    "the same, 256x512": [*to_first_step, *_run_flags(folder, "full")],
                    "the same, 256x512, without a noise bank": [*to_first_step, *_run_flags(folder, "bankless")],
                }
        runs = {name: [] for name in jobs}
        for k in range(rounds + 1):  # the first one warms the file cache
            for name, arguments in jobs.items():
                setup.tell(name)
                words = [word.replace("_ROUND", str(k)) for word in arguments]  # a folder of its own for each run
                runs[name].append(_timed_run(name, words, root))
    medians = {name: _medians(found[1:]) for name, found in runs.items()}
    alone = medians["import torch"]["s"]
    rows = [{"what": name, "times_import_torch": found["s"] / alone, **found} for name, found in medians.items()]
    return {
        "rows": rows,
        "notes": [
            f"medians of {rounds} runs; a small network, one evaluation of it included; bank s is the"
            " part that the noise bank's one pass takes"
        ],
    }


def _timed_run(name, arguments, folder):
    """Run Python; return its seconds, and what it says besides."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr.strip().splitlines()[-1]}")
    said = json.loads(done.stdout) if done.stdout.startswith("{") else {}
    return {"s": time.perf_counter() - start, **{key: value for key, value in said.items() if value is not None}}


def _medians(found):
    return {key: statistics.median(run[key] for run in found) for key in found[0]}


def _small_checkpoints(folder):
    """Write the checkpoints and a scene; return the script's flags for all of them."""
    write_toy_scenes(str(folder / "scenes"), train=0, val=1, height=256, width=512, progress=False)
    for name, (side, size) in CHECKPOINTS.items():
        flags = TrainConfig(**TINY, image_size=side, noise_bank_size=size)
        (folder / name).mkdir()
        with torch.random.fork_rng(devices=[]):
            torch.save(build.model_from(flags).state_dict(), folder / name / "ema_0.9999_000001.pt")
        save_config(flags, folder / name / "config.json")
    return ["--data_dir", f"{folder}/scenes", "--num_samples", "1", "--timestep_respacing", "2", "--device", "cpu"]


def _run_flags(folder, name):
    return ["--model_path", f"{folder}/{name}", "--results_path", f"{folder}/{name}_ROUND"]


# -- noise bank -------------------------------------------------------------------------------------------------------


def bank(setup):
    """The full-size bank: its one pass over the stream, an entry afterwards, and the memory that it takes."""
    setup.tell(f"{BANK_SIZE} entries")
    found = in_fresh_process(bank_costs, BANK_SHAPE, BANK_SIZE)
    shape = "x".join(map(str, BANK_SHAPE))
    return {
        "rows": [{"shape": shape, "entries": BANK_SIZE, **found}],
        "notes": [
            f"in a fresh process; the whole bank would take {4 * BANK_SIZE * np.prod(BANK_SHAPE) / 2**20:.0f} MiB"
        ],
    }


def bank_costs(shape, size):
    """Return seconds of the first pass, milliseconds of an entry, and the growth of resident memory in MiB."""
    torch.randn(shape)  # the heap, and threads
    before, start = resident(), time.perf_counter()
    noise = NoiseBank(shape, size)
    noise[size - 1]
    first, times = time.perf_counter() - start, []
    for i in range(20):
        start = time.perf_counter()
        noise[i * size // 20]
        times.append(time.perf_counter() - start)
    return {"pass_s": first, "entry_ms": 1e3 * statistics.median(times), "grown_mib": (resident() - before) / 2**20}
