"""Losses of the plain training path and of the fast one on the same batches: python docs/loss_curves.py --output l.csv

Further flags (--batch_size 4) are those of image_train.py. Each of plain fp32, fast fp32, fast bf16 (and plain fp32
with another seed, as a measure of noise) trains the toy preset's network from the same weights. Prints the mean loss
of every fifth of the steps, and how far the curves are apart.
"""

import argparse
import csv
import tempfile
from pathlib import Path

import numpy as np
from benchmark import PlainTraining
from tqdm import tqdm

from guided_diffusion import build
from guided_diffusion.config import TrainConfig, parse_config
from guided_diffusion.console import run_script
from guided_diffusion.data.toy_scenes import write_toy_scenes


def losses(scenes, folder, steps, path, precision, seed, further):
    """Train; return the loss (steps,) of every step."""
    flags = {
        "preset": "toy",
        "data_dir": scenes,
        "checkpoint_dir": folder,
        "preview_items": 0,
        "lr_warmup_steps": 0,
        "lr_anneal_steps": 0,
        "precision": precision,
        "seed": seed,
        "lr": 5e-4,
    }
    config, given = parse_config(
        TrainConfig, "", [*(word for k, v in flags.items() for word in (f"--{k}", str(v))), *further]
    )
    loop = build.training_loop(config, given, lambda line: None)
    trainer = loop
    if path == "plain":
        trainer = PlainTraining(loop, config)
        trainer.model.train()
    batches, found = iter(loop.loader(0)), []
    for _ in tqdm(range(steps), desc=f"{path} {precision} {seed}", unit="step"):
        out = trainer.train_step(next(batches))
        found.append(float(out["loss"] if isinstance(out, dict) else out))
    return found


def main():
    """Parse flags, train, write the CSV, print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True)
    parser.add_argument("--steps", type=int, default=500)
    options, further = parser.parse_known_args()
    curves = {}
    with tempfile.TemporaryDirectory() as folder:
        scenes = str(Path(folder) / "scenes")
        write_toy_scenes(scenes)
        for path, precision, seed in (
            ("plain", "fp32", 0),
            ("fast", "fp32", 0),
            ("fast", "bf16", 0),
            ("plain", "fp32", 1),
        ):
            curves[f"{path} {precision} seed {seed}"] = losses(
                scenes, folder, options.steps, path, precision, seed, further
            )
    with open(options.output, "w", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(["step", *curves])
        writer.writerows([step, *values] for step, values in enumerate(zip(*curves.values(), strict=True), 1))
    names, table = list(curves), np.array(list(curves.values()))
    for name, row in zip(names, table, strict=True):
        print(name, *(f"{block.mean():.5f}" for block in np.array_split(row, 5)))
    for name, row in zip(names[1:], table[1:], strict=True):
        print(f"{name}: relative RMS distance from {names[0]} {np.sqrt(np.mean((row / table[0] - 1) ** 2)):.4f}")


if __name__ == "__main__":
    run_script(main)
