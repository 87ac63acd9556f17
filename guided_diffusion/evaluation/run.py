"""A sampling run: pictures in, messages over the channel, regenerated pictures, a table and a panel out.

Run again, it goes on where it stopped. Several processes share the pictures out without speaking to each other: each knows
its share, keeps its rows in a table of its own, and whoever finds all pictures there at its end puts the tables together.
"""

import dataclasses
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from ..config import points
from ..console import InputError, StandardError, bar_options
from ..data.semantics import received_semantics
from ..diffusion.sampling import run_chain
from ..diffusion.solvers import SamplerSettings
from ..files import atomic_write, digest_once
from ..link.channel import snr_to_sigma, transmit
from ..link.message import Message
from ..link.source_coding import pack_choices
from ..link.transceiver import Arrival, analog_facts
from ..random_streams import generator, integer, stream_seed, text_number
from ..training.distributed import autocast
from ..training.ranks import Share
from .measures import PARTS, codec_lines, cost_lines, score_lines, write_curves
from .metrics import psnr
from .panels import palette, picture_grid, save_picture, show_semantics, to_uint8
from .results import ResultsFolder, is_last, picture_digest, read_picture_file, settings_of, share_out, unique_names

COLUMNS = (
    "path",
    "name",
    "bank_index",
    "steps",
    "link",
    "snr_db",
    "pool",
    "seconds",
    "transmit_seconds",
    "evaluations",
    "distance",
    *(f"bits_{part}" for part in PARTS),
    "bpp",
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
    "mismatch_db",
    "picture_sha256",
)

# Flags that may change between two runs into the same folder.
FREE = {
    "results_path",
    "num_samples",
    "batch_size",
    "num_workers",
    "device",
    "dry_run",
    "preset",
    "panel_items",
    "use_fp16",
    "noise_bank_cache",
    "dropout",
    "use_checkpoint",
    "use_kl",
    "rescale_learned_sigmas",
    "add_noise",
    "noise_to",
    "messages",
    "share_array",
    "label_memory",
    "cache_dir",
    "metrics",
    "fid_weights",
    "features",
    "baseline",
    "segmenter",
}

ALONE = Share()


class Regeneration:
    """Sends the pictures of a split over the channel and regenerates them, or only writes their messages.

    :param config: a `SampleConfig` of one point (see `config.points`).
    :param weights: path of the weights file.
    :param parts: what `build_link.sampling_parts` returns.
    :param share: the `Share` of the pictures that this process makes.
    :param quiet: show no progress bar.
    :param start: a `StartUp`, whose line is shown after the first reverse step; or None.
    """

    def __init__(self, config, weights, parts, share=ALONE, quiet=False, start=None):
        self.start = start
        self.config, self.weights, self.parts, self.share, self.quiet = config, weights, parts, share, quiet
        self.results = ResultsFolder(config.results_path, COLUMNS, share)
        self.dataset, self.bank, self.measures = parts["dataset"], parts["bank"], parts["measures"]
        self.count = min(config.num_samples, len(self.dataset))
        self.batches = share_out(self.count, config.batch_size, share)
        self.paths = [str(pair.image or pair.label) for pair in self.dataset.pairs]
        self.names = unique_names(self.paths)
        # What is drawn for a picture follows from its name, so that further files in the split change nothing.
        self.numbers = [text_number(pair.stem) for pair in self.dataset.pairs]
        self.transmitting = config.role == "transmit"
        self.kind = "local" if self.transmitting else "samples"  # what a finished picture leaves behind
        if self.bank is not None:
            self.transmitter, self.receiver = parts["transmitter"](config), parts["receiver"](config)
            self.crossing = None if self.transmitting else parts["crossing"](config)

    # -- the run ------------------------------------------------------------------------------------------------------

    def run(self):
        """Regenerate what is not done yet of this share; return the rows of the whole table, as far as they are there."""
        self._claim()
        rows = self._finished_rows()
        own = rows if self.share.count == 1 else self._finished_rows(own=True)
        todo = [left for batch in self.batches if (left := [k for k in batch if k not in rows])]
        total, left = sum(map(len, self.batches)), sum(map(len, todo))
        if left < total:
            print(f"{total - left} of {total} pictures are done already", file=sys.stderr)
        self._work_off(todo, left, own)
        return self.rows() if self.share.count > 1 else [rows[k] for k in sorted(rows)]

    def rows(self):
        """Return the rows of all tables, in the order of the pictures."""
        rows = self._finished_rows()
        return [rows[k] for k in sorted(rows)]

    def is_complete(self, rows):
        """Whether the rows hold all pictures of the run, of all shares."""
        return {*self.paths[: self.count]} <= {row["path"] for row in rows}

    def _finished_rows(self, own=False):
        numbers = {path: k for k, path in enumerate(self.paths)}
        return self.results.finished_rows(numbers, self.names, self.kind, own)

    def _claim(self):
        config, files = self.config, {"model_path": self.weights, "data_dir": self.config.data_dir}
        deciding = {"weights": self.weights}  # files whose contents decide what the pictures are
        if config.extractor != "gt":
            deciding["extractor"] = files["extractor"] = config.extractor
        if config.segmenter and config.distance == "segmenter":
            deciding["segmenter"] = config.segmenter
        settings = settings_of(dataclasses.asdict(config), FREE, files)
        settings |= {f"{name}_sha256": digest_once(path).hex() for name, path in deciding.items()}
        self.results.claim(settings, free={"model_path"})

    def _work_off(self, batches, count, rows):
        """Make `count` pictures, in batches, and put theirs beside the rows of this share's table."""
        with tqdm(total=count, unit="picture", **bar_options(), disable=self.quiet) as bar:
            self.on_step = _StepCounter(bar, self._started)
            for batch in batches:
                found = self._without_bank(batch) if self.bank is None else self._cross(batch)
                rows.update(zip(batch, found, strict=True))
                bar.update(len(batch))
                self.results.write_own(rows)

    def _started(self, bar):
        if self.start is not None:
            bar.write(self.start.line(), file=StandardError())

    # -- one batch ----------------------------------------------------------------------------------------------------

    def _cross(self, numbers):
        """Send one batch of pictures, write their files, and return their rows."""
        rows, arrivals, sents, scenes = [], [], [], []
        if len({self.dataset.sample_size(k) for k in numbers}) > 1:
            raise InputError(
                f"pictures {numbers[0] + 1} to {numbers[-1] + 1} differ in size and cannot share a batch;"
                " use --batch_size 1"
            )
        for k in numbers:
            started = time.monotonic()
            scene = self.dataset.batch([k])
            sent = self.transmitter.send(scene, self._index(k), self.on_step)
            row = self._sent_row(k, sent, time.monotonic() - started)
            if not self.transmitting:
                arrival, facts = self.crossing.send(sent, self.receiver, self._channel_stream(k))
                row |= facts | {"problems": " ".join(arrival.problems) if arrival else "header"}
                arrivals.append(arrival)
            rows.append(row)
            sents.append(sent)
            scenes.append(scene)
        if self.transmitting:
            images = torch.stack([sent.choice.picture for sent in sents])
            for row, sent in zip(rows, sents, strict=True):
                row["steps"] = sent.choice.steps
        else:
            images = self._pictures(rows, arrivals, sents)
        self._write_pictures(numbers, scenes, sents, arrivals, images)
        self._measure(rows, scenes, images, sents)
        return rows

    def _channel_stream(self, k):
        return generator(self.config.seed, "channel", self.numbers[k])

    def _pictures(self, rows, arrivals, sents):
        """Let the receiver make the pictures (N, 3, H, W) of a batch; grey where it has no header, or one of another size."""
        started = time.monotonic()
        images = torch.zeros(len(sents), 3, *sents[0].y.shape[2:])
        there = [j for j, arrival in enumerate(arrivals) if arrival is not None and arrival.y.shape == sents[0].y.shape]
        if there:
            result = self.receiver.pictures([arrivals[j] for j in there], on_step=self.on_step)
            images[there] = result.images.float().cpu()
            for j, steps in zip(there, result.steps.tolist(), strict=True):
                rows[j] |= {"steps": steps, "bank_index": arrivals[j].start}
        for j, row in enumerate(rows):
            if j not in there:
                row["bank_index"] = ""
            row["seconds"] = f"{(time.monotonic() - started) / len(rows):.3f}"
        return images

    def _sent_row(self, k, sent, seconds):
        config, analog = self.config, not self.transmitting and self.config.link == "analog"
        height, width = sent.y.shape[2:]
        if analog:  # the planes cross as they are; besides the indices, bits say which classes those are of
            indices = pack_choices(
                sent.message.start_index,
                len(self.bank),
                sent.message.codewords,
                config.step_candidates,
                config.step_atoms,
            )
            bits = {
                "header": 0,
                "labels": config.num_classes if config.one_hot_label else 0,
                "edges": 0,
                "indices": 8 * len(indices),
            }
            bits["total"] = sum(bits.values())
        else:
            bits = sent.message.bits()
        row = {
            "path": self.paths[k],
            "name": self.names[k],
            "bank_index": sent.message.start_index or 0,
            "transmit_seconds": f"{seconds:.3f}",
            "bpp": f"{bits['total'] / (height * width):.4f}",
        }
        row |= {f"bits_{part}": bits[part] for part in PARTS}
        if not self.transmitting:
            row |= {"link": config.link, "snr_db": f"{config.snr:g}", "pool": config.pool}
        if sent.choice is not None:
            row["evaluations"] = sent.choice.evaluations
            row["distance"] = "" if sent.choice.score is None else f"{float(sent.choice.score):.6g}"
        if not analog:
            self._write_message(k, sent.message)
        return row

    def _measure(self, rows, scenes, images, sents):
        for j, (row, scene) in enumerate(zip(rows, scenes, strict=True)):
            row["picture_sha256"] = picture_digest(images[j])
            if "image" in scene:
                row |= self.measures.per_picture(images[j : j + 1], scene["image"])
            if not self.transmitting and sents and sents[j].choice is not None:
                row["mismatch_db"] = (
                    f"{float(psnr(images[j : j + 1], sents[j].choice.picture[None].float().cpu())):.3f}"
                )

    def _without_bank(self, numbers):
        """Regenerate one batch by ordinary diffusion: fresh noise per picture, over the analog channel."""
        started, config = time.monotonic(), self.config
        batch = self.dataset.batch(numbers)
        y = self._coded(batch)
        sigma, named = snr_to_sigma(config.snr), [self.numbers[k] for k in numbers]
        received = transmit(
            y,
            sigma,
            generators=[generator(config.seed, "channel", number) for number in named],
            num_classes=config.num_classes,
            one_hot=config.one_hot_label,
            pool=config.pool,
        )
        noise = [
            torch.randn(3, *y.shape[2:], generator=generator(config.seed, "picture noise", number)) for number in named
        ]
        device = self.parts["device"]
        with autocast(device, self.parts["precision"]):
            settings = SamplerSettings(
                config.sampler,
                s=config.s,
                eta=config.eta if config.sampler == "ddim" else 0.0,
                clip_denoised=config.clip_denoised,
                tail_steps=config.tail_steps,
            )
            result = run_chain(
                self.parts["model"],
                self.parts["diffusion"],
                received.to(device),
                torch.stack(noise).to(device),
                settings,
                seeds=[stream_seed(config.seed, "picture chain", number) for number in named],
                early_stop=self.parts["early_stop"],
                on_step=self.on_step,
                cache_bytes=int(config.label_memory * 2**30),
            )
        images = result.images.float().cpu()
        seconds = (time.monotonic() - started) / len(numbers)
        rows = [
            {
                "path": self.paths[k],
                "name": self.names[k],
                "steps": steps,
                "link": config.link,
                "snr_db": f"{config.snr:g}",
                "pool": config.pool,
                "seconds": f"{seconds:.3f}",
                **analog_facts(y[j : j + 1], sigma, config.num_classes, config.one_hot_label),
            }
            for j, (k, steps) in enumerate(zip(numbers, result.steps.tolist(), strict=True))
        ]
        scenes = [{key: value[j : j + 1] for key, value in batch.items()} for j in range(len(numbers))]
        arrivals = [Arrival(None, received[j : j + 1], 0, ()) for j in range(len(numbers))]
        self._write_pictures(numbers, scenes, [None] * len(numbers), arrivals, images)
        self._measure(rows, scenes, images, [])
        return rows

    def _index(self, k):
        asked = self.config.noise_index
        if asked.isdigit():
            return int(asked)
        if self.config.selection == "per_step":
            return 0
        return integer(self.config.seed, "picture index", len(self.bank), self.numbers[k])

    def sum_up(self, rows):
        """Compare with classical codecs, measure the set, write summary.json and panel.png; return the summary."""
        baseline_rows, codecs = [], self.measures.codecs
        self.measures.complete(self.results, rows, self.kind)
        self.results.write_table(rows)
        if codecs and self.bank is not None and (self.transmitting or self.config.link != "analog"):
            baseline_rows = self.measures.compare(
                self.results, rows, self.crossing, self.config.seed, dict(zip(self.paths, self.numbers, strict=True))
            )
        facts = {"role": self.config.role}
        if not self.transmitting:
            facts |= {"link": self.config.link, "pool": self.config.pool, "snr_db": f"{self.config.snr:g}"}
        if self.bank is not None:
            # What both ends own before the first message; stated once, in bytes.
            facts["shared_once_bytes"] = {"weights": os.path.getsize(self.weights), "bank_seed": 8}
        facts["picture"] = "x".join(map(str, self.dataset.sample_size(0)))
        summary = self.measures.summarise(self.results, rows, baseline_rows, facts)
        self._write_panel([row["name"] for row in rows][: self.config.panel_items], codecs if baseline_rows else ())
        return summary

    def summary(self, rows):
        """Return lines that say what a run's rows amount to, and where its output is."""
        what = "messages/, local/ and results.csv" if self.transmitting else "results.csv, panel.png and pictures"
        return [*cost_lines(rows), *score_lines(rows), f"{len(rows)} pictures; {what} are in {self.results.path}"]

    # -- files --------------------------------------------------------------------------------------------------------

    def _write_message(self, k, message):
        path = self.results.file("messages", self.names[k], ".dgo")
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path, "wb") as f:
            f.write(message.to_bytes())

    def _write_pictures(self, numbers, scenes, sents, arrivals, images):
        config = self.config
        for j, k in enumerate(numbers):
            ids = scenes[j]["label"][0, 0].numpy().astype(np.uint8)
            save_picture(ids, self.results.file("labels", self.names[k]), palette(config.num_classes))
            kinds = {}
            if "image" in scenes[j]:
                kinds["images"] = to_uint8(scenes[j]["image"])[0]
            if sents[j] is not None and sents[j].choice is not None:
                kinds["local"] = to_uint8(sents[j].choice.picture[None])[0]
            if not self.transmitting:
                received = arrivals[j].y if arrivals[j] is not None else torch.zeros_like(sents[j].y)
                kinds["received"] = show_semantics(received, config.num_classes, config.one_hot_label)[0]
                kinds["samples"] = to_uint8(images[j : j + 1])[0]
            for kind, picture in kinds.items():
                save_picture(picture, self.results.file(kind, self.names[k]))

    def _write_panel(self, names, codecs):
        if not names:
            return
        config, rows = self.config, []
        kinds = ["images", "local"] if self.transmitting else ["images", "received", "samples"]
        kinds += [f"baseline_{codec}" for codec in codecs]
        for name in names:
            pictures = [read_picture_file(self.results.file(kind, name)) for kind in kinds]
            y = self._sent_semantics(self.dataset.batch([self.names.index(name)]))
            pictures.insert(1, show_semantics(y, config.num_classes, config.one_hot_label)[0])
            rows.append(pictures)
        captions = ["original", "sent semantics", "local picture"]
        if not self.transmitting:
            channel = "" if config.link == "ideal" else f" {config.snr:g} dB"
            channel += f", {config.pool}" if config.link == "analog" and config.pool != "None" else ""
            captions[2:] = [f"received, {config.link}{channel}", "regenerated"]
        captions += [f"{codec}, same bits" for codec in codecs]
        save_picture(picture_grid(rows, captions), self.results.path / "panel.png")

    def _sent_semantics(self, scene):
        return self._coded(scene) if self.bank is None else self.transmitter.describe(scene)[1]

    def _coded(self, scene):
        return received_semantics(
            scene["label"],
            scene.get("instance"),
            scene.get("image_edge"),
            self.config.num_classes,
            self.config.one_hot_label,
            not self.config.no_instance,
            self.parts["coding"],
        )


def read_message(path):
    """Read one message file; InputError, naming it, where it is damaged."""
    try:
        return Message.from_bytes(path.read_bytes())
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


class _StepCounter:
    """Shows on a bar of pictures that network steps go on, searches' included; calls on_first(bar) after the first."""

    def __init__(self, bar, on_first):
        self.bar, self.count, self.on_first = bar, 0, on_first

    def __call__(self, *_):
        self.count += 1
        if self.count == 1:
            self.on_first(self.bar)
        self.bar.set_postfix_str(f"{self.count} steps")


def run_points(config, weights, parts, log, share=ALONE, quiet=False, start=None):
    """Run every point of a sampling config (see `config.points`), sum each up, and draw curves where there are several.

    Of several shares, one that finds all pictures of all points there sums up; the others end before.

    :param say: function that prints one line.
    :param share: the `Share` of each point's pictures that this process makes.
    :param quiet: show no progress bar.
    :param start: a `StartUp`, whose line is shown after the first reverse step; or None.
    """
    found, runs, summaries = points(config), [], []
    for number, point in enumerate(found, 1):
        run = Regeneration(point, weights, parts, share, quiet, start if number == 1 else None)
        verb = "writing the messages of" if run.transmitting else "regenerating"
        place = f" ({number} of {len(found)})" if len(found) > 1 else ""
        part = f"share {share.index + 1} of {share.count} of " if share.count > 1 else ""
        log(f"{verb} {part}{run.count} pictures with {weights} into {point.results_path}{place}")
        rows = run.run()
        runs.append(run)
        if share.count == 1:  # at once, so that a long sweep shows its first results
            summaries.append(_sum_up(run, rows, log))
    if share.count > 1:
        tables = [(run, run.rows()) for run in runs]
        count = sum(len(batch) for run in runs for batch in run.batches)
        folders = [(run.results, run.is_complete(rows)) for run, rows in tables]
        if not is_last(share, count, folders, config.results_path, log):
            return
        summaries = [_sum_up(run, rows, log) for run, rows in tables]
    for note in parts["measures"].metrics.notes:
        log(f"note: {note}")
    if len(found) > 1:
        log(write_curves(Path(config.results_path), summaries))
    for run in runs:  # at the very end: while they are there, the work of putting them together is not done
        run.results.tidy()


def _sum_up(run, rows, log):
    """Sum one point up and say how it went; return (link, pool, snr_db, summary)."""
    summary = run.sum_up(rows)
    for line in [*run.summary(rows), *codec_lines(summary)]:
        log(line)
    return run.config.link, run.config.pool, run.config.snr, summary
