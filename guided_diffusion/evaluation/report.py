"""What a sampling run amounts to: measures per picture and over the set, classical codecs at the same bits, curves."""

import csv
import itertools
import math
import sys

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from ..data.pictures import eight_bit, from_uint8, save_picture
from ..files import atomic_write
from ..link.transceiver import digital_facts
from ..random_streams import generator
from .metrics import bootstrap_interval, colour_error
from .results import read_picture_file

BATCH = 16
PARTS = ("header", "labels", "edges", "indices", "total")  # of a message, as columns bits_...
BITS = tuple(f"bits_{part}" for part in PARTS)
PICTURE_METRICS = {"psnr": "psnr_db", "ssim": "ssim", "ms_ssim": "ms_ssim", "lpips": "lpips"}  # name -> column
MEASURED = ("psnr_db", "colour_error", "ssim", "ms_ssim", "lpips")
CHANNEL = ("channel_uses", "bandwidth_ratio", "realised_snr_db", "eb_n0_db", "blocks", "block_errors")
CODED = ("path", "name", "codec", "budget_bits", "bits", "bpp", "scale", "quality")
BASELINE_COLUMNS = (*CODED, *CHANNEL, "problems", *MEASURED)
WORK = ("steps", "evaluations", "seconds", "transmit_seconds", "distance")
SUMMED_UP = ("bpp", *BITS, "bits", *CHANNEL, *WORK, *MEASURED, "mismatch_db")
WITH_INTERVAL = {*MEASURED, "mismatch_db", "distance", "bpp"}
OVER_THE_SET = ("kid", "kid_features", "fid", "fid_features", "miou")
CURVES = ("psnr_db", "ssim", "ms_ssim", "lpips", *OVER_THE_SET, "bad_pictures")


class Measures:
    """Measures the pictures of a results folder.

    :param metrics: a `Metrics`. :param codecs: names of classical codecs to compare with (`codecs.CODECS`).
    """

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
        changed = []
        for row in rows:
            if all(row.get(column) for column in columns):
                continue
            made, original = (read_picture_file(results.file(k, row["name"])) for k in (kind, "images"))
            if made is not None and original is not None:
                row |= self.per_picture(from_uint8(made), from_uint8(original))
                changed.append(row)
        return changed

    def whole_set(self, results, rows, kind="samples"):
        """Return the measures over all pictures of a results folder (FID, KID, mIoU, as asked for)."""

        def batches():
            bar = tqdm(rows, desc=f"measuring {kind}", unit="picture", file=sys.stderr, leave=False)
            read = ([_read(results.file(k, row["name"])) for k in (kind, "images", "labels")] for row in bar)
            for _, equal in itertools.groupby(read, lambda pictures: pictures[0].shape):
                while batch := [*itertools.islice(equal, BATCH)]:
                    yield [torch.cat(pictures) for pictures in zip(*batch, strict=True)]

        return self.metrics.over_the_set(batches())

    def compare(self, results, rows, link, seed, numbers):
        """Code every picture with each classical codec within its message's bits; write baselines.csv and the pictures.

        :param link: the message's `DigitalLink`, which the codec's bytes cross, too; None: they arrive.
        :param numbers: path -> the number that a picture's channel noise follows from.
        :return: the rows.
        """
        done, found = {}, []
        if (results.path / "baselines.csv").exists():
            with open(results.path / "baselines.csv", newline="") as f:
                done = {(row["path"], row["codec"]): row for row in csv.DictReader(f)}
        for row in tqdm(rows, desc="classical codecs", unit="picture", file=sys.stderr, leave=False):
            picture = read_picture_file(results.file("images", row["name"]))
            for codec in self.codecs if picture is not None else ():
                key = row["path"], codec
                if key not in done or not results.file(f"baseline_{codec}", row["name"]).exists():
                    # The message's own noise and fading, so that the two are compared on one channel.
                    stream = generator(seed, "channel", numbers[row["path"]])
                    done[key] = self._code(results, row, codec, picture, link, stream)
                    results.write_table(done.values(), "baselines.csv", BASELINE_COLUMNS)
                found.append(done[key])
        for codec in self.codecs:
            self.complete(results, [row for row in found if row["codec"] == codec], f"baseline_{codec}")
        if found:
            results.write_table(done.values(), "baselines.csv", BASELINE_COLUMNS)
        return found

    def _code(self, results, row, codec, picture, link, stream):
        from .codecs import best_within

        (height, width), budget = picture.shape[:2], int(row["bits_total"])
        coded = best_within(codec, picture, budget // 8)
        out = {"path": row["path"], "name": row["name"], "codec": codec, "budget_bits": budget}
        shown = np.full_like(picture, 128)  # what the receiver sees where no picture arrives
        if coded is None:
            out["problems"] = "no picture within the bits"
        else:
            bits = 8 * len(coded.data)
            out |= {"bits": bits, "bpp": f"{bits / (height * width):.4f}"}
            out |= {"scale": coded.scale, "quality": coded.quality}
            delivery = link and link.send({"labels": coded.data}, stream)
            if delivery:
                out |= digital_facts(delivery, height, width)
            if delivery and delivery.part("labels") is None:
                out["problems"] = "picture"
            else:
                shown = coded.picture
        save_picture(shown, results.file(f"baseline_{codec}", row["name"]))
        return out | self.per_picture(from_uint8(shown), from_uint8(picture))

    def summarise(self, results, rows, baseline_rows, facts):
        """Write summary.json: means, 95 % intervals over pictures, measures over the set; return it.

        :param facts: what else it should hold.
        """
        measured = [row for row in rows if results.file("images", row["name"]).exists()]
        kind = "samples" if (results.path / "samples").exists() else "local"
        summary = {**facts, "pictures": len(rows), "with_problems": _problems(rows)}
        if any(row.get("mismatch_db") for row in rows):
            summary["equal_pictures"] = sum(row.get("mismatch_db") == "inf" for row in rows)
        summary |= {"mean": means(rows), "interval_95": intervals(rows), "set": self.whole_set(results, measured, kind)}
        for codec in self.codecs if baseline_rows else ():
            from .codecs import container_bytes

            own = [row for row in baseline_rows if row["codec"] == codec]
            found = {"container_bytes": container_bytes(codec), "without_picture": _problems(own)}
            found |= {"mean": means(own), "interval_95": intervals(own)}
            found["set"] = self.whole_set(results, own, f"baseline_{codec}")
            summary.setdefault("baselines", {})[codec] = found
        results.write_json("summary.json", summary)
        return summary


def _problems(rows):
    return sum(bool(row.get("problems")) for row in rows)


def _read(path):
    """Read a picture (1, 3, H, W) in [-1, 1], or a label map (1, 1, H, W)."""
    with Image.open(path) as picture:
        pixels = np.array(picture)
    return from_uint8(pixels) if pixels.ndim == 3 else torch.from_numpy(pixels).long()[None, None]


def _columns(rows):
    for name in SUMMED_UP:
        values = [float(row[name]) for row in rows if row.get(name) not in (None, "")]
        if name == "mismatch_db":  # infinite where the pictures are equal, which summary.json counts
            values = [value for value in values if math.isfinite(value)]
        if values:
            yield name, values


def means(rows):
    """Mean of every numeric column over the rows that have it; of the mismatch over the pictures that are not equal."""
    return {name: _plain(np.mean(values)) for name, values in _columns(rows)}


def intervals(rows):
    """95 % bootstrap intervals over pictures of the measures among the columns."""
    columns = [(name, values) for name, values in _columns(rows) if name in WITH_INTERVAL and np.isfinite(values).all()]
    return {name: [_plain(v) for v in bootstrap_interval(values)] for name, values in columns}


def _plain(value):
    value = float(value)
    return value if math.isfinite(value) else str(value)  # JSON has no infinity


# -- printed lines ----------------------------------------------------------------------------------------------------


def score_lines(rows):
    """A line that says how near the pictures are to the originals, in means; none where nothing was measured."""
    mean = means([row for row in rows if row.get("psnr_db")])
    if not mean:
        return []
    similar = f"SSIM {mean['ssim']:.3f}, " if "ssim" in mean else ""
    psnr, colour = float(mean["psnr_db"]), mean["colour_error"]
    return [f"mean PSNR {psnr:.2f} dB, {similar}mean colour error {colour:.3f} of the range"]


def cost_lines(rows):
    """Lines that say what the messages and the channel cost, in means over the rows."""
    mean, lines = {name: float(value) for name, value in means(rows).items()}, []
    if "bits_total" in mean:
        sizes = ", ".join(f"{part} {mean[f'bits_{part}'] / 8:.0f}" for part in PARTS[:-1] if mean[f"bits_{part}"])
        what = "message" if mean["bits_header"] else "side information"  # the analog planes themselves are no bits
        lines.append(f"{what}: {mean['bits_total'] / 8:.0f} bytes ({sizes}), {mean['bpp']:.3f} bits per pixel")
    if "channel_uses" in mean:
        uses = f"{mean['channel_uses']:.0f} complex uses per picture, bandwidth ratio {mean['bandwidth_ratio']:.3f}"
        snr = f"{mean['realised_snr_db']:.2f} dB"
        if "eb_n0_db" not in mean:
            return [*lines, f"channel: {uses}; plane power over noise power {snr}"]
        lines.append(f"channel: {uses}; realised Es/N0 {snr}, Eb/N0 {mean['eb_n0_db']:.2f} dB")
        blocks = f"{mean['block_errors']:.1f} of {mean['blocks']:.1f} blocks lost per picture"
        lines.append(f"{blocks}; {_problems(rows)} pictures lack a part")
    return lines


def codec_lines(summary):
    """Lines that say how the classical codecs did."""
    lines = []
    for codec, found in summary.get("baselines", {}).items():
        if "psnr_db" in found["mean"]:
            without = f"{found['without_picture']} of {summary['pictures']} without a picture (counted as grey)"
            lines.append(f"{codec} within the same bits: PSNR {float(found['mean']['psnr_db']):.2f} dB, {without}")
    return lines


# -- curves of a sweep ------------------------------------------------------------------------------------------------


def write_curves(folder, summaries):
    """Write curves.csv and curves.png: each measure against the SNR, one line per link and pool.

    :param summaries: list of (link, pool, snr_db, summary).
    :return: a line that says what was written.
    """
    lines = {}
    for link, pool, snr, summary in summaries:
        pictures = max(1, summary["pictures"])
        name = link if pool == "None" else f"{link}, pool {pool}"
        values = {**summary["mean"], **summary["set"], "bad_pictures": summary["with_problems"] / pictures}
        lines.setdefault(name, []).append((snr, values))
        for codec, found in summary.get("baselines", {}).items():
            values = {**found["mean"], **found["set"], "bad_pictures": found["without_picture"] / pictures}
            lines.setdefault(f"{link}, {codec}", []).append((snr, values))
    measures = [name for name in CURVES if any(name in own for line in lines.values() for _, own in line)]
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
