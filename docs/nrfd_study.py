"""What drawing the forward noise from a small bank does (NR-FD, arXiv 2412.06980): tables and figures.

PYTHONPATH=. python docs/nrfd_study.py --data_dir camvid --features features.pt --segmenter judge.pt --output nrfd

For each prediction, bank size and seed it trains a network by a plain run of image_train.py, into
OUTPUT/PREDICTION_SIZE_SEED with its command in command.txt, and then measures it: the loss on entries of the bank, on
entries that were never drawn and on fresh noise; pictures whose start and later noise come from either; what the
choice of noise gains, by plain runs of image_sample.py. Each result is a file: run again, the study goes on where it
was interrupted. Tables and figures are those of docs/nrfd_report.py.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import nrfd_report
import numpy as np
import torch
from codec_study import measured
from study import link_parts, rows_of
from tqdm import tqdm

from guided_diffusion import build
from guided_diffusion.config import TrainConfig, load_config, parts_of
from guided_diffusion.console import InputError, Interrupts, bar_options, run_script
from guided_diffusion.diffusion.sampling import EarlyStop
from guided_diffusion.files import atomic_write
from guided_diffusion.link.noise_bank import FreshNoise, NoiseBank
from guided_diffusion.link.selection import codeword_noise
from guided_diffusion.random_streams import integer
from guided_diffusion.training.checkpoint import load_weights
from guided_diffusion.training.early_stopping import EarlyStopping
from guided_diffusion.training.inputs import TrainingInputs

ROOT = Path(__file__).resolve().parent.parent
TRAIN = (
    "--preset toy --spade_channels 16 --color_layer False --add_noise False --drop_rate 0 --no_instance True"
    " --lr 6e-4 --lr_anneal_steps 0 --ema_rate 0.99 --eval_interval 25 --eval_items 16 --preview_items 0"
    " --log_interval 25"
)
BANDS = {"high": (0.70, 0.98), "middle": (0.35, 0.65), "low": (0.02, 0.30)}  # of noise: shares of the time axis
TIMES, ITEMS = 3, 12  # timesteps in a band, validation pictures: behind each loss
CHAIN = {"sampler": "ddpm", "timestep_respacing": 20}
KINDS = {  # of the start: of the later noise
    "entry": ("fresh", "entries", "none"),
    "fresh": ("fresh", "none"),
}
CHOICES = {  # what is chosen: flags
    "nothing": "--noise_index random --use_ddim True --timestep_respacing 12",
    "start": "--noise_index best --candidates {start} --use_ddim True --timestep_respacing 12",
    "no step": "--sampler ddim --eta 1 --noise_index random --timestep_respacing 12",
    "steps": "--sampler ddim --eta 1 --selection per_step --step_candidates {step} --step_atoms 1"
    " --timestep_respacing 12",
}
CHAINS = [(sampler, steps) for sampler in ("ddpm", "ddim", "dpm++") for steps in (50, 35, 25)]
TOLERANCES = 0.003, 0.01, 0.03
PATIENCE, MIN_DELTA = (2, 4, 8), (0.0, 0.003, 0.01)


# -- one network ------------------------------------------------------------------------------------------------------


def train(run, options):
    """Train one network with image_train.py, resumed where it was interrupted."""
    prediction, size, seed = run
    folder = folder_of(run, options)
    words = [*TRAIN.split(), "--data_dir", options.data_dir, "--checkpoint_dir", str(folder), *options.flags.split()]
    words += ["--prediction", prediction, "--noise_bank_size", str(size), "--seed", str(seed)]
    words += ["--total_steps", str(options.steps), "--save_interval", str(options.steps // options.points)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "command.txt").write_text(shlex.join(["python", "image_train.py", *words]) + "\n")
    script(folder / "train.log", "image_train.py", *words, "--resume_checkpoint", "auto")


def script(path, *words):
    """Run a script of the repository with its output in a file, whose end an error shows."""
    with open(path, "a") as f:
        code = subprocess.run([sys.executable, str(ROOT / words[0]), *words[1:]], stdout=f, stderr=f).returncode
    if code:
        raise InputError(f"{path}: exit code {code}: {path.read_text()[-300:]}")


def losses(run, options):
    """Return rows of the loss by bands of noise, at every other checkpoint: bank, entries never drawn, fresh."""
    folder, size = folder_of(run, options), run[1]
    values = load_config(folder / "config.json")
    config = TrainConfig(**{name: value for name, value in values.items() if name in TrainConfig.__dataclass_fields__})
    pictures, diffusion = build.data_set(config, False), build.diffusion_from(config)
    model = build.create_model(vars(config))
    fresh = FreshNoise((3, *pictures.sample_size(0)), 0)
    form = config.num_classes, config.one_hot_label, not config.no_instance
    inputs = TrainingInputs(*form, fresh, build.semantic_coding(config))
    noises = {"fresh": lambda n: fresh[n]}
    if size:
        entries = NoiseBank(fresh.shape, size + max(1, size // 10), config.noise_bank_seed)
        noises["bank"] = lambda n: entries[integer(0, "drawn", size, n)]
        noises["never drawn"] = lambda n: entries[size + integer(0, "never drawn", len(entries) - size, n)]
    spread = np.linspace(0, len(pictures) - 1, ITEMS).round().astype(int)
    batches = [inputs(pictures.batch([int(k)])) for k in spread]
    rows = []
    for weights in checkpoints(run, options):
        load_weights(model, weights)
        for (noise, draw), (band, ends) in product(noises.items(), BANDS.items()):
            t, found = torch.tensor(np.linspace(*ends, TIMES) * diffusion.num_timesteps).long(), []
            for k, batch in enumerate(batches):
                x, y = batch["image"].expand(TIMES, -1, -1, -1), inputs.conditioning(batch).expand(TIMES, -1, -1, -1)
                z = torch.stack([draw(TIMES * k + j) for j in range(TIMES)])
                with torch.no_grad():
                    found.append(diffusion.training_losses(model.eval(), x, t, y=y, noise=z)["mse"])
            rows.append({"step": step_of(weights), "what": f"{noise}, {band} noise", "loss": mean(found)})
    return rows


def checkpoints(run, options):
    """Return the averaged weights of every other checkpoint, in order; those of an interruption do not count."""
    every = 2 * options.steps // options.points
    return [path for path in sorted(folder_of(run, options).glob("ema_*.pt")) if step_of(path) % every == 0]


def mean(tensors):
    """Return the mean of tensors (n,) as a number."""
    return float(torch.cat(tensors).mean())


def step_of(weights):
    """Return the step of a weights file, from its name."""
    return int(weights.stem.rpartition("_")[2])


def pictures(run, options):
    """Return rows of what is measured of pictures: at some checkpoints from an entry, at the last one all `KINDS`."""
    points, rows = checkpoints(run, options)[1:], []
    chain, y, numbers, measure = sampled(points[-1], options, **CHAIN)
    # A network without a bank starts from the same pictures of noise: 40 of them are too few to average luck out.
    bank = chain.bank if chain.bank.size else NoiseBank(chain.bank.shape, 1000)
    starts = {"entry": bank, "fresh": FreshNoise(bank.shape, 1)}
    for weights in points:
        load_weights(chain.model, weights)
        kinds = [(start, later) for start in starts for later in KINDS[start]]
        for start, later in kinds if weights == points[-1] else kinds[:1]:
            method = "ddim" if later == "none" else chain.sampler.method
            own = replace(chain, bank=starts[start], sampler=replace(chain.sampler, method=method))
            made = []
            for part in numbers.split(8):
                indices = [k % bank.size if start == "entry" else k for k in part.tolist()]
                noise = partial(entry_noise, bank, chain.diffusion.kept, part.tolist())
                noise = noise if later == "entries" else None
                made.append(own.run(y[part], indices, step_noise=noise).images.cpu())
            rows.append({"step": step_of(weights), "what": f"start {start}, later {later}", **measure(torch.cat(made))})
    return rows


def sampled(weights, options, **flags):
    """Return chain, conditioning (N, C, H, W), numbers (N,) of validation pictures, and their measure."""
    place = SimpleNamespace(data_dir=options.data_dir, model_path=weights, output=options.output)
    networks = {"features": options.features, "segmenter": options.segmenter, "metrics": "psnr,kid,miou"}
    config, parts = link_parts(place, lambda line: None, **networks, **flags, link="analog")
    transmitter, dataset = parts["transmitter"](config), parts["dataset"]
    numbers = torch.arange(min(options.pictures, len(dataset)))
    scenes = [dataset.batch([int(k) * len(dataset) // len(numbers)]) for k in numbers]
    y = torch.cat([transmitter.describe(scene)[1] for scene in scenes])
    original, label = (torch.cat([scene[name] for scene in scenes]) for name in ("image", "label"))
    return transmitter.chain, y, numbers, lambda made: measured(parts["measures"].metrics, made, original, label)


def entry_noise(bank, kept, numbers, t, x, out):
    """Return a step's noise (n, 3, H, W) for pictures `numbers`: masked entries, as in selection, but drawn."""
    drawn = [integer(0, "entry of a step", bank.size, 1000 * numbers[row] + t) for row in out["rows"].tolist()]
    return torch.stack([codeword_noise(bank, ((k,), (1,)), kept[t]) for k in drawn]).to(x)


def chains(run, options):
    """Return rows of what early stopping of a chain saves and costs, beside asking for fewer steps (fresh noise only).

    A rule's value, per picture and step: "change" is today's, the root-mean-square change of the predicted x_0;
    "change to come" scales it by the log SNR that is left over that of the step. A chain stops when it has been below
    the tolerance `EarlyStop.patience` times in a row.
    """
    rows, weights = [], folder_of(run, options) / f"ema_0.99_{options.steps:06d}.pt"
    for sampler, respacing in CHAINS if not run[1] else ():
        chain, y, numbers, measure = sampled(weights, options, sampler=sampler, timestep_respacing=respacing)
        trace = []
        for part in numbers.split(8):
            steps = []
            chain.run(y[part], part.tolist(), on_step=lambda t, x, out, own=steps: own.append(out["pred_xstart"].cpu()))
            trace.append(torch.stack(steps))
        trace = torch.cat(trace, 1)  # (T, N, 3, H, W)
        row = {"step": options.steps, "what": f"{sampler}, {respacing} steps"}
        rows.append(row | {"steps_saved": 0.0, **measure(trace[-1])})
        if respacing != 50:
            continue
        abar = chain.diffusion.alphas_cumprod.double().flip(0)
        level = (abar / (1 - abar)).log()
        moved = (trace[1:] - trace[:-1]).flatten(2).square().mean(2).sqrt()  # (T - 1, N)
        left = (level[-1] - level[1:]) / (level[1:] - level[:-1])
        for (rule, value), tol in product((("change", moved), ("change to come", moved * left[:, None])), TOLERANCES):
            ends = [settled(each) for each in (value < tol).T.tolist()]
            made = torch.stack([trace[end, k] for k, end in enumerate(ends)])
            saved = 1 - (np.mean(ends) + 1) / len(trace)
            rows.append(row | {"what": f"{row['what']}, {rule} below {tol}", "steps_saved": saved, **measure(made)})
    return rows


def settled(calm):
    """Return the step at which a chain stops; calm (T - 1,): whether each step but the first was below tolerance."""
    for k in range(EarlyStop.patience, len(calm) + 1):
        if all(calm[k - EarlyStop.patience : k]):
            return k
    return len(calm)


def selection(run, options):
    """Return rows of what the choice of noise gains, by runs of image_sample.py."""
    rows, size = [], run[1]
    for what, flags in CHOICES.items() if size > 1 else ():
        folder = folder_of(run, options) / "selection" / what.replace(" ", "_")
        words = flags.format(start=min(16, size), step=min(256, size)).split()
        words += ["--data_dir", options.data_dir, "--model_path", str(folder_of(run, options))]
        words += ["--num_samples", str(options.chosen), "--results_path", str(folder), "--metrics", "psnr"]
        folder.mkdir(parents=True, exist_ok=True)
        script(folder / "sample.log", "image_sample.py", *words, "--panel_items", "0", "--device", "cpu")
        found = json.loads((folder / "summary.json").read_text())["mean"]["psnr_db"]
        rows.append({"step": options.steps, "what": f"chosen: {what}", "psnr_db": found})
    return rows


def stopping(run, options):
    """Return rows of where early stopping would have ended a training, and the score there."""
    rows, scores = [], [row for row in rows_of(folder_of(run, options) / "progress.csv") if row["val_score"]]
    scores = [tuple(float(row[name]) for name in ("step", "val_score")) for row in scores]
    for patience, delta in product(PATIENCE, MIN_DELTA):
        rule = EarlyStopping(patience, delta)
        for step, score in scores:
            if not rule.exhausted:
                rule.update(score, step)
                waited = step
        row = {"step": waited, "what": f"patience {patience}, min_delta {delta:g}"}
        row |= {"steps_saved": 1 - waited / scores[-1][0]}
        rows.append(row | {"loss": rule.best, "loss_at_end": scores[-1][1]})
    return rows


# -- the study --------------------------------------------------------------------------------------------------------

PARTS = {"losses": losses, "stopping": stopping, "pictures": pictures, "selection": selection, "chains": chains}


def folder_of(run, options):
    """Return the folder of one network; a bank of size 0 is fresh noise."""
    prediction, size, seed = run
    return Path(options.output) / f"{prediction}_{size or 'fresh'}_{seed}"


def cell(run, options):
    """Do what is missing of one network: its training, and each part's rows in PART.json."""
    torch.set_num_threads(1)
    if not (folder_of(run, options) / f"model{options.steps:06d}.pt").exists():
        train(run, options)
        for path in sorted(folder_of(run, options).glob("opt*.pt"))[:-1]:
            path.unlink()  # a third of the disk; the averages are what is measured
    for part in parts_of(options.parts):
        path = folder_of(run, options) / f"{part}.json"
        if not path.exists():
            rows = PARTS[part](run, options)
            with atomic_write(path) as f:
                json.dump(rows, f, indent=1)


def parse(arguments=None):
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("data_dir", "output", "features", "segmenter"):
        parser.add_argument(f"--{name}", required=True)
    lists = {"sizes": "1,10,100,1000,10000,0", "predictions": "eps,x0", "seeds": "0,1,2", "parts": ",".join(PARTS)}
    for name, default in lists.items():
        parser.add_argument(f"--{name}", default=default, help="of %(default)s; size 0 is fresh noise")
    numbers = {"steps": 500, "points": 10, "pictures": 40, "chosen": 8, "workers": 1}
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default, help="default: %(default)s")
    parser.add_argument("--flags", default="--leave_out 0006r0", help="of all trainings (default: %(default)s)")
    options = parser.parse_args(arguments)
    for part in parts_of(options.parts):
        if part not in PARTS:
            raise InputError(f"--parts {part}: choose from {', '.join(PARTS)}")
    return options


def main():
    """Do what is missing, a network in each worker at a time, then write the tables."""
    options = parse()
    sizes, seeds = (list(map(int, parts_of(text))) for text in (options.sizes, options.seeds))
    # Seed by seed, so that the first tables are of all networks.
    runs = [(prediction, size, seed) for seed, prediction, size in product(seeds, parts_of(options.predictions), sizes)]
    # Each worker leads a group of its own, which a signal ends with the training that it runs.
    start = {"mp_context": get_context("spawn"), "initializer": os.setpgrp}
    with Interrupts(at_once=True), ProcessPoolExecutor(options.workers, **start) as pool:
        cells = [pool.submit(cell, run, options) for run in runs]
        try:
            for done in tqdm(as_completed(cells), total=len(cells), unit="network", **bar_options()):
                done.result()
                nrfd_report.main(options.output)
        except BaseException:
            for worker in pool._processes.values():
                os.killpg(worker.pid, signal.SIGTERM)
            pool.shutdown(cancel_futures=True)
            raise


if __name__ == "__main__":
    run_script(main)
