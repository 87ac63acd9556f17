"""Draw a run's loss curve: python docs/plot_progress.py checkpoints/run/progress.csv out.png (needs matplotlib)."""

import csv
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def main(table, picture):
    """Plot loss and validation score over steps and, on the upper axis, hours."""
    with open(table, newline="") as f:
        rows = list(csv.DictReader(f))
    steps = [int(row["step"]) for row in rows]
    figure, axis = plt.subplots(figsize=(7, 3.5))
    axis.plot(steps, [float(row["loss"]) for row in rows], linewidth=0.8, label="training loss")
    scored = [(int(row["step"]), float(row["val_score"])) for row in rows if row["val_score"]]
    if scored:
        axis.plot(*zip(*scored, strict=True), "o-", label="validation score (EMA weights)")
    axis.set(xlabel="step", ylabel="loss", yscale="log")
    axis.legend()
    axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(picture, dpi=120)


if __name__ == "__main__":
    main(*sys.argv[1:3])
