"""What a sampling run amounts to: measures per picture and over the set, classical codecs at the same bits, curves."""

import csv
import itertools
import math
import sys

import numpy as np
import torch
from tqdm import tqdm

from ..data.pictures import eight_bit, from_uint8, save_picture
from ..files import atomic_write
from ..link.message import PARTS
from .metrics import bootstrap_interval, colour_error

BATCH = 16
BITS = tuple(f"bits_{part}" for part in (*PARTS, "total"))
PICTURE_METRICS = {"psnr": "psnr_db", "ssim": "ssim", "ms_ssim": "ms_ssim", "lpips": "lpips"}  # name -> column
MEASURED = ("psnr_db", "colour_error", "ssim", "ms_ssim", "lpips")
CHANNEL = ("channel_uses", "bandwidth_ratio", "realised_snr_db", "eb_n0_db", "blocks", "block_errors")
CODED = ("path", "name", "codec", "budget_bits", "bits", "bpp", "scale", "quality")
BASELINE_COLUMNS = (*CODED, *CHANNEL, "problems", *MEASURED)
POINT = ("path", "name", "bank_index", "steps", "link", "snr_db", "pool")
COST = ("seconds", "transmit_seconds", "evaluations", "distance", *BITS, "bpp")
COLUMNS = (*POINT, *COST, *CHANNEL, "problems", *MEASURED, "mismatch_db", "picture_sha256")
WORK = ("steps", "evaluations", "seconds", "transmit_seconds", "distance")
SUMMED_UP = ("bpp", *BITS, "bits", *CHANNEL, *WORK, *MEASURED, "mismatch_db")
WITH_INTERVAL = {*MEASURED, "mismatch_db", "distance", "bpp"}
OVER_THE_SET = ("kid", "kid_features", "fid", "fid_features", "miou")
CURVES = ("psnr_db", "ssim", "ms_ssim", "lpips", *OVER_THE_SET, "bad_pictures")


def size_columns(bits, height, width):
    """Return the table columns of a message's bits (dict: part -> bits)."""
    columns = {f"bits_{part}": bits[part] for part in PARTS}
    total = sum(columns.values())
    return columns | {"bits_total": total, "bpp": f"{total / (height * width):.4f}"}


class Measures:
    """Measures the pictures of a results folder by a `Metrics`, and compares with codecs (names of `CODECS`)."""

    def __init__(self, metrics, codecs):
        self.metrics, self.codecs = metrics, codecs

    def per_picture(self, images, original):
        """Return the table columns of one picture (1, 3, H, W)."""
        images = eight_bit(images)
        found = self.metrics.per_picture(images, original)
        columns = {PICTURE_METRICS[name]: f"{float(value[0]):.4f}" for name, value in found.items()}
        return columns | {"colour_error": f"{float(colour_error(images, original).mean()):.4f}"}

    def complete(self, results, rows, kind="samples"):
        """Measure from the files what rows of an earlier run, made with other --metrics, lack.

        :return: the rows that changed, in place.
        """
        columns = [PICTURE_METRICS[name] for name in self.metrics.names if name in PICTURE_METRICS]
        lacking = [row for row in rows if not all(row.get(column) for column in columns)]
        lacking = [row for row in lacking if results.file("images", row["name"]).exists()]
        for row in lacking:
            row |= self.per_picture(*(from_uint8(results.pixels(k, row["name"])) for k in (kind, "images")))
        return lacking

    def whole_set(self, results, rows, kind="samples"):
        """Return "set", the measures over all pictures of a results folder, and "set_interval_95", their intervals."""

        def batches():
            names = [row["name"] for row in rows if results.file("images", row["name"]).exists()]
            bar = tqdm(names, desc=f"measuring {kind}", unit="picture", file=sys.stderr, leave=False)
            read = ([results.pixels(k, name) for k in (kind, "images", "labels")] for name in bar)
            for _, equal in itertools.groupby(read, lambda pixels: pixels[0].shape):
                while batch := [*itertools.islice(equal, BATCH)]:
                    made, originals, labels = zip(*batch, strict=True)
                    labels = torch.from_numpy(np.stack(labels))[:, None]  # (N, 1, H, W)
                    yield torch.cat([*map(from_uint8, made)]), torch.cat([*map(from_uint8, originals)]), labels

        return dict(zip(("set", "set_interval_95"), self.metrics.over_the_set(batches()), strict=True))

    def compare(self, results, rows, link, stream_of):
        """Code every picture with each classical codec within its message's bits; write baselines.csv and the pictures.

        :param link: the message's `DigitalChannel`, which the codec's bytes cross, too; None: they arrive.
        :param stream_of: path -> generator of the message's own noise and fading: both are compared on one channel.
        :return: the rows.
        """
        done, path = {}, results.path / "baselines.csv"
        if path.exists():
            with open(path, newline="") as f:
                done = {(row["path"], row["codec"]): row for row in csv.DictReader(f)}
        rows = [row for row in rows if results.file("images", row["name"]).exists()]
        for row in tqdm(rows, desc="classical codecs", unit="picture", file=sys.stderr, leave=False):
            for codec in self.codecs:
                key, kind = (row["path"], codec), f"baseline_{codec}"
                if key not in done or not results.file(kind, row["name"]).exists():
                    done[key] = self._code(results, row, codec, link, stream_of(row["path"]))
                elif not self.complete(results, [done[key]], kind):
                    continue
                results.write_table("baselines.csv", BASELINE_COLUMNS, done.values())
        return [done[row["path"], codec] for row in rows for codec in self.codecs]

    def _code(self, results, row, codec, link, stream):
        from .codecs import best_within

        name, budget = row["name"], int(row["bits_total"])
        picture = results.pixels("images", name)
        (height, width), coded = picture.shape[:2], best_within(codec, picture, budget // 8)
        out = {"path": row["path"], "name": name, "codec": codec, "budget_bits": budget}
        shown = np.full_like(picture, 128)  # what the receiver sees where no picture arrives
        if coded is None:
            out["problems"] = "no picture within the bits"
        else:
            bits = 8 * len(coded.data)
            out |= {"bits": bits, "bpp": f"{bits / (height * width):.4f}"}
            out |= {"scale": coded.scale, "quality": coded.quality}
            delivery = link and link.send({"labels": coded.data}, stream)
            out |= delivery.facts(height, width) if delivery else {}
            if delivery and delivery.part("labels") is None:
                out["problems"] = "picture"
            else:
                shown = coded.picture
        save_picture(shown, results.file(f"baseline_{codec}", name))
        return out | self.per_picture(from_uint8(shown), from_uint8(picture))

    def summarise(self, results, rows, baseline_rows, facts):
        """Write summary.json: facts, means, 95 % intervals over pictures, measures over the set; return it."""
        kind = "samples" if (results.path / "samples").exists() else "local"
        summary = {**facts, "pictures": len(rows), "with_problems": _problems(rows)}
        if any(row.get("mismatch_db") for row in rows):
            summary["equal_pictures"] = sum(row.get("mismatch_db") == "inf" for row in rows)
        summary |= means(rows) | self.whole_set(results, rows, kind)
        for codec in self.codecs if baseline_rows else ():
            from .codecs import container_bytes

            own = [row for row in baseline_rows if row["codec"] == codec]
            found = {"container_bytes": container_bytes(codec), "without_picture": _problems(own), **means(own)}
            found |= self.whole_set(results, own, f"baseline_{codec}")
            summary.setdefault("baselines", {})[codec] = found
        results.write_json("summary.json", summary)
        return summary


def _problems(rows):
    return sum(bool(row.get("problems")) for row in rows)


def means(rows):
    """Return the mean of every numeric column over the rows that have it, and 95 % bootstrap intervals of measures.

    The mismatch, infinite where the pictures are equal, is averaged over the others. Both dicts leave out what no row
    has; JSON has no infinity, so that an infinite mean is the text "inf".
    """
    mean, interval = {}, {}
    for name in SUMMED_UP:
        values = [float(row[name]) for row in rows if row.get(name) not in (None, "")]
        if name == "mismatch_db":
            values = [value for value in values if math.isfinite(value)]
        if values:
            average = float(np.mean(values))
            mean[name] = average if math.isfinite(average) else str(average)
            if name in WITH_INTERVAL and math.isfinite(average):
                interval[name] = [*bootstrap_interval(values)]
    return {"mean": mean, "interval_95": interval}


def summary_lines(summary):
    """Lines that say what the messages and the channel cost, and how near the pictures came, in means."""
    mean, lines = {name: float(value) for name, value in summary["mean"].items()}, []
    sizes = ", ".join(f"{part} {mean[f'bits_{part}'] / 8:.0f}" for part in PARTS if mean[f"bits_{part}"])
    what = "message" if mean["bits_header"] else "side information"  # the analog planes themselves are no bits
    lines.append(f"{what}: {mean['bits_total'] / 8:.0f} bytes ({sizes}), {mean['bpp']:.3f} bits per pixel")
    if session := summary.get("shared_once_bytes", {}).get("session"):
        lines.append(f"session: {session} bytes, once for all messages")
    if "channel_uses" in mean:
        uses = f"{mean['channel_uses']:.0f} complex uses per picture, bandwidth ratio {mean['bandwidth_ratio']:.3f}"
        lines.append(f"channel: {uses}; realised SNR {mean['realised_snr_db']:.2f} dB")
    if "blocks" in mean:
        blocks = f"{mean['block_errors']:.1f} of {mean['blocks']:.1f} blocks lost per picture"
        lines.append(f"{blocks}; {summary['with_problems']} pictures lack a part")
    if "psnr_db" in mean:
        lines.append(f"mean PSNR {mean['psnr_db']:.2f} dB, mean colour error {mean['colour_error']:.3f} of the range")
    for codec, found in summary.get("baselines", {}).items():
        if "psnr_db" in found["mean"]:
            without = f"{found['without_picture']} of {summary['pictures']} without a picture (counted as grey)"
            lines.append(f"{codec} within the same bits: PSNR {float(found['mean']['psnr_db']):.2f} dB, {without}")
    return lines


def write_curves(folder, summaries):
    """Write curves.csv and curves.png: each measure against the SNR, one line per link and pool.

    :param summaries: list of (link, pool, snr_db, summary).
    :return: a line that says what was written.
    """
    lines = {}
    for link, pool, snr, summary in summaries:
        found = {link if pool == "None" else f"{link}, pool {pool}": summary}
        found |= {f"{link}, {codec}": own for codec, own in summary.get("baselines", {}).items()}
        for name, own in found.items():
            bad = own["without_picture" if "without_picture" in own else "with_problems"] / summary["pictures"]
            lines.setdefault(name, []).append((snr, {**own["mean"], **own["set"], "bad_pictures": bad}))
    found = dict.fromkeys(name for line in lines.values() for _, own in line for name in own)
    measures = [name for name in CURVES if name in found] + [name for name in found if name.startswith("swd_")]
    with atomic_write(folder / "curves.csv") as f:
        writer = csv.writer(f)
        writer.writerow(["line", "snr_db", *measures])
        for name, line in lines.items():
            writer.writerows([name, snr, *(own.get(m, "") for m in measures)] for snr, own in line)
    try:
        _draw(lines, measures, folder / "curves.png")
    except ImportError:
        return f"curves.csv is in {folder}; for curves.png, pip install matplotlib"
    return f"curves.csv and curves.png are in {folder}"


def _draw(lines, measures, path):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(measures), 3.4), layout="constrained")
    axes = figure.subplots(1, len(measures), squeeze=False)[0]
    for axis, measure in zip(axes, measures, strict=True):
        for name, line in lines.items():
            points = sorted((snr, own[measure]) for snr, own in line if isinstance(own.get(measure), float | int))
            finite = [(snr, value) for snr, value in points if math.isfinite(snr)]
            if finite:
                axis.plot(*zip(*finite, strict=True), marker="o", markersize=3, label=name)
            elif points:  # no SNR to speak of: a level
                axis.axhline(points[0][1], linestyle="--", linewidth=1, label=name)
        axis.set(xlabel="SNR in dB (analog: nominal; digital: Es/N0)", ylabel=measure)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    with atomic_write(path, "wb") as f:
        figure.savefig(f, format="png", dpi=110)
