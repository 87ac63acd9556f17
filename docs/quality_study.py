"""Quality against the cost of the reverse chain: the same pictures by several samplers, each from several noise
indices.

python docs/quality_study.py --data_dir D --model_path M --features F --s 2 --pictures 32 --runs 2 \\
    --samplers ddpm:1000,ddim:50,dpm++:20,dpm++:20:0.05 --output quality

It is for networks without a colour layer. A sampler is METHOD:STEPS, with a third part for the tolerance of an early
stop. Run r of picture k starts from bank entry r * pictures + k, whatever the sampler, so runs differ only in the
noise index. It goes on where it was interrupted; output/METHOD_STEPS/ holds the pictures, output/pictures.csv their
PSNR, SSIM and steps, output/quality.csv the tables' rows.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from study import append, link_parts, rows_of
from tqdm import tqdm

from guided_diffusion import build
from guided_diffusion.console import bar_options, run_script, show_beside
from guided_diffusion.diffusion.sampling import EarlyStop, sample
from guided_diffusion.evaluation import segmenters
from guided_diffusion.evaluation.metrics import kernel_distance, psnr, ssim
from guided_diffusion.training.devices import autocast


def run_batch(name, run, numbers, options, config, parts, bar):
    """Make one batch of one sampler's pictures; save them, and return their rows."""
    method, steps, *tol = name.split(":")
    diffusion = build.diffusion_from(config, timestep_respacing=steps)
    scenes = [parts["dataset"].batch([k * len(parts["dataset"]) // options.pictures]) for k in numbers]
    y = torch.cat([parts["transmitter"](config).describe(scene)[1] for scene in scenes])
    indices = [run * options.pictures + k for k in numbers]
    noise, seeds = torch.stack([parts["bank"][i] for i in indices]), [parts["bank"].chain_seed(i) for i in indices]
    rule = EarlyStop(float(tol[0]), patience=options.patience) if tol else None
    started = time.monotonic()
    with autocast(parts["device"], parts["precision"]):
        result = sample(
            parts["model"],
            diffusion,
            y.to(parts["device"]),
            noise.to(parts["device"]),
            method=method,
            s=config.s,
            seeds=seeds,
            early_stop=rule,
            on_step=lambda step, *_: show_beside(bar, f"{name}, run {run}, step {step}"),
        )
    images, seconds = result.images.float().cpu(), time.monotonic() - started
    originals = torch.cat([scene["image"] for scene in scenes])
    measures = {"psnr_db": psnr(images, originals).tolist(), "ssim": ssim(images, originals).tolist()}
    rows = []
    for j, k in enumerate(numbers):
        np.save(picture_file(options, name, run, k), images[j].half().numpy())
        row = {"sampler": name, "run": run, "picture": k, "steps": int(result.steps[j])}
        rows.append(
            row | {"seconds": f"{seconds / len(numbers):.3f}", **{key: column[j] for key, column in measures.items()}}
        )
    return rows


def picture_file(options, name, run, k):
    """Where one picture is kept."""
    folder = Path(options.output) / name.replace(":", "_")
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{run}_{k:03d}.npy"


def summarise(rows, options, parts):
    """Return one row per sampler and run: means over the pictures, and KID against all originals of the split."""
    kid = None
    if options.features:
        kid = segmenters.features_of(segmenters.load_network(options.features, "features"))
        dataset = parts["dataset"]
        originals = torch.cat([kid(dataset.batch([k])["image"]) for k in range(len(dataset))])
    table = []
    for name in options.samplers.split(","):
        for run in range(options.runs):
            own = [row for row in rows if row["sampler"] == name and int(row["run"]) == run]
            if len(own) < options.pictures:
                continue
            means = {key: np.mean([float(row[key]) for row in own]) for key in ("steps", "psnr_db", "ssim", "seconds")}
            row = {"sampler": name, "run": run, **{key: f"{value:.4f}" for key, value in means.items()}}
            if kid is not None:
                pictures = [
                    torch.from_numpy(np.load(picture_file(options, name, run, k))) for k in range(options.pictures)
                ]
                features = torch.cat([kid(picture[None].float()) for picture in pictures])
                row["kid"] = f"{kernel_distance(features, originals, options.pictures)[0]:.5f}"
            table.append(row)
    return table


def main():
    """Parse flags, run what is missing, write and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("data_dir", "model_path", "output", "samplers"):
        parser.add_argument(f"--{name}", required=True)
    for name, default in (("features", ""), ("precision", "fp32")):
        parser.add_argument(f"--{name}", default=default)
    for name, default in (("pictures", 32), ("runs", 2), ("batch_size", 4), ("patience", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--s", type=float, default=2.0)
    options = parser.parse_args()
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    config, parts = link_parts(options, s=options.s, precision=options.precision)
    table = folder / "pictures.csv"
    done = {(row["sampler"], row["run"], row["picture"]) for row in rows_of(table)}
    wanted = [
        (name, run, k)
        for run in range(options.runs)
        for name in options.samplers.split(",")
        for k in range(0, options.pictures, options.batch_size)
    ]
    with tqdm(wanted, unit="batch", **bar_options()) as bar:
        for name, run, first in bar:
            numbers = range(first, min(first + options.batch_size, options.pictures))
            numbers = [k for k in numbers if (name, str(run), str(k)) not in done]
            if numbers:
                append(table, run_batch(name, run, numbers, options, config, parts, bar))
    found = summarise(rows_of(table), options, parts)
    (folder / "quality.csv").unlink(missing_ok=True)
    if found:
        append(folder / "quality.csv", found)
        print(",".join(found[0]))
        for row in found:
            print(",".join(map(str, row.values())))


if __name__ == "__main__":
    run_script(main)
