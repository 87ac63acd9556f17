"""Measure the plain path against the fast one, in turn: python -m guided_diffusion.benchmark --quick

*plain* is the reference: fp32, contiguous, eager, guidance by two calls of the network, SPADE computed from the label
map at every call; in training the whole batch at once and one parameter after the other. *fast* is what image_train.py
and image_sample.py run. Both have the same random weights. A GPU's owner runs --configuration readme.
"""

import argparse
import dataclasses
import datetime
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from . import build
from .config import TrainConfig, parse_config, parts_of, save_config
from .console import InputError, bar_options, log, run_script
from .data.datasets import load_data
from .data.toy_scenes import write_toy_scenes
from .diffusion.conditioning import Conditioning
from .diffusion.gaussian_diffusion import guided_denoiser
from .diffusion.sampling import run_chain
from .diffusion.solvers import SamplerSettings, ancestral_step
from .files import atomic_write, check_folder
from .training import devices

CONFIGURATIONS = {  # S: 64x128, seconds a step on a CPU; readme: 256x512, the README's network, wants a GPU
    "S": "--image_size 64 --num_channels 64 --num_head_channels 32 --resblock_updown True --learn_sigma True",
    "readme": "--preset cityscapes",
}
SAMPLERS = (("ddpm", "", 1000), ("ddim", "", 50), ("dpm++", "logsnr", 20), ("dpm++", "logsnr", 12))
LONGEST_CHAIN = 50  # steps that run for real; longer chains are scaled from them
CACHE_BYTES = 10 * 2**30  # --label_memory of the cityscapes preset
MATRIX_SIDE, SCALE = 4096, 2.0  # of the product; of guidance
HOST_WAITS = ("StreamSynchronize", "EventSynchronize", "aten::item")  # in names of the profiler's events
ROOT = Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class Bench:
    """What is measured. It travels to the processes in which memory is measured, so it holds no tensors."""

    config: TrainConfig  # its data_dir has toy scenes
    device: torch.device
    precisions: list  # of the fast path
    quick: bool = False
    rates: dict = dataclasses.field(default_factory=dict)  # of matrix products, FLOP/s; the first part fills it in

    @property
    def cases(self):
        """(path, precision) of every benchmark case; the plain one is the reference."""
        return [("plain", "fp32"), *(("fast", precision) for precision in self.precisions)]


# -- measuring --------------------------------------------------------------------------------------------------------


def timer(run):
    """Return torch's `Timer` of a function without arguments; it waits for the device's work."""
    return Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())


def host_waits(run):
    """Return by what a run makes the host wait for the device, as the profiler saw it: "aten::item 2", or "none"."""
    with torch.profiler.profile() as profile:
        run()
    seen = [event for event in profile.key_averages() if event.key.endswith(HOST_WAITS)]
    return ", ".join(f"{event.key} {event.count}" for event in seen) or "none"


def step_rows(bench, runs, batch):
    """Time one step of each of `bench.cases`, in turn, so that a slow moment slows all; yield rows of `STEP`."""
    counts, turns = [], [[] for _ in runs]
    for run in runs:
        with FlopCounterMode(display=False) as counter:  # of products and convolutions
            run()
        counts.append(counter.get_total_flops())
    for _ in range(2 if bench.quick else 5):
        for own, run in zip(turns, runs, strict=True):
            own.append(timer(run).blocked_autorange().median)
    reference = statistics.median(turns[0])
    for (path, precision), run, count, own in zip(bench.cases, runs, counts, turns, strict=True):
        seconds = statistics.median(own)
        share = 100 * count / seconds / bench.rates[precision]
        waits = "" if bench.device.type == "cpu" else host_waits(run)
        yield path, precision, batch, 1e3 * seconds, reference / seconds, count / seconds / 1e9, share, waits


def matrix_products(bench):
    """Products of two square matrices: 2 n^3 FLOP over the time. On a GPU, fp32 rounds to TF32 as convolutions do."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest" if bench.device.type == "cpu" else "high")
    for precision in dict.fromkeys(["fp32", *bench.precisions]):
        dtype = devices.half_dtype(precision) or torch.float32
        a, b = torch.randn(2, MATRIX_SIDE, MATRIX_SIDE, device=bench.device).to(dtype)
        seconds = timer(lambda a=a, b=b: a @ b).blocked_autorange(min_run_time=1).median
        bench.rates[precision] = 2 * MATRIX_SIDE**3 / seconds
        yield precision, bench.rates[precision] / 1e9
    torch.set_float32_matmul_precision(before)


# -- reverse chain ----------------------------------------------------------------------------------------------------


def network(bench, path, precision):
    """Return the network with random weights, none of its layers at zero, so that every layer counts."""
    torch.manual_seed(0)
    model = build.model_from(bench.config)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
    if path == "plain":
        return model.to(bench.device).eval().requires_grad_(False)
    return devices.for_sampling(model, bench.device, precision, bench.config.compile, log)


def reverse_inputs(bench):
    """Return x_t and z (1, 3, H, W), t (1,) in the middle of the chain, and a conditioning y (1, C, H, W)."""
    config, stream = bench.config, torch.Generator().manual_seed(0)
    height, width = config.image_size, 2 * config.image_size
    x, z = torch.randn(2, 1, 3, height, width, generator=stream)
    y = torch.zeros(1, config.num_classes + 1, height, width)
    y[:, 7, height // 2 :], y[:, 23, : height // 2] = 1, 1
    t = torch.tensor([config.diffusion_steps // 2])
    return [tensor.to(bench.device) for tensor in (x, z, t, y)]


def reverse_step(bench, path, precision):
    """Return a function that takes one guided ancestral step; the fast path's modulation is cached here, once."""
    model, (x, z, t, y) = network(bench, path, precision), reverse_inputs(bench)
    diffusion = build.diffusion_from(bench.config).to(bench.device)
    with devices.autocast(bench.device, precision):
        if path == "plain":
            denoiser = guided_denoiser(model, diffusion, y, SCALE)
        else:
            denoiser = Conditioning(model, y, SCALE, CACHE_BYTES).denoiser(diffusion, SCALE, 1)

    @torch.no_grad()
    def run():
        with devices.autocast(bench.device, precision):
            return ancestral_step(diffusion, diffusion.posterior(denoiser(x, t), x, t), x, t, z)

    return run


def reverse_steps(bench):
    """One reverse step with guidance"""
    yield from step_rows(bench, [reverse_step(bench, *case) for case in bench.cases], 1)


def pictures(bench):
    """One picture by several samplers, the cached modulation included, against 1000 plain ancestral steps"""
    x, _, _, y = reverse_inputs(bench)
    plain = 1000 * timer(reverse_step(bench, "plain", "fp32")).timeit(2).median
    yield "plain", "fp32", "ddpm", 1000, plain, 1.0
    for path, precision in bench.cases[1:]:
        model = network(bench, path, precision)
        for method, spacing, steps in SAMPLERS:
            ran = min(steps, 5 if bench.quick else LONGEST_CHAIN)
            settings = SamplerSettings(method=method, steps=f"{spacing}{ran}", s=SCALE)
            diffusion = build.diffusion_from(bench.config, timestep_respacing=settings.steps).to(bench.device)
            run = partial(one_picture, bench, model, precision, diffusion, x, y, settings)
            seconds = timer(run).timeit(1).median * steps / ran
            yield path, precision, f"{method} {spacing}".strip(), steps, seconds, plain / seconds


def one_picture(bench, model, precision, diffusion, x, y, settings):
    """Run a reverse chain, with the modulation cached first."""
    with torch.no_grad(), devices.autocast(bench.device, precision):
        condition = Conditioning(model, y, settings.s, CACHE_BYTES)
        return run_chain(model, diffusion, condition, x, settings, seeds=[0])


# -- training ---------------------------------------------------------------------------------------------------------


class PlainTraining:
    """The steps of a `TrainLoop` written down simply; the learning rate is constant.

    :param loop: a `TrainLoop`, whose weights, inputs and settings it takes over.
    :param config: the `TrainConfig` that it was built from.
    """

    def __init__(self, loop, config):
        self.loop, self.model, self.step = loop, build.model_from(config), 0
        self.model.load_state_dict(loop.model.state_dict())
        self.model.to(loop.device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=loop.settings.lr, foreach=False, fused=False)
        weights = self.model.state_dict()
        self.emas = {rate: {k: v.detach().clone() for k, v in weights.items()} for rate in loop.settings.ema_rates}

    def train_step(self, batch):
        """One optimizer step on a prepared batch; returns the mean loss."""
        loop = self.loop
        batch = {key: devices.to_device(value, loop.device) for key, value in batch.items() if torch.is_tensor(value)}
        t, weights = loop.sampler.sample(batch["u"])
        y = loop.inputs.conditioning(batch)
        losses = loop.diffusion.training_losses(self.model, batch["image"], t, y=y, noise=batch["noise"])
        loss = (losses["loss"] * weights).mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        for rate, ema in self.emas.items():
            decay = min(float(rate), (1 + self.step) / (10 + self.step))
            for name, value in self.model.state_dict().items():
                ema[name].lerp_(value, 1 - decay)
        return loss.detach()


def training_runs(bench, batch_size, cases):
    """Return for each case a function that takes one training step on one batch of the toy scenes."""
    config = dataclasses.replace(bench.config, batch_size=batch_size)
    loop = build.training_loop(config, set(), lambda line: None, device=bench.device)
    batch = next(iter(loop.loader(0)))
    plain = PlainTraining(loop, config) if ("plain", "fp32") in cases else None

    def fast(precision):
        loop.settings = dataclasses.replace(loop.settings, precision=precision)
        loop.scaler = devices.grad_scaler(bench.device, precision)
        loop.train_step(batch)

    return [partial(plain.train_step, batch) if path == "plain" else partial(fast, name) for path, name in cases]


def training_steps(bench):
    """One training step; operations that activation checkpointing repeats are counted"""
    for n in (1,) if bench.quick else (1, 4, 8):
        yield from step_rows(bench, training_runs(bench, n, bench.cases), n)


# -- memory, start-up, loader -----------------------------------------------------------------------------------------


def peaks(bench):
    """Peak memory: of the device's tensors, on a CPU of the whole process; each case in a process of its own"""
    for what in ("reverse step", "training step"):
        for path, precision in bench.cases:
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                peak = pool.submit(step_peak, bench, what, path, precision).result()
            yield what, path, precision, peak / 2**20


def step_peak(bench, what, path, precision):
    """Return the peak memory in bytes of two steps of one picture, and on a CPU of all that this process did before."""
    reverse = what == "reverse step"
    run = reverse_step(bench, path, precision) if reverse else training_runs(bench, 1, [(path, precision)])[0]
    devices.reset_peak_memory(bench.device)
    run()
    run()
    peak = devices.peak_memory(bench.device)
    status = Path("/proc/self/status").read_text()  # getrusage would tell the parent's peak
    return peak or 1024 * int(status.partition("VmHWM:")[2].split()[0])


def startup(bench):
    """Start-up: a new process that imports torch; one that samples one picture in one step with a small network"""
    data = ["--preset", "toy", "--data_dir", bench.config.data_dir]
    with tempfile.TemporaryDirectory() as folder:
        config, _ = parse_config(TrainConfig, "", [*data, "--checkpoint_dir", folder])
        torch.save(build.model_from(config).state_dict(), f"{folder}/ema_0.98_000001.pt")
        save_config(config, f"{folder}/config.json")
        words = f"image_sample.py --model_path {folder} --device cpu --num_samples 1 --timestep_respacing 1"
        words = [*words.split(), "--results_path", "RESULTS", *data]
        for what, command in (("import torch", ["-c", "import torch"]), ("one picture", words)):
            for k in range(2):  # the first one fills the file cache
                start = time.perf_counter()
                own = [word.replace("RESULTS", f"{folder}/{k}") for word in command]
                subprocess.run([sys.executable, *own], cwd=ROOT, check=True, capture_output=True)
            yield what, time.perf_counter() - start


def loader(bench):
    """Loader: pictures of 2048x1024 read by one process, from files and from --cache_dir"""
    count, rates = 2 if bench.quick else 8, {}
    with tempfile.TemporaryDirectory() as folder:
        write_toy_scenes(f"{folder}/scenes", count, 0, 1024, 2048, progress=False)
        flags = {"dataset_mode": "cityscapes", "data_dir": f"{folder}/scenes", "image_size": bench.config.image_size}
        flags |= {"batch_size": 1, "deterministic": True}
        for name, cache_dir in (("source files", ""), ("--cache_dir", f"{folder}/cache")):
            names = {"load_data": load_data, "flags": {**flags, "cache_dir": cache_dir}}
            read = Timer("for _ in load_data(**flags): pass", globals=names)
            rates[name] = count / read.blocked_autorange(min_run_time=1).median
            yield name, rates[name], rates[name] / rates["source files"]


# -- the program ------------------------------------------------------------------------------------------------------

STEP = ("path", "precision", "batch", "ms", "times faster", "GFLOP/s", "% of product rate", "host waits")
PARTS = {  # name: (function, columns of its table)
    "products": (matrix_products, ("precision", "GFLOP/s")),
    "step": (reverse_steps, STEP),
    "picture": (pictures, ("path", "precision", "sampler", "steps", "seconds", "times faster")),
    "training": (training_steps, STEP),
    "memory": (peaks, ("what", "path", "precision", "peak MiB")),
    "startup": (startup, ("what", "seconds")),
    "loader": (loader, ("from", "images/s", "times faster")),
}


def table(columns, rows):
    """Return the lines of a Markdown table; numbers to three digits."""
    shown = [[f"{value:.3g}" if isinstance(value, float) else str(value) for value in row] for row in rows]
    return [f"| {' | '.join(line)} |" for line in [columns, ["---"] * len(columns), *shown]]


def parse(arguments=None):
    """Return the command line's options, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configuration", default="S", choices=CONFIGURATIONS, help="64x128, or readme: 256x512")
    parser.add_argument("--only", default="", help=f"parts to measure, of {', '.join(PARTS)}; empty: all")
    parser.add_argument("--output", default="benchmark.json", help="where the figures go, after each part")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda[:N]")
    parser.add_argument("--precision", default="", help="of the fast path: any of fp32,bf16,fp16; empty: all usable")
    for name, text in (("quick", "about 2 minutes on 2 cores"), ("compile", "torch.compile the fast path's network")):
        parser.add_argument(f"--{name}", nargs="?", const="True", default="False", choices=("True", "False"), help=text)
    options = parser.parse_args(arguments)
    for name, choices in (("only", PARTS), ("precision", ("fp32", "bf16", "fp16"))):
        for part in parts_of(getattr(options, name)):
            if part not in choices:
                raise InputError(f"--{name} {part}: unknown; choose from {', '.join(choices)}")
    check_folder(os.path.dirname(options.output) or ".", "output")
    return options


def bench_from(options, folder):
    """Return the `Bench` of the options, with its toy scenes drawn into the folder."""
    quick, device = options.quick == "True", devices.select_device(options.device)
    places = f"--data_dir {folder}/scenes --checkpoint_dir {folder}/run --preview_items 0 --eval_interval 0"
    words = f"{CONFIGURATIONS[options.configuration]} {places} --num_workers 0 --precision fp32".split()
    config, _ = parse_config(TrainConfig, "", [*words, "--compile", options.compile])
    if config.compile:
        devices.check_compiler(device)
    wanted = parts_of(options.precision) or ["fp32", "bf16", "fp16"]
    usable = dict.fromkeys(devices.usable_precision(device, precision)[0] for precision in wanted)
    write_toy_scenes(config.data_dir, 8, 1, config.image_size, 2 * config.image_size, progress=False)
    return Bench(config, device, list(usable), quick)


def machine(device):
    """Return on what, and with what, the benchmark runs."""
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    found = {"device": devices.device_name(device) or f"CPU {torch.backends.cpu.get_cpu_capability()}"}
    found |= {"threads": torch.get_num_threads(), "torch": torch.__version__, "commit": git.stdout.strip()}
    return found | {"date": datetime.date.today().isoformat()}


def measure(bench, name):
    """Return the result of one part; what it had before it failed (for want of memory, say) is kept."""
    part, columns = PARTS[name]
    found = {"title": part.__doc__, "columns": columns, "rows": [], "failed": ""}
    try:
        for row in part(bench):
            found["rows"].append(row)
    except (RuntimeError, OSError, InputError) as error:
        found["failed"] = " ".join(str(error).split())[:300]
    devices.release_memory(bench.device)
    return found


def main(arguments=None):
    """Measure part after part; print each and write it down."""
    options = parse(arguments)
    names = [name for name in PARTS if name in ("products", *(parts_of(options.only) or PARTS))]
    with tempfile.TemporaryDirectory(prefix="benchmark.") as folder:
        bench = bench_from(options, folder)
        results = {"machine": machine(bench.device), "options": vars(options), "parts": {}}
        print("\n".join(f"- {name}: {value}" for name, value in {**results["machine"], **vars(options)}.items()))
        with tqdm(names, unit="part", **bar_options()) as bar:
            for name in bar:
                bar.set_description(name)
                found = results["parts"][name] = measure(bench, name)
                lines = ["", f"### {found['title']}", "", *table(found["columns"], found["rows"]), found["failed"]]
                bar.write("\n".join(lines), file=sys.stdout)
                with atomic_write(options.output) as f:
                    f.write(json.dumps(results, indent=1) + "\n")
    print(f"figures are in {options.output}")
    failed = [name for name, part in results["parts"].items() if part["failed"]]
    if failed:
        sys.exit(f"benchmark: error: parts that failed: {', '.join(failed)}")


if __name__ == "__main__":
    run_script(main)
