"""Quality against seconds per picture, from a quality study (needs matplotlib).

python docs/plot_quality.py quality/quality.csv out.png

Seconds are the study's own. Prints the table behind the figure; the band is what runs of the first sampler, which
differ in the noise index alone, span.
"""

import csv
import sys

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot

MEASURES = {"psnr_db": "PSNR in dB", "ssim": "SSIM", "kid": "KID (segmenter features)"}


def points(table):
    """Return one dict per sampler: mean over runs, spread (half the range) of its runs, factor over the first one."""
    with open(table, newline="") as f:
        rows = list(csv.DictReader(f))
    found = []
    for name in dict.fromkeys(row["sampler"] for row in rows):
        own = [row for row in rows if row["sampler"] == name]
        point = {"sampler": name, **{key: np.mean([float(row[key]) for row in own]) for key in ("steps", "seconds")}}
        point["times_faster"] = (found or [point])[0]["seconds"] / point["seconds"]
        for measure in MEASURES:
            values = [float(row[measure]) for row in own]
            point[measure], point[f"{measure}_spread"] = np.mean(values), np.ptp(values) / 2
        found.append(point)
    return found


def main(table, out):
    """Draw the figure and print the table."""
    found = points(table)
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
