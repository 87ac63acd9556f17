"""Figures of docs/link.md from results folders (needs matplotlib).

python docs/plot_link.py rate out.png LINE:FOLDER,FOLDER...      measures against bytes, a line for each group of
folders
python docs/plot_link.py search out.png FOLDER/exhaustive.csv    what the best of the first K candidates has
"""

import csv
import json
import sys
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot

MEASURES = {"psnr_db": "PSNR in dB", "ssim": "SSIM", "kid_features": "KID (segmenter features)", "miou": "mIoU"}


def point(summary):
    """(bytes, {measure: value}) of one summary, or of one codec's part of it."""
    mean = summary["mean"]
    return mean.get("bits", mean.get("bits_total")) / 8, {**mean, **summary["set"]}


def rate(out, *groups):
    """Draw measures against the message's bytes; codecs of the folders' baselines get lines of their own."""
    lines = {}
    for group in groups:
        name, folders = group.split(":", 1)
        for folder in folders.split(","):
            summary = json.loads((Path(folder) / "summary.json").read_text())
            lines.setdefault(name, []).append(point(summary))
            for codec, baseline in summary.get("baselines", {}).items():
                if not baseline["without_picture"]:
                    lines.setdefault(codec, []).append(point(baseline))
            real = summary["set"].get("miou_real")
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 7.5), layout="constrained")
    for axis, (measure, title) in zip(axes.flat, MEASURES.items(), strict=True):
        for name, line in lines.items():
            points = sorted((size, values[measure]) for size, values in line if measure in values)
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", markersize=4, label=name)
        if measure == "miou" and real is not None:
            axis.axhline(real, color="grey", linestyle=":", linewidth=1, label="original pictures")
        axis.set(xlabel="bytes per picture", ylabel=title)
        axis.grid(alpha=0.3)
    axes[1][1].legend(fontsize=7)
    figure.savefig(out, dpi=100)


def search(out, path):
    """Draw the mean over pictures of the best of the first K candidates, by the distance searched and by others."""
    with open(path, newline="") as f:
        rows = list(csv.DictReader(f))
    pictures = sorted({row["picture"] for row in rows})
    names = [name for name in rows[0] if name not in ("picture", "index")]
    table = {
        p: sorted((row for row in rows if row["picture"] == p), key=lambda row: int(row["index"])) for p in pictures
    }
    sizes = range(1, min(map(len, table.values())) + 1)
    figure, axes = pyplot.subplots(1, len(names), figsize=(3.4 * len(names), 3.2), layout="constrained")
    for axis, name in zip(axes, names, strict=True):
        curve = [
            np.mean([float(min(own[:k], key=lambda row: float(row["mse"]))[name]) for own in table.values()])
            for k in sizes
        ]
        axis.plot(sizes, curve)
        axis.set(xscale="log", xlabel="candidates K", title=f"{name} of the best by mse")
        axis.grid(alpha=0.3)
    figure.savefig(out, dpi=100)


if __name__ == "__main__":
    {"rate": rate, "search": search}[sys.argv[1]](*sys.argv[2:])
