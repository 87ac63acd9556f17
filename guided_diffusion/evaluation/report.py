"""What a sampling run amounts to: measures per picture and over the set, classical codecs at the same bits."""

import csv
import itertools
import math

import numpy as np
import torch
from tqdm import tqdm

from ..console import bar_options
from ..data.pictures import eight_bit, from_uint8, save_picture
from ..link.message import PARTS
from .metrics import bootstrap_interval, colour_error

BATCH = 16
BITS = tuple(f"bits_{part}" for part in (*PARTS, "total"))
PICTURE_METRICS = {"psnr": "psnr_db", "ssim": "ssim", "ms_ssim": "ms_ssim", "lpips": "lpips"}  # name -> column
MEASURED = ("psnr_db", "colour_error", "ssim", "ms_ssim", "lpips")
CHANNEL = ("channel_uses", "bandwidth_ratio", "realised_snr_db", "eb_n0_db", "blocks", "block_errors")
BASELINE_COLUMNS = ("path", "name", "codec", "budget_bits", "bits", "bpp", "scale", "quality")
BASELINE_COLUMNS += (*CHANNEL, "problems", *MEASURED)
POINT = ("path", "name", "bank_index", "steps", "link", "snr_db", "pool")
COST = ("seconds", "transmit_seconds", "evaluations", "distance", *BITS, "bpp")
COLUMNS = (*POINT, *COST, *CHANNEL, "problems", *MEASURED, "mismatch_db", "picture_sha256")
SUMMED_UP = (*COST, "bits", "steps", *CHANNEL, *MEASURED, "mismatch_db")
WITH_INTERVAL = {*MEASURED, "mismatch_db", "distance", "bpp"}


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
            bar = tqdm(names, desc=f"measuring {kind}", unit="picture", leave=False, **bar_options())
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
        for row in tqdm(rows, desc="classical codecs", unit="picture", leave=False, **bar_options()):
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
