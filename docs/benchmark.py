"""Measure the plain path against the fast one, in turn.

PYTHONPATH=. python docs/benchmark.py --quick

Plain is the reference: fp32, contiguous, eager, guidance by two calls of the network, SPADE computed from the label map
at each; in training the whole batch at once, and one parameter after the other. Fast is what image_train.py and
image_sample.py run. Weights are random. A GPU's owner runs --configuration readme.
"""

import argparse
import copy
import dataclasses
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch
from torch.utils.benchmark import Measurement, Timer
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from guided_diffusion import build
from guided_diffusion.config import SampleConfig, TrainConfig, parse_config, parts_of
from guided_diffusion.console import InputError, bar_options, log, run_script
from guided_diffusion.data.datasets import SceneDataset
from guided_diffusion.data.semantics import conditioning_channels
from guided_diffusion.data.toy_scenes import write_toy_scenes
from guided_diffusion.diffusion.conditioning import Conditioning
from guided_diffusion.diffusion.gaussian_diffusion import guided_denoiser
from guided_diffusion.diffusion.sampling import run_chain
from guided_diffusion.diffusion.solvers import SamplerSettings, ancestral_step
from guided_diffusion.files import atomic_write, check_folder
from guided_diffusion.link.color_layer import PLANES
from guided_diffusion.training import devices

CONFIGURATIONS = {  # S: 64x128, a step takes a CPU less than a second; readme: 256x512, wants a GPU; camvid: 128x256
    "S": "--image_size 64 --num_channels 64 --num_head_channels 32 --resblock_updown True --learn_sigma True",
    "readme": "--preset cityscapes",
    "camvid": "--preset camvid",
}
SAMPLERS = (("dpm++", "logsnr12"), ("dpm++", "logsnr20"), ("ddim", "50"))  # but with a colour layer the preset's alone
CACHE_BYTES = 10 * 2**30  # --label_memory of the cityscapes preset
GUIDANCE = 2.0  # the scale s
ROUNDS = 3  # turns behind each median of a step
SIDE = 4096  # of the matrices by whose product the machine is judged
HOST_WAITS = ("StreamSynchronize", "EventSynchronize", "aten::item")  # ends of the profiler's names
ROOT = Path(__file__).parents[1]


def timer(run):
    """Return torch's `Timer` of a function without arguments; it waits for the device to end its work."""
    return Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())


def host_waits(run):
    """Return what makes the host wait for the device in a run, as the profiler sees it: "aten::item 2", or "none"."""
    with torch.profiler.profile() as profile:
        run()
    seen = [event for event in profile.key_averages() if event.key.endswith(HOST_WAITS)]
    return ", ".join(f"{event.key} {event.count}" for event in seen) or "none"


def step_rows(bench, cases, batch):
    """Time cases, a dict from (path, precision) to functions, in turn: a slow moment slows all. Yield rows of STEP."""
    turns = [[timer(run).blocked_autorange() for run in cases.values()] for _ in range(ROUNDS)]  # each warms up first
    medians = [Measurement.merge(own)[0].median for own in zip(*turns, strict=True)]  # the plain one comes first
    for ((path, precision), run), seconds in zip(cases.items(), medians, strict=True):
        with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
            run()
        rate, factor = counter.get_total_flops() / seconds, medians[0] / seconds
        waits = "" if bench.device.type == "cpu" else host_waits(run)
        yield path, precision, batch, 1e3 * seconds, factor, rate / 1e9, 100 * rate / bench.rates[precision], waits


def products(bench):
    """Products of two square matrices, the fastest of 3 turns. On a GPU, fp32 rounds to TF32 as convolutions do"""
    torch.set_float32_matmul_precision("highest" if bench.device.type == "cpu" else "high")
    for precision in bench.precisions:
        dtype = devices.DTYPES[precision] or torch.float32
        a, b = torch.randn(2, SIDE, SIDE, device=bench.device).to(dtype)
        turns = [timer(partial(torch.mm, a, b)).blocked_autorange().median for _ in range(3)]
        bench.rates[precision] = 2 * SIDE**3 / min(turns)
        yield precision, bench.rates[precision] / 1e9
    torch.set_float32_matmul_precision("highest")  # torch's default


def network(bench, path, precision):
    """Return the network with random weights, none of its layers at zero, so that every layer counts."""
    model = build.create_model(vars(bench.config))
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    if path == "plain":
        return model.to(bench.device).eval().requires_grad_(False)
    return devices.for_sampling(model, bench.device, precision, bench.compile, log)


def noise_and_labels(bench):
    """Return a noise (1, 3, H, W) and a conditioning (1, C, H, W)."""
    config, size = bench.config, (bench.config.image_size, 2 * bench.config.image_size)
    channels = conditioning_channels(config.num_classes, config.one_hot_label, config.no_instance)
    y = torch.rand(1, channels + PLANES * config.color_layer, *size, device=bench.device)
    return torch.randn(1, 3, *size, device=bench.device), y


def reverse_step(bench, path, precision):
    """Return a function that takes one guided ancestral step; the fast path's modulation is cached here, once."""
    model, (x, y) = network(bench, path, precision), noise_and_labels(bench)
    diffusion = build.diffusion_from(bench.config).to(bench.device)
    t = torch.tensor([diffusion.num_timesteps // 2], device=bench.device)
    denoiser = guided_denoiser(model, diffusion, y, GUIDANCE)
    if path == "fast":
        with devices.autocast(bench.device, precision):
            denoiser = Conditioning(model, y, GUIDANCE, CACHE_BYTES).denoiser(diffusion, 1)

    def run():
        with devices.autocast(bench.device, precision):
            return ancestral_step(diffusion.posterior(denoiser(x, t), x, t), x)

    return run


def reverse_steps(bench):
    """One reverse step with guidance scale 2"""
    return step_rows(bench, {case: reverse_step(bench, *case) for case in bench.cases}, 1)


def chains(bench):
    """Return the samplers whose pictures are timed: (method, steps), or (method, steps, guidance scale, start)."""
    if bench.config.color_layer:
        preset, _ = parse_config(SampleConfig, "", ["--preset", bench.config.preset])
        return [(preset.sampler, preset.timestep_respacing, preset.s, preset.start_time)]
    return SAMPLERS[:1] if bench.quick else SAMPLERS


def pictures(bench):
    """One picture, the cached modulation included, against 1000 plain ancestral steps"""
    plain, (x, y) = 1000 * timer(reverse_step(bench, "plain", "fp32")).timeit(2).median, noise_and_labels(bench)
    for precision in bench.precisions:
        model = network(bench, "fast", precision)
        for method, steps, *late in chains(bench):
            guidance, start = late or (GUIDANCE, 0)
            diffusion = build.diffusion_from(bench.config, timestep_respacing=steps, start_time=start).to(bench.device)
            settings = SamplerSettings(method, steps, guidance)

            def run(model=model, diffusion=diffusion, settings=settings):
                condition = Conditioning(model, y, settings.s, CACHE_BYTES)
                run_chain(model, diffusion, condition, x, settings, seeds=[0])

            with devices.autocast(bench.device, precision):
                seconds = timer(run).blocked_autorange().median
            yield precision, method, steps, seconds, plain / seconds


class PlainTraining:
    """The steps of a `TrainLoop` written down simply, with its weights and settings and a constant learning rate."""

    def __init__(self, loop, config):
        self.loop, self.step, self.model = loop, 0, build.create_model(vars(config)).to(loop.device)
        self.model.load_state_dict(loop.model.state_dict())
        rates = {"lr": loop.settings.lr, "weight_decay": loop.settings.weight_decay}
        self.optimizer = torch.optim.AdamW(self.model.parameters(), foreach=False, fused=False, **rates)
        self.emas = {rate: copy.deepcopy(self.model.state_dict()) for rate in loop.settings.ema_rates}

    def train_step(self, batch):
        """One optimizer step on a prepared batch; returns the mean loss."""
        batch = {name: value.to(self.loop.device) for name, value in batch.items() if torch.is_tensor(value)}
        t, weights = self.loop.sampler.sample(batch["u"])
        y, noise = self.loop.inputs.conditioning(batch), batch["noise"]
        losses = self.loop.diffusion.training_losses(self.model, batch["image"], t, y=y, noise=noise)
        loss = (losses["loss"] * weights).mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        for rate, ema in self.emas.items():
            decay = min(float(rate), (1 + self.step) / (10 + self.step))
            for name, value in self.model.state_dict().items():
                ema[name].lerp_(value, 1 - decay)
        return loss.detach()


def training_cases(bench, batch_size):
    """Return the training steps on one batch: a dict from (path, precision) to functions."""
    config = dataclasses.replace(bench.config, batch_size=batch_size)
    loop = build.training_loop(config, set(), lambda line: None, device=bench.device)
    batch = next(iter(loop.loader(0)))

    def fast_step(precision):
        loop.settings = dataclasses.replace(loop.settings, precision=precision)
        loop.scaler = devices.grad_scaler(bench.device, precision)
        return loop.train_step(batch)

    cases = {("plain", "fp32"): partial(PlainTraining(loop, config).train_step, batch)}
    return cases | {("fast", precision): partial(fast_step, precision) for precision in bench.precisions}


def training_steps(bench):
    """One training step; operations that activation checkpointing repeats are counted"""
    for n in (1,) if bench.quick else (1, 4, 8):
        yield from step_rows(bench, training_cases(bench, n), n)


def peaks(bench):
    """Peak memory: of the device's tensors, on a CPU of the whole process; each case in a process of its own"""
    for what in ("reverse step",) if bench.quick else ("reverse step", "training step"):
        for case in bench.cases:
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                yield what, *case, pool.submit(peak_of, bench, what, *case).result() / 2**20


def peak_of(bench, what, path, precision):
    """Return the peak memory in bytes of two steps of one picture, and on a CPU of all that this process did before."""
    reverse = what == "reverse step"
    run = reverse_step(bench, path, precision) if reverse else training_cases(bench, 1)[path, precision]
    devices.release_memory(bench.device)
    run()
    run()
    status = Path("/proc/self/status").read_text()  # getrusage would tell the parent's peak
    return devices.peak_memory(bench.device) or 1024 * int(re.search(r"VmHWM:\s*(\d+)", status)[1])


def loader(bench):
    """Pictures of 2048x1024 read by one process, from files and from --cache_dir"""
    count, rates = 2 if bench.quick else 8, []
    with tempfile.TemporaryDirectory() as folder:
        write_toy_scenes(folder, count, 0, 1024, 2048, progress=False)
        for name, cache_dir in (("files", ""), ("--cache_dir", f"{folder}/cache")):
            dataset = SceneDataset("cityscapes", folder, bench.config.image_size, True, cache_dir=cache_dir)
            read = timer(partial(dataset.batch, range(count)))
            rates.append(count / read.blocked_autorange(min_run_time=1).median)
            yield name, rates[-1], rates[-1] / rates[0]


STEP = ("path", "precision", "batch", "ms", "times faster", "GFLOP/s", "% of product rate", "host waits")
PARTS = {  # name: (function, columns of its table)
    "products": (products, ("precision", "GFLOP/s")),
    "step": (reverse_steps, STEP),
    "picture": (pictures, ("precision", "sampler", "steps", "seconds", "times faster")),
    "training": (training_steps, STEP),
    "memory": (peaks, ("what", "path", "precision", "peak MiB")),
    "loader": (loader, ("from", "images/s", "times faster")),
}


def prepare(arguments, folder):
    """Return the flags, checked, and beside them what the parts take: config, device, precisions, cases, rates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    heights = "pictures of 64 rows (S), 256 (readme), 128 (camvid)"
    parser.add_argument("--configuration", default="S", choices=CONFIGURATIONS, help=heights)
    parser.add_argument("--quick", action="store_true", help="fewer cases: some minutes on 2 cores")
    parser.add_argument("--only", default=",".join(PARTS), help="parts to measure: %(default)s")
    parser.add_argument("--output", default="benchmark.json", help="where the figures go, after each part")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda[:N]")
    parser.add_argument("--compile", action="store_true", help="torch.compile the fast path's network")
    bench = parser.parse_args(arguments)
    bench.flags = dict(vars(bench))
    if not {*parts_of(bench.only)} <= {*PARTS}:
        raise InputError(f"--only {bench.only}: choose from {', '.join(PARTS)}")
    check_folder(str(Path(bench.output).parent), "output")
    bench.device, bench.rates = devices.select_device(bench.device), {}
    usable = (devices.usable_precision(bench.device, name)[0] for name in ("fp32", "bf16", "fp16"))
    bench.precisions = list(dict.fromkeys(usable))
    bench.cases = [("plain", "fp32"), *(("fast", precision) for precision in bench.precisions)]
    fixed = f"--preview_items 0 --eval_interval 0 --num_workers 0 --precision fp32 --compile {bench.compile}"
    folders = ["--data_dir", f"{folder}/scenes", "--checkpoint_dir", f"{folder}/run"]
    words = f"{CONFIGURATIONS[bench.configuration]} {fixed}".split()
    bench.config, _ = parse_config(TrainConfig, "", words + folders)
    write_toy_scenes(bench.config.data_dir, 8, 1, bench.config.image_size, 2 * bench.config.image_size, progress=False)
    return bench


def about(bench):
    """Return what the benchmark runs on and with."""
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    facts = {"device": devices.device_name(bench.device) or "cpu", "cpu": cpu[1] if cpu else ""}
    facts |= {"vectors": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads()}
    facts |= {"python": sys.version.split()[0], "torch": torch.__version__, "commit": git.stdout.strip()}
    return {**bench.flags, **facts, "date": time.strftime("%Y-%m-%d %H:%M %Z")}


def section(found):
    """Return the Markdown lines of one part's result; numbers to three digits."""
    shown = [[f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row] for row in found["rows"]]
    table = [found["columns"], ["---"] * len(found["columns"]), *shown]
    return ["", f"### {found['title']}", "", *(f"| {' | '.join(line)} |" for line in table), found["failed"]]


def measure(bench, part, columns):
    """Return the result of one part; rows from before it failed (for want of memory, say) are kept."""
    found = {"title": part.__doc__, "columns": columns, "rows": [], "failed": ""}
    try:
        found["rows"].extend(part(bench))
    except (RuntimeError, OSError, InputError) as error:
        found["failed"] = f"failed: {' '.join(str(error).split())[:300]}"
    devices.release_memory(bench.device)
    return found


def main(arguments=None):
    """Measure part after part; print each and write it down."""
    with tempfile.TemporaryDirectory(prefix="benchmark.") as folder:
        bench = prepare(arguments, folder)
        results = {"about": about(bench), "parts": {}}
        print("\n".join(f"- {name}: {value}" for name, value in results["about"].items()))
        with tqdm(dict.fromkeys(["products", *parts_of(bench.only)]), unit="part", **bar_options()) as bar:
            for name in bar:
                bar.set_description(name)
                results["parts"][name] = measure(bench, *PARTS[name])
                bar.write("\n".join(section(results["parts"][name])), file=sys.stdout)
                with atomic_write(bench.output) as f:
                    json.dump(results, f, indent=1)
    print(f"figures are in {bench.output}")
    failed = [name for name, found in results["parts"].items() if found["failed"]]
    if failed:
        sys.exit(f"benchmark: error: parts that failed: {', '.join(failed)}")


if __name__ == "__main__":
    run_script(main)
