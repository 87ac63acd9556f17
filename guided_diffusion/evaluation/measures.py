"""What a sampling run amounts to: measures per picture and over the set, classical codecs at the same bits, curves."""

import csv
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
from . import codecs as baselines
from .metrics import bootstrap_interval, colour_error
from .results import read_picture_file

BATCH = 16
PARTS = ("header", "labels", "edges", "indices", "total")  # of a message, as columns bits_...
PER_PICTURE = {"psnr": "psnr_db"}  # metric -> column, where they differ
PICTURE_METRICS = ("psnr", "ssim", "ms_ssim", "lpips")
BASELINE_COLUMNS = (
    "path",
    "name",
    "codec",
    "budget_bits",
    "bits",
    "bpp",
    "scale",
    "quality",
    "channel_uses",
    "bandwidth_ratio",
    "realised_snr_db",
    "eb_n0_db",
    "blocks",
    "block_errors",
    "problems",
    "psnr_db",
    "colour_error",
    "ssim",
    "ms_ssim",
    "lpips",
)
SUMMED_UP = (
    "bpp",
    "bits_header",
    "bits_labels",
    "bits_edges",
    "bits_indices",
    "bits_total",
    "bits",
    "channel_uses",
    "bandwidth_ratio",
    "realised_snr_db",
    "eb_n0_db",
    "blocks",
    "block_errors",
    "steps",
    "evaluations",
    "seconds",
    "transmit_seconds",
    "distance",
    "psnr_db",
    "colour_error",
    "ssim",
    "ms_ssim",
    "lpips",
    "mismatch_db",
)


class Measures:
    """Measures the pictures of a results folder.

    :param metrics: a `Metrics`. :param codecs: names of `baselines.CODECS` to compare with.
    :param new_metrics: function -> another `Metrics` of the same kind, for each codec's set.
    """

    def __init__(self, metrics, codecs, new_metrics):
        self.metrics, self.codecs, self.new_metrics = metrics, codecs, new_metrics

    def per_picture(self, images, original):
        """Return the table columns of one picture (1, 3, H, W)."""
        images = eight_bit(images)
        found = self.metrics.per_picture(images, original)
        columns = {PER_PICTURE.get(name, name): f"{float(value[0]):.4f}" for name, value in found.items()}
        return columns | {"colour_error": f"{float(colour_error(images, original).mean()):.4f}"}

    def complete(self, results, rows, kind="samples"):
        """Measure from the files what rows of an earlier run, made with other --metrics, lack. Changes `rows` in place."""
        for row in rows:
            missing = [
                name
                for name in self.metrics.names
                if name in PICTURE_METRICS and not row.get(PER_PICTURE.get(name, name))
            ]
            made, original = (read_picture_file(results.file(k, row["name"])) for k in (kind, "images"))
            if missing and made is not None and original is not None:
                row |= self.per_picture(from_uint8(made), from_uint8(original))

    def whole_set(self, results, rows, kind="samples"):
        """Return the measures over all pictures of a results folder (FID, KID, mIoU, as asked for)."""
        metrics = self.new_metrics()
        if not metrics.over_the_set:
            return {}
        for names in tqdm(
            _batches(results, rows), desc=f"measuring {kind}", unit="batch", file=sys.stderr, leave=False
        ):
            made, original = (torch.cat([_read(results.file(k, name)) for name in names]) for k in (kind, "images"))
            ids = np.stack([_read_ids(results.file("labels", name)) for name in names])
            metrics.update(made, original, torch.from_numpy(ids).long()[:, None])
        return metrics.compute()

    # -- classical codecs -----------------------------------------------------------------------------------------------

    def compare(self, results, rows, crossing, seed, numbers):
        """Code every picture with each classical codec within its message's bits; write baselines.csv and the pictures.

        :param numbers: path -> the number that a picture's channel noise follows from.
        :param crossing: the message's own, whose channel the codec's bytes take too if it is digital.
        :return: the rows.
        """
        link = getattr(crossing, "link", None)
        path = results.path / "baselines.csv"
        done = _earlier(path)
        found = []
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
        height, width = picture.shape[:2]
        budget = int(row["bits_total"])
        coded = baselines.best_within(codec, picture, budget // 8)
        out = {"path": row["path"], "name": row["name"], "codec": codec, "budget_bits": budget}
        if coded is None:  # nothing fits: the receiver has no picture
            shown, out["problems"] = np.full_like(picture, 128), "no picture within the bits"
        else:
            shown, bits = coded.picture, 8 * len(coded.data)
            out |= {
                "bits": bits,
                "bpp": f"{bits / (height * width):.4f}",
                "scale": coded.scale,
                "quality": coded.quality,
            }
            if link is not None:
                delivery = link.send({"labels": coded.data}, stream)
                out |= digital_facts(delivery, height, width)
                if delivery.part("labels") is None:
                    shown, out["problems"] = np.full_like(picture, 128), "picture"
        save_picture(shown, results.file(f"baseline_{codec}", row["name"]))
        return out | self.per_picture(from_uint8(shown), from_uint8(picture))

    # -- the summary ----------------------------------------------------------------------------------------------------

    def summarise(self, results, rows, baseline_rows, facts):
        """Write summary.json: means, 95 % intervals over pictures, measures over the set; return it.

        :param facts: what else it should say.
        """
        measured = [row for row in rows if results.file("images", row["name"]).exists()]
        kind = "samples" if (results.path / "samples").exists() else "local"
        summary = {**facts, "pictures": len(rows), "with_problems": sum(bool(row.get("problems")) for row in rows)}
        if any(row.get("mismatch_db") for row in rows):
            summary["equal_pictures"] = sum(row.get("mismatch_db") == "inf" for row in rows)
        summary |= {"mean": means(rows), "interval_95": intervals(rows), "set": self.whole_set(results, measured, kind)}
        for codec in self.codecs:
            own = [row for row in baseline_rows if row["codec"] == codec]
            if own:
                summary.setdefault("baselines", {})[codec] = {
                    "container_bytes": baselines.container_bytes(codec),
                    "without_picture": sum(bool(row.get("problems")) for row in own),
                    "mean": means(own),
                    "interval_95": intervals(own),
                    "set": self.whole_set(results, own, f"baseline_{codec}"),
                }
        results.write_json("summary.json", summary)
        return summary


def _batches(results, rows):
    """Names in batches of pictures of one size."""
    batches = []
    for row in rows:
        with Image.open(results.file("labels", row["name"])) as label:
            size = label.size
        if not batches or batches[-1][0] != size or len(batches[-1][1]) == BATCH:
            batches.append((size, []))
        batches[-1][1].append(row["name"])
    return [names for _, names in batches]


def _read_ids(path):
    with Image.open(path) as ids:
        return np.array(ids)


def _read(path):
    return from_uint8(read_picture_file(path))


def _earlier(path):
    if not path.exists():
        return {}
    with open(path, newline="") as f:
        return {(row["path"], row["codec"]): row for row in csv.DictReader(f)}


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
    measures = ("psnr_db", "colour_error", "ssim", "ms_ssim", "lpips", "mismatch_db", "distance", "bpp")
    return {
        name: [_plain(v) for v in bootstrap_interval(values)]
        for name, values in _columns(rows)
        if name in measures and np.isfinite(values).all()
    }


def _plain(value):
    value = float(value)
    return value if math.isfinite(value) else str(value)  # JSON has no infinity


# -- what is said of them -----------------------------------------------------------------------------------------------


def score_lines(rows):
    """A line that says how near the pictures are to the originals, in means over the rows; none where nothing was measured."""
    measured = [row for row in rows if row.get("psnr_db")]
    if not measured:
        return []
    psnr, ssim, colour = (
        float(np.mean([float(row.get(name) or np.nan) for row in measured]))
        for name in ("psnr_db", "ssim", "colour_error")
    )
    similar = "" if np.isnan(ssim) else f"SSIM {ssim:.3f}, "
    return [f"mean PSNR {psnr:.2f} dB, {similar}mean colour error {colour:.3f} of the range"]


def cost_lines(rows):
    """Lines that say what the messages and the channel cost, in means over the rows."""
    mean = {
        name: float(np.mean([float(row[name]) for row in rows if row.get(name) not in (None, "")] or [np.nan]))
        for name in (
            *(f"bits_{part}" for part in PARTS),
            "bpp",
            "channel_uses",
            "bandwidth_ratio",
            "realised_snr_db",
            "eb_n0_db",
            "blocks",
            "block_errors",
        )
    }
    lines = []
    if not np.isnan(mean["bits_total"]):
        sizes = ", ".join(f"{part} {mean[f'bits_{part}'] / 8:.0f}" for part in PARTS[:-1] if mean[f"bits_{part}"])
        what = "message" if mean["bits_header"] else "side information"  # the analog planes themselves are no bits
        lines.append(f"{what}: {mean['bits_total'] / 8:.0f} bytes ({sizes}), {mean['bpp']:.3f} bits per pixel")
    if not np.isnan(mean["channel_uses"]):
        uses = f"{mean['channel_uses']:.0f} complex uses per picture, bandwidth ratio {mean['bandwidth_ratio']:.3f}"
        if np.isnan(mean["eb_n0_db"]):
            lines.append(f"channel: {uses}; plane power over noise power {mean['realised_snr_db']:.2f} dB")
        else:
            lost = sum(bool(row.get("problems")) for row in rows)
            lines.append(
                f"channel: {uses}; realised Es/N0 {mean['realised_snr_db']:.2f} dB, Eb/N0 {mean['eb_n0_db']:.2f} dB"
            )
            lines.append(
                f"{mean['block_errors']:.1f} of {mean['blocks']:.1f} blocks lost per picture; {lost} pictures lack a part"
            )
    return lines


def codec_lines(summary):
    """Lines that say how the classical codecs did."""
    return [
        f"{codec} within the same bits: PSNR {found['mean']['psnr_db']:.2f} dB, {found['without_picture']} of"
        f" {summary['pictures']} without a picture (counted as grey)"
        for codec, found in summary.get("baselines", {}).items()
        if "psnr_db" in found["mean"]
    ]


# -- several points -----------------------------------------------------------------------------------------------------


def write_curves(folder, summaries):
    """Write curves.csv and curves.png: each measure against the SNR, one line per link and pool.

    :param summaries: list of (link, pool, snr_db, summary).
    :return: a line that says what was written.
    """
    lines = {}
    for link, pool, snr, summary in summaries:
        name = link if pool == "None" else f"{link}, pool {pool}"
        own = {**summary["mean"], **{k: v for k, v in summary["set"].items() if isinstance(v, float)}}
        own["bad_pictures"] = summary["with_problems"] / max(1, summary["pictures"])
        lines.setdefault(name, []).append((snr, own))
        for codec, baseline in summary.get("baselines", {}).items():
            both = {**baseline["mean"], **{k: v for k, v in baseline["set"].items() if isinstance(v, float)}}
            both["bad_pictures"] = baseline["without_picture"] / max(1, summary["pictures"])
            lines.setdefault(f"{link}, {codec}", []).append((snr, both))
    measures = [
        name
        for name in (
            "psnr_db",
            "ssim",
            "ms_ssim",
            "lpips",
            "kid",
            "kid_features",
            "fid",
            "fid_features",
            "miou",
            "bad_pictures",
        )
        if any(name in own for line in lines.values() for _, own in line)
    ]
    with atomic_write(folder / "curves.csv") as f:
        writer = csv.writer(f)
        writer.writerow(["line", "snr_db", *measures])
        for name, line in lines.items():
            writer.writerows([name, snr, *(own.get(m, "") for m in measures)] for snr, own in line)
    try:
        import matplotlib
    except ImportError:
        return f"curves.csv is in {folder}; for curves.png, pip install matplotlib"
    matplotlib.use("Agg")
    _draw(lines, measures, folder / "curves.png")
    return f"curves.csv and curves.png are in {folder}"


def _draw(lines, measures, path):
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(measures), figsize=(4 * len(measures), 3.4), squeeze=False, layout="constrained"
    )
    for axis, measure in zip(axes[0], measures, strict=True):
        for name, line in lines.items():
            points = sorted((snr, own[measure]) for snr, own in line if isinstance(own.get(measure), float | int))
            finite = [(snr, value) for snr, value in points if math.isfinite(snr)]
            if finite:
                axis.plot(*zip(*finite, strict=True), marker="o", markersize=3, label=name)
            elif points:  # no SNR to speak of: a level
                axis.axhline(points[0][1], linestyle="--", linewidth=1, label=name)
        axis.set(xlabel="SNR in dB (analog: nominal; digital: Es/N0)", ylabel=measure)
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=7)
    with atomic_write(path, "wb") as f:
        figure.savefig(f, format="png", dpi=110)
    pyplot.close(figure)
