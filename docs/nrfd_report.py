"""Tables and figures of docs/nrfd_study.py, from the results that are there (needs matplotlib).

PYTHONPATH=. python docs/nrfd_report.py OUTPUT

nrfd.csv has a row for each figure, tables.md means over seeds with 95 % intervals (Student's t), nrfd.png the curves.
"""

import json
import sys
from pathlib import Path

import numpy as np
from study import append

from guided_diffusion.console import log
from guided_diffusion.files import atomic_write

PARTS = "losses", "stopping", "pictures", "selection", "chains"
NOISES, BANDS = ("bank", "never drawn", "fresh"), ("high", "middle", "low")
STUDENT = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776}  # 97.5 % quantiles, by the number of seeds
LEFT_OUT = "step", "what", "ssim", "pixel_accuracy"


def results(output):
    """Return all figures of a study's folder: dicts of part, prediction, size, seed, step, what, measure, value."""
    table = []
    for part in PARTS:
        for path in Path(output).glob(f"*_*_*/{part}.json"):
            prediction, size, seed = path.parent.name.split("_")
            for row in json.loads(path.read_text()):
                key = {"part": part, "prediction": prediction, "size": size, "seed": int(seed)}
                key |= {"step": row["step"], "what": row["what"]}
                table += [
                    {**key, "measure": measure, "value": float(value)}
                    for measure, value in row.items()
                    if measure not in LEFT_OUT and not measure.endswith(("_low", "_high", "_std", "_real"))
                ]
    order = {size: k for k, size in enumerate(sorted({row["size"] for row in table}, key=bank_size))}
    return sorted(table, key=lambda row: (PARTS.index(row["part"]), row["prediction"], order[row["size"]], row["seed"]))


def bank_size(name):
    """Return a size as a number; fresh noise is the endless bank."""
    return float("inf") if name == "fresh" else int(name)


def interval(values):
    """Return mean and half a 95 % interval of the mean over seeds; the latter NaN for a single one."""
    spread = np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else np.nan
    return np.mean(values), STUDENT.get(len(values), 1.96) * spread


def curves(table, prediction, size, noise, band=None, measure="loss"):
    """Return a network's curves over seeds: (steps (T,), values (seeds, T)), or None.

    :param noise, band: of `NOISES` and `BANDS`, whose mean is taken without a band; on fresh noise a network without a
        bank has its only curve. With another measure than the loss: of pictures that start from entries.
    """
    if measure == "loss":
        noise = "fresh" if size == "fresh" else noise
        whats = [f"{noise}, {own} noise" for own in ([band] if band else BANDS)]
    else:
        whats = ["start entry, later fresh"]
    found = {}
    for row in table:
        if (row["prediction"], row["size"], row["measure"]) == (prediction, size, measure) and row["what"] in whats:
            found.setdefault(row["seed"], {}).setdefault(row["step"], []).append(row["value"])
    found = {seed: {step: np.mean(values) for step, values in sorted(own.items())} for seed, own in found.items()}
    steps = [*next(iter(found.values()), {})]
    full = [[*own.values()] for own in found.values() if [*own] == steps]
    return (np.array(steps), np.array(full)) if full else None


def reached(steps, values, target):
    """Return the step, between checkpoints by linear interpolation, at which values (T,) first reach a target."""
    below = np.flatnonzero(values <= target)
    if not len(below):
        return None
    k = below[0]
    if k == 0:
        return float(steps[0])
    share = (values[k - 1] - target) / (values[k - 1] - values[k])
    return float(steps[k - 1] + share * (steps[k] - steps[k - 1]))


def steps_to_quality(table):
    """Return rows (prediction, what, {size: text}): steps until fresh noise's final value, its mean over seeds."""
    rows = []
    sizes, predictions = ([*dict.fromkeys(row[name] for row in table)] for name in ("size", "prediction"))
    wanted = [(noise, band, "loss") for noise in ("bank", "fresh") for band in (None, *BANDS)]
    for prediction in predictions:
        for noise, band, measure in [*wanted, ("", None, "kid_features")]:
            last = curves(table, prediction, "fresh", noise, band, measure)
            if last is None:
                continue
            target, cells = last[1][:, -1].mean(), {}
            for size in sizes:
                found = curves(table, prediction, size, noise, band, measure)
                ends = [reached(found[0], own, target) for own in found[1]] if found else []
                there = [end for end in ends if end is not None]
                text = "{:.0f} ± {:.0f}".format(*interval(there)) if there else "never"
                cells[size] = f"{text} ({len(there)} of {len(ends)})" if ends else ""
            where = f"loss on {'the bank' if noise == 'bank' else 'fresh noise'}, {band or 'all'} noise"
            rows.append((prediction, f"{where if measure == 'loss' else 'KID'} of {target:.4g}", cells))
    return rows


def write_tables(path, table):
    """Write tables.md: a table of steps to quality, and one for each part, of the last step."""
    last, groups = max(row["step"] for row in table), {}
    for row in table:
        if row["part"] == "stopping" or row["step"] == last:
            key = row["part"], row["prediction"], row["what"], row["measure"]
            groups.setdefault(key, {}).setdefault(row["size"], []).append(row["value"])
    sizes = [*dict.fromkeys(row["size"] for row in table)]
    with atomic_write(path) as f:

        def head(title, *names):
            columns = [*names, *sizes]
            f.write(f"\n## {title}\n\n| {' | '.join(columns)} |\n|{' --- |' * len(columns)}\n")

        head("steps to quality", "prediction", "until")
        for prediction, what, cells in steps_to_quality(table):
            f.write(f"| {' | '.join([prediction, what, *(cells.get(size, '') for size in sizes)])} |\n")
        for part in PARTS:
            head(part, "prediction", "what", "measure")
            for (own, prediction, what, measure), found in groups.items():
                if own == part:
                    cells = [
                        "{:.4g} ± {:.2g}".format(*interval(found[size])) if size in found else "" for size in sizes
                    ]
                    f.write(f"| {' | '.join([prediction, what, measure, *cells])} |\n")


def draw(path, table):
    """Draw for each prediction the losses against the steps, the final ones against the bank's size, and KID."""
    from matplotlib.figure import Figure

    sizes, predictions = ([*dict.fromkeys(row[name] for row in table)] for name in ("size", "prediction"))
    figure = Figure(figsize=(18, 3.8 * len(predictions)), layout="constrained")
    places = range(len(sizes))
    for axes, prediction in zip(figure.subplots(len(predictions), 4, squeeze=False), predictions, strict=True):
        for axis, noise in zip(axes, ("bank", "fresh"), strict=False):
            for size in sizes:
                if found := curves(table, prediction, size, noise):
                    axis.plot(found[0], found[1].mean(0), marker="o", markersize=3, label=size)
            axis.set(xlabel="training steps", ylabel=f"loss on {'the bank' if noise == 'bank' else 'fresh noise'}")
        for noise in NOISES:
            ends = [curves(table, prediction, size, noise) for size in sizes]
            ends = [interval(found[1][:, -1]) if found else (np.nan, np.nan) for found in ends]
            axes[2].errorbar(places, *np.transpose(ends), marker="o", markersize=3, capsize=3, label=noise)
        axes[2].set(xticks=places, xticklabels=sizes, xlabel="bank size", ylabel="final loss by noise")
        kid = [row for row in table if (row["prediction"], row["measure"]) == (prediction, "kid_features")]
        kid = [row for row in kid if row["part"] == "pictures" and row["step"] == max(own["step"] for own in kid)]
        for what in dict.fromkeys(row["what"] for row in kid):
            ends = [[row["value"] for row in kid if (row["what"], row["size"]) == (what, size)] for size in sizes]
            ends = [interval(values) if values else (np.nan, np.nan) for values in ends]
            axes[3].errorbar(places, *np.transpose(ends), marker="o", markersize=3, capsize=3, label=what)
        axes[3].set(xticks=places, xticklabels=sizes, xlabel="bank size", ylabel="KID")
        for axis in axes:
            axis.set_title(f"prediction {prediction}", fontsize=9)
            axis.set_yscale("log")
            axis.grid(alpha=0.3)
            axis.legend(fontsize=7)
    with atomic_write(path, "wb") as f:
        figure.savefig(f, format="png", dpi=90)


def main(output):
    """Write nrfd.csv, tables.md and nrfd.png beside the results."""
    output, table = Path(output), results(output)
    if table:
        (output / "nrfd.csv").unlink(missing_ok=True)
        append(output / "nrfd.csv", table)
        write_tables(output / "tables.md", table)
        draw(output / "nrfd.png", table)
        log(f"nrfd.csv, tables.md and nrfd.png are in {output}")


if __name__ == "__main__":
    main(sys.argv[1])
