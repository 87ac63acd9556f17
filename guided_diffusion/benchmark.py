"""Measure the plain path against the fast one, alternating in one run, and everything around them.

Start small: python -m guided_diffusion.benchmark --quick
"""

import dataclasses
import datetime
import functools
import importlib
import json
import math
import os
import sys
import tempfile
import time

from .benchmarks import tables
from .config import adopt_training_config, create_parser, parts_of, settle
from .console import InputError, bar_options, log, run_script
from .files import atomic_write, check_folder
from .flags import BankFlags, DiffusionFlags, ModelFlags, SampleFlags, TrainConfig, flag
from .prepare import check_values, find_weights, trained_config
from .presets import PRESETS

# name: (title, module and function in `benchmarks`, share of the time in percent, the same with --quick)
PARTS = {
    "step": ("Reverse step with guidance", "sampling.step", 9, 35),
    "picture": ("One picture", "sampling.picture", 15, 15),
    "training": ("Training step", "training.steps", 38, 25),
    "memory": ("Peak memory", "memory.peaks", 10, 8),
    "loader": ("Loader", "services.loader", 2, 4),
    "startup": ("Start-up", "services.startup", 5, 10),
    "bank": ("Noise bank", "services.bank", 1, 2),
    "candidates": ("Noise candidates", "scaling.candidates", 11, 0),
    "sizes": ("Cost against pixels and batch", "scaling.steps", 8, 0),
    "banks": ("Cost against the bank's entries", "scaling.banks", 1, 1),
}
LEFT_OUT = [  # with --quick
    "training steps of 4 and 8 pictures, and their memory",
    "chains of more than 5 steps (scaled from 5), and 250 and 50 steps",
    "noise candidates",
    "cost against pixels and batch",
    "a bank of 10000 entries",
    "start-up at 256x512",
    "alternations beyond 4, unless --rounds asks for them",
]
CONFIGURATIONS = {
    # 64x128 on a CPU: seconds a step.
    "S": {
        "image_size": 64,
        "num_channels": 64,
        "num_head_channels": 32,
        "num_res_blocks": 2,
        "attention_resolutions": "16,8",
        "resblock_updown": True,
        "learn_sigma": True,
    },
    # 256x512: the cityscapes preset's network. Wants a GPU.
    "readme": PRESETS["cityscapes"]["both"] | PRESETS["cityscapes"]["train"],
}


@dataclasses.dataclass(kw_only=True)
class BenchmarkFlags:
    """Benchmark"""

    configuration: str = flag(
        "S",
        "starting values of the network's flags: S (64x128, for CPUs) or readme (256x512, the"
        " cityscapes preset's network)",
        tuple(CONFIGURATIONS),
    )
    model_path: str = flag("", "time a checkpoint's own network (.pt file or folder); empty: random weights")
    quick: bool = flag(False, "about 2 minutes on 2 cores; the output says what was left out")
    only: str = flag("", f"parts to measure, separated by commas, of {', '.join(PARTS)}; empty: all")
    output: str = flag("benchmark.json", "where the figures go; written again after each part")
    device: str = flag("auto", "auto, cpu or cuda[:N]")
    precision: str = flag("", "precisions of the fast path, separated by commas; empty: fp32,bf16, on a GPU also fp16")
    compile: bool = flag(False, "torch.compile the fast path's network")
    s: float = flag(2.0, "guidance scale, at least 1")
    label_memory: float = flag(
        SampleFlags.label_memory, "GiB that the fast path may keep of what follows from label maps"
    )
    stop_tol: float = flag(0.02, "tolerance of the early-stopped chain")
    rounds: int = flag(0, "alternations behind each median, training takes half as many; 0: 10, or 4 with --quick True")
    matmul: int = flag(4096, "side of the square matrices by whose product the machine is judged")
    data_dir: str = flag("", "Cityscapes folder for the loader; empty: scenes of 2048x1024 are drawn")


@dataclasses.dataclass(kw_only=True)
class BenchmarkConfig(BenchmarkFlags, ModelFlags, DiffusionFlags, BankFlags):
    """Configuration of the benchmark."""


def parse(arguments=None):
    """Return the benchmark's config, the network's `TrainConfig`, the network's flags that were given, and the parts."""
    words = sys.argv[1:] if arguments is None else arguments
    given = vars(create_parser(BenchmarkConfig, __doc__).parse_args(_spelled_out(words)))
    networks = {f.name for group in (ModelFlags, DiffusionFlags, BankFlags) for f in dataclasses.fields(group)}
    config = BenchmarkConfig(**given)
    starting = (
        {} if config.model_path else {k: v for k, v in CONFIGURATIONS[config.configuration].items() if k in networks}
    )
    own = {name: value for name, value in given.items() if name in networks}
    network = TrainConfig(**{**starting, **own}, compile=config.compile)
    settle(network, set(own))
    check_values(network)
    if config.model_path and "configuration" in given:
        raise InputError("--configuration: a checkpoint (--model_path) has its own; drop one of them")
    _check_ranges(config)
    if own.get("timestep_respacing"):
        raise InputError(
            f"--timestep_respacing {network.timestep_respacing}: the parts choose their chains' steps; drop it"
        )
    names = parts_of(config.only) or [name for name, part in PARTS.items() if part[3] or not config.quick]
    for kind, found, choices in (
        ("only", names, PARTS),
        ("precision", parts_of(config.precision), ("fp32", "bf16", "fp16")),
    ):
        odd = [name for name in found if name not in choices]
        if odd:
            raise InputError(f"--{kind} {odd[0]}: choose from {', '.join(choices)}")
    if config.data_dir and not os.path.isdir(config.data_dir):
        raise InputError(f"--data_dir {config.data_dir}: no such folder; name a Cityscapes folder, or drop the flag")
    if not config.output or os.path.isdir(config.output):
        raise InputError(f"--output {config.output or '(empty)'}: name a file")
    check_folder(os.path.dirname(config.output) or ".", "output")
    return config, network, set(own), [name for name in PARTS if name in names]


def _check_ranges(config):
    for name, low in (("rounds", 0), ("matmul", 1), ("s", 1), ("label_memory", 0)):
        value = getattr(config, name)
        if not low <= value < math.inf:
            finite = " and finite" if isinstance(value, float) else ""
            raise InputError(f"--{name} {value}: must be at least {low}{finite}")
    if not 0 < config.stop_tol < math.inf:
        raise InputError(f"--stop_tol {config.stop_tol}: must be above 0 and finite")


def _spelled_out(words):
    """--quick alone means --quick True."""
    pairs = zip(words, [*words[1:], "--"], strict=False)
    return [
        part
        for word, after in pairs
        for part in ([word, "True"] if word == "--quick" and after[:2] == "--" else [word])
    ]


def main(arguments=None):
    """Parse flags, measure part after part, print each and write it down."""
    config, network, given, names = parse(arguments)
    with tempfile.TemporaryDirectory(prefix="benchmark.") as folder:
        setup = _setup(config, network, given, folder)
        os.makedirs(os.path.dirname(config.output) or ".", exist_ok=True)
        results = _about(config, setup)
        for line in tables.document(results):
            print(line)
        failed = _measure(config, setup, names, results)
    print(f"figures are in {config.output}")
    if failed:
        sys.exit(f"benchmark: error: {len(failed)} of {len(names)} parts failed: {'; '.join(failed)}")


def _setup(config, network, given, folder):
    from .benchmarks.setup import Setup
    from .data.toy_scenes import MIN_SIZE, write_toy_scenes
    from .training.devices import check_compiler, select_device, usable_precision

    weights = find_weights(config.model_path, log=log) if config.model_path else ""
    if weights:
        trained, beside = trained_config(weights)
        adopt_training_config(network, given, trained, beside)
    device = select_device(config.device)
    if config.compile:
        check_compiler(device)
    wanted = parts_of(config.precision) or (["fp32", "bf16"] if device.type == "cpu" else ["fp32", "bf16", "fp16"])
    usable = [usable_precision(device, precision) for precision in wanted]
    for why in filter(None, (reason for _, reason in usable)):
        log(why)
    scenes, side = os.path.join(folder, "scenes"), max(MIN_SIZE, network.image_size)
    write_toy_scenes(scenes, train=8, val=1, height=side, width=2 * side, progress=False)
    return Setup(
        flags=network,
        device=device,
        precisions=tuple(dict.fromkeys(name for name, _ in usable)),
        scenes=scenes,
        s=config.s,
        cache_bytes=int(config.label_memory * 2**30),
        weights=weights,
        stop_tol=config.stop_tol,
        rounds=config.rounds or (4 if config.quick else 10),
        quick=config.quick,
        side=config.matmul,
        data_dir=config.data_dir,
    )


def _about(config, setup):
    """Return the head of the results."""
    from .benchmarks.hardware import hardware, versions
    from .benchmarks.setup import parameter_count

    flags = {
        f.name: getattr(setup.flags, f.name)
        for group in (ModelFlags, DiffusionFlags)
        for f in dataclasses.fields(group)
    }
    height, width = setup.size
    configuration = {
        "configuration": "" if setup.weights else config.configuration,
        "model_path": setup.weights,
        "picture": f"{height}x{width}",
        "parameters": parameter_count(setup),
        "guidance_scale": setup.s,
        "compile": config.compile,
        "quick": config.quick,
        "flags": flags,
    }
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "hardware": hardware(setup.device),
        "versions": versions(),
        "configuration": configuration,
        "left_out": LEFT_OUT if config.quick else [],
        "parts": {},
    }


def _measure(config, setup, names, results):
    """Measure the parts one after the other; return a line for each that failed, as a part too large for the memory does."""
    from tqdm import tqdm

    from .training.devices import release_memory

    failed, weights = [], {name: PARTS[name][3 if config.quick else 2] or 1 for name in names}
    bar_format = "{percentage:3.0f}%|{bar:20}| {elapsed}<{remaining} {desc}"
    with tqdm(total=sum(weights.values()), bar_format=bar_format, **bar_options()) as bar:
        for name in names:
            title, place, *_ = PARTS[name]
            module, function = place.split(".")
            tell = functools.partial(_tell, bar, title)
            tell("building")
            measure = getattr(importlib.import_module(f".benchmarks.{module}", __package__), function)
            start = time.monotonic()
            try:
                found = measure(dataclasses.replace(setup, tell=tell))
            except (RuntimeError, InputError) as error:
                found = {"rows": [], "notes": [f"failed: {' '.join(str(error).split())[:500]}"]}
                failed.append(f"{name} ({found['notes'][0][8:200]})")
            results["parts"][title] = {**found, "seconds": time.monotonic() - start}
            release_memory(setup.device)
            with atomic_write(config.output) as f:
                f.write(json.dumps(results, indent=1) + "\n")
            bar.write("\n" + "\n".join(tables.part(title, results["parts"][title])), file=sys.stdout)
            bar.update(weights[name])
    return failed


def _tell(bar, title, what):
    bar.set_description_str(f"{title}: {what}", refresh=sys.stderr.isatty())  # a log gets the finished parts alone


if __name__ == "__main__":
    run_script(main)
