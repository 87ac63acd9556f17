"""Quality against seconds per picture, from a quality study and a benchmark of the same checkpoint (needs matplotlib).

python docs/plot_quality.py quality/quality.csv benchmark_camvid.json out.png

Seconds are the benchmark's: the label-map work and a step's time, times the steps that a sampler took on average.
Prints the table behind the figure; the band is what runs of the first sampler, which differ in the noise index alone,
span.
"""

import csv
import json
import sys
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot

MEASURES = {"psnr_db": "PSNR in dB", "ssim": "SSIM", "kid": "KID (segmenter features)"}


def cost(benchmark):
    """Return (plain step, fast step, label-map work) in seconds, fp32."""
    parts = json.loads(Path(benchmark).read_text())["parts"]
    steps = {row[0]: row[3] / 1e3 for row in parts["step"]["rows"] if row[1] == "fp32"}  # path, precision, batch, ms
    # path, precision, sampler, steps, seconds
    pictures = [row for row in parts["picture"]["rows"] if row[:2] == ["fast", "fp32"]]
    once = min(row[4] - row[3] * steps["fast"] for row in pictures)
    return steps["plain"], steps["fast"], max(0.0, once)


def points(table, benchmark):
    """Return one dict per sampler: mean over runs, spread (half the range) of its runs, seconds, factor over plain."""
    with open(table, newline="") as f:
        rows = list(csv.DictReader(f))
    plain, fast, once = cost(benchmark)
    found = []
    for name in dict.fromkeys(row["sampler"] for row in rows):
        own = [row for row in rows if row["sampler"] == name]
        steps = np.mean([float(row["steps"]) for row in own])
        point = {"sampler": name, "runs": len(own), "steps": steps, "seconds": once + steps * fast}
        point["times_faster"] = 1000 * plain / point["seconds"]
        for measure in MEASURES:
            values = [float(row[measure]) for row in own]
            point[measure], point[f"{measure}_spread"] = np.mean(values), np.ptp(values) / 2
        found.append(point)
    return found


def main(table, benchmark, out):
    """Draw the figure and print the table."""
    found = points(table, benchmark)
    figure, axes = pyplot.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    for axis, (measure, title) in zip(axes, MEASURES.items(), strict=True):
        reference = found[0]
        low, high = (reference[measure] + sign * reference[f"{measure}_spread"] for sign in (-1, 1))
        axis.axhspan(low, high, color="grey", alpha=0.3, label=f"{reference['sampler']}, between runs")
        for point in found:
            axis.errorbar(point["seconds"], point[measure], point[f"{measure}_spread"], fmt="o", capsize=3)
            axis.annotate(
                point["sampler"],
                (point["seconds"], point[measure]),
                fontsize=7,
                xytext=(4, 4),
                textcoords="offset points",
            )
        axis.set(xscale="log", xlabel="seconds per picture", title=title)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.savefig(out, dpi=110)
    print("| sampler | steps | s/picture | times faster | PSNR dB | SSIM | KID |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for p in found:
        measured = " | ".join(
            f"{p[m]:.{d}f} ± {p[f'{m}_spread']:.{d}f}" for m, d in zip(MEASURES, (2, 3, 4), strict=True)
        )
        print(f"| {p['sampler']} | {p['steps']:.1f} | {p['seconds']:.2f} | {p['times_faster']:.0f} | {measured} |")


if __name__ == "__main__":
    main(*sys.argv[1:])
