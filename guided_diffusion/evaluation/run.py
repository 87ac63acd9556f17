"""A sampling run: pictures or messages in, regenerated pictures, a table and a panel out.

Each finished picture leaves a row file. Run again, a run goes on with what is missing. Several processes share the
pictures out without speaking to each other, and whoever finds all rows there joins them to results.csv.
"""

import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from ..config import results_settings, sweep
from ..console import STARTED, InputError, StandardError, bar_options
from ..data.pictures import save_picture, to_uint8
from ..files import atomic_write, file_digest
from ..link.message import Message, receive_parts
from ..link.source_coding import pack_choices
from ..random_streams import generator, text_number
from ..training.distributed import Share
from .metrics import psnr
from .panels import palette, show_semantics, write_panel
from .report import BITS, CHANNEL, MEASURED, PARTS, codec_lines, cost_lines, score_lines, write_curves
from .results import ResultsFolder, picture_digest, share_out, unique_names

_POINT = ("path", "name", "bank_index", "steps", "link", "snr_db", "pool")
_COST = ("seconds", "transmit_seconds", "evaluations", "distance", *BITS, "bpp")
COLUMNS = (*_POINT, *_COST, *CHANNEL, "problems", *MEASURED, "mismatch_db", "picture_sha256")
MESSAGE = ".dgo"  # ending of a message's file
ALONE = Share()


class SceneRun:
    """Sends the scenes of a split over the channel and regenerates them; --role transmit: only writes their messages.

    :param config: a `SampleConfig` of one point (see `config.sweep`).
    :param weights: path of the weights file.
    :param parts: what `build_link.sampling_parts` returns.
    :param results: the `ResultsFolder`.
    """

    columns = COLUMNS

    def __init__(self, config, weights, parts, results):
        self.config, self.weights, self.results = config, weights, results
        self.dataset, self.bank, self.measures = parts["dataset"], parts["bank"], parts["measures"]
        self.transmitting = config.role == "transmit"
        self.analog = not self.transmitting and config.link == "analog"
        self.kind = "local" if self.transmitting else "samples"  # what a finished picture leaves behind
        self.verb = "writing the messages of" if self.transmitting else "regenerating"
        self.items, self.batch_size = "pictures", config.batch_size
        self.paths = [str(pair.image or pair.label) for pair in self.dataset.pairs]
        self.names = unique_names(self.paths)
        # What is drawn for a picture follows from its name, so that further files in the split change nothing.
        self.numbers = [text_number(pair.stem) for pair in self.dataset.pairs]
        self.transmitter, self.receiver = parts["transmitter"](config), parts["receiver"](config)
        self.channel = None if self.transmitting else parts["channel"](config)

    def settings(self):
        """Return what identifies the results: flags, the data's place, digests of files that decide the pictures."""
        config, files = self.config, {"weights": self.weights}
        if config.extractor != "gt":
            files["extractor"] = config.extractor
        if config.segmenter and config.distance == "segmenter":
            files["segmenter"] = config.segmenter
        place = config.data_dir if "://" in config.data_dir else os.path.abspath(config.data_dir)
        digests = {f"{name}_sha256": file_digest(path).hex() for name, path in files.items()}
        return results_settings(config) | {"data_dir": place} | digests

    def is_current(self, k, row):
        """Whether a row is of picture k."""
        return row["path"] == self.paths[k]

    def make(self, numbers, on_step):
        """Make one batch of pictures, write their files, and return their rows."""
        if len({self.dataset.sample_size(k) for k in numbers}) > 1:
            which = f"pictures {numbers[0] + 1} to {numbers[-1] + 1}"
            raise InputError(f"{which} differ in size and cannot share a batch; use --batch_size 1")
        scenes = [self.dataset.batch([k]) for k in numbers]
        rows, sents, arrivals = [], [], []
        for k, scene in zip(numbers, scenes, strict=True):
            started = time.monotonic()
            sents.append(self.transmitter.send(scene, self._start(k), on_step))
            rows.append(self._sent_row(k, sents[-1]) | {"transmit_seconds": f"{time.monotonic() - started:.3f}"})
            if not self.transmitting:
                stream = generator(self.config.seed, "channel", self.numbers[k])
                arrival, facts = self.channel.send(sents[-1], self.receiver, stream)
                rows[-1] |= facts | {"problems": " ".join(arrival.problems) if arrival else "header"}
                arrivals.append(arrival)
        if self.transmitting:
            images = torch.stack([sent.choice.picture for sent in sents])
        else:
            images = self._receive(rows, arrivals, sents, on_step)
        for j, k in enumerate(numbers):
            self._write(k, scenes[j], sents[j], arrivals[j] if arrivals else None, images[j : j + 1])
            rows[j] |= self._measure(scenes[j], sents[j], images[j : j + 1])
        return rows

    def _start(self, k):
        """Bank index that picture k starts from, where none is chosen."""
        if self.config.noise_index.isdigit():
            return int(self.config.noise_index)
        if self.config.selection == "per_step":
            return 0
        return self.bank.index_for(self.config.seed, "picture index", self.numbers[k])

    def _sent_row(self, k, sent):
        config, choice, message = self.config, sent.choice, sent.message
        height, width = sent.y.shape[2:]
        if self.analog:  # the planes cross as they are; besides the indices, bits say which classes those are of
            candidates = config.step_candidates, config.step_atoms
            indices = pack_choices(message.start_index, self.bank.size, message.codewords, *candidates)
            bits = {"header": 0, "labels": config.num_classes if config.one_hot_label else 0, "edges": 0}
            bits["indices"] = 8 * len(indices)
            bits["total"] = sum(bits.values())
        else:
            bits = message.bits()
            path = self.results.file("messages", self.names[k], MESSAGE)
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path, "wb") as f:
                f.write(message.to_bytes())
        row = {"path": self.paths[k], "name": self.names[k], **_size_columns(bits, height, width)}
        if self.transmitting:
            row |= {"bank_index": self._shown(message.start_index), "steps": choice.steps}
        else:
            row |= {"link": config.link, "snr_db": f"{config.snr:g}", "pool": config.pool}
        if choice is not None:
            row["evaluations"] = choice.evaluations
            row["distance"] = "" if choice.score is None else f"{float(choice.score):.6g}"
        return row

    def _shown(self, index):
        return (index or 0) if self.bank.size else ""  # fresh noise has no index to share

    def _receive(self, rows, arrivals, sents, on_step):
        """Let the receiver make the pictures (N, 3, H, W) of a batch; grey where the header is lost."""
        started = time.monotonic()
        images = torch.zeros(len(sents), 3, *sents[0].y.shape[2:])
        there = [j for j, arrival in enumerate(arrivals) if arrival is not None]
        if there:
            result = self.receiver.pictures([arrivals[j] for j in there], on_step=on_step)
            images[there] = result.images.float().cpu()
            for j, steps in zip(there, result.steps.tolist(), strict=True):
                rows[j] |= {"steps": steps, "bank_index": self._shown(arrivals[j].start)}
        for row in rows:
            row["seconds"] = f"{(time.monotonic() - started) / len(rows):.3f}"
        return images

    def _write(self, k, scene, sent, arrival, image):
        form, files = (self.config.num_classes, self.config.one_hot_label), {}
        ids = scene["label"][0, 0].numpy().astype(np.uint8)  # (H, W)
        save_picture(ids, self.results.file("labels", self.names[k]), palette(self.config.num_classes))
        if "image" in scene:
            files["images"] = to_uint8(scene["image"])[0]
        if sent.choice is not None:
            files["local"] = to_uint8(sent.choice.picture[None])[0]
        if not self.transmitting:
            received = torch.zeros_like(sent.y) if arrival is None else arrival.y
            files |= {"received": show_semantics(received, *form)[0], "samples": to_uint8(image)[0]}
        for kind, picture in files.items():
            save_picture(picture, self.results.file(kind, self.names[k]))

    def _measure(self, scene, sent, image):
        row = {"picture_sha256": picture_digest(image[0])}
        if "image" in scene:
            row |= self.measures.per_picture(image, scene["image"])
        if not self.transmitting and sent.choice is not None:
            row["mismatch_db"] = f"{float(psnr(image, sent.choice.picture[None].float().cpu())):.3f}"
        return row

    def sum_up(self, rows):
        """Compare with classical codecs, measure the set, write summary.json and panel.png.

        :return: (summary, lines to log).
        """
        config, codecs, baseline_rows = self.config, self.measures.codecs, []
        for row in self.measures.complete(self.results, rows, self.kind):
            self.results.write_row(row)
        if codecs and not self.analog:
            link, numbers = getattr(self.channel, "link", None), dict(zip(self.paths, self.numbers, strict=True))
            baseline_rows = self.measures.compare(self.results, rows, link, config.seed, numbers)
        facts = {"role": config.role}
        if not self.transmitting:
            facts |= {"link": config.link, "pool": config.pool, "snr_db": f"{config.snr:g}"}
        if self.bank.size:  # what both ends own before the first message, in bytes
            facts["shared_once_bytes"] = {"weights": os.path.getsize(self.weights), "bank_seed": 8}
        facts["picture"] = "x".join(map(str, self.dataset.sample_size(0)))
        summary = self.measures.summarise(self.results, rows, baseline_rows, facts)
        self._write_panel(rows[: config.panel_items], codecs if baseline_rows else ())
        lines = [*cost_lines(rows), *score_lines(rows), *codec_lines(summary)]
        what = "messages/, local/ and results.csv" if self.transmitting else "results.csv, panel.png and pictures"
        return summary, [*lines, f"{len(rows)} pictures; {what} are in {self.results.path}"]

    def _write_panel(self, rows, codecs):
        config = self.config

        def sent_semantics(name):
            y = self.transmitter.describe(self.dataset.batch([self.names.index(name)]))[1]
            return show_semantics(y, config.num_classes, config.one_hot_label)[0]

        columns = {"original": "images", "sent semantics": sent_semantics}
        if self.transmitting:
            columns["local picture"] = "local"
        else:
            channel = "" if config.link == "ideal" else f" {config.snr:g} dB"
            channel += f", {config.pool}" if config.link == "analog" and config.pool != "None" else ""
            columns |= {f"received, {config.link}{channel}": "received", "regenerated": "samples"}
        columns |= {f"{codec}, same bits": f"baseline_{codec}" for codec in codecs}
        write_panel(self.results, rows, columns)


class MessageRun:
    """Regenerates the pictures of a folder of messages (--role receive). Parameters as of `SceneRun`.

    :param parts: what `build_link.receiving_parts` returns.
    """

    columns = (*COLUMNS, "message_sha256")
    items, kind, verb, batch_size = "messages", "samples", "receiving", 1  # batch 1, as the transmitter made its own

    def __init__(self, config, weights, parts, results):
        self.config, self.weights, self.results = config, weights, results
        self.receiver = parts["receiver"]()
        folder = Path(config.messages)
        self.files = sorted(path for path in folder.rglob(f"*{MESSAGE}") if path.is_file())
        if not self.files:
            raise InputError(f"--messages {folder}: no {MESSAGE} files there; write them with --role transmit")
        self.paths = [str(path) for path in self.files]
        self.names = [str(path.relative_to(folder).with_suffix("")).replace("/", "__") for path in self.files]
        if len({*self.names}) < len(self.names):
            raise InputError(f"--messages {folder}: two files would give pictures of one name; rename one of them")
        for path in self.files[: config.num_samples]:  # what cannot be received is refused before the long work
            read_message(path, parts["make_chain"])

    def settings(self):
        """Return what identifies the results: flags, and the weights' digest."""
        return results_settings(self.config) | {"weights_sha256": file_digest(self.weights).hex()}

    def is_current(self, k, row):
        """Whether a row is of message k, and the message still the same."""
        return row["path"] == self.paths[k] and row["message_sha256"] == file_digest(self.files[k]).hex()

    def make(self, numbers, on_step):
        """Make the picture of one message, write its files, and return its row in a list."""
        (k,), started = numbers, time.monotonic()
        message, name = read_message(self.files[k]), self.names[k]
        arrival = self.receiver.accept(receive_parts(message.parts))
        result = self.receiver.pictures([arrival], on_step=on_step)
        image, header, bits = result.images.float().cpu(), message.header, message.bits()
        if header.one_hot:
            label = arrival.y[0, : header.num_classes].argmax(0).numpy().astype(np.uint8)  # (H, W)
            save_picture(label, self.results.file("labels", name), palette(header.num_classes))
        received = show_semantics(arrival.y, header.num_classes, header.one_hot)[0]
        save_picture(received, self.results.file("received", name))
        save_picture(to_uint8(image)[0], self.results.file("samples", name))
        row = {"path": self.paths[k], "name": name, "bank_index": arrival.start, "steps": int(result.steps[0])}
        row |= {"link": "messages", "seconds": f"{time.monotonic() - started:.3f}"}
        row |= _size_columns(bits, header.height, header.width)
        row["picture_sha256"] = picture_digest(image[0])
        return [row | {"message_sha256": file_digest(self.files[k]).hex()}]

    def sum_up(self, rows):
        """Write panel.png; return (None, lines to log)."""
        columns = {"received semantics": "received", "regenerated": "samples"}
        write_panel(self.results, rows[: self.config.panel_items], columns)
        return None, [f"{len(rows)} pictures; results.csv, panel.png and pictures are in {self.results.path}"]


def read_message(path, check=lambda header: None):
    """Read one message file; InputError, naming it, where it is damaged or `check` refuses its header."""
    try:
        message = Message.from_bytes(path.read_bytes())
        check(message.header)
        return message
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _size_columns(bits, height, width):
    return {f"bits_{part}": bits[part] for part in PARTS} | {"bpp": f"{bits['total'] / (height * width):.4f}"}


class Run:
    """The run loop over the pictures of one point, or of a folder of messages.

    :param share: the `Share` of the pictures that this process makes.
    :param quiet: show no progress bar.
    """

    def __init__(self, config, weights, parts, share=ALONE, quiet=False):
        kind = MessageRun if config.role == "receive" else SceneRun
        self.config, self.share, self.quiet = config, share, quiet
        self.results = ResultsFolder(config.results_path, kind.columns)
        self.work = kind(config, weights, parts, self.results)
        self.count = min(config.num_samples, len(self.work.paths))

    def run(self):
        """Make what is missing of this share; return how many pictures that were."""
        self.results.claim(self.work.settings())
        batches, done = share_out(self.count, self.work.batch_size, self.share), self._finished()
        todo = [left for batch in batches if (left := [k for k in batch if k not in done])]
        total, left = sum(map(len, batches)), sum(map(len, todo))
        if left < total:
            print(f"{total - left} of {total} pictures are done already", file=sys.stderr)
        with tqdm(total=left, unit="picture", **bar_options(), disable=self.quiet) as bar:
            on_step = _StepCounter(bar, self.quiet)
            for batch in todo:
                for row in self.work.make(batch, on_step):
                    self.results.write_row(row)
                bar.update(len(batch))
        return left

    def _finished(self):
        rows = {k: self.results.finished_row(name, self.work.kind) for k, name in enumerate(self.work.names)}
        return {k: row for k, row in rows.items() if row is not None and self.work.is_current(k, row)}

    def rows(self):
        """Return the rows of all finished pictures, in their order; None while some of this run's are missing."""
        done = self._finished()
        return None if set(range(self.count)) - done.keys() else [*done.values()]

    def sum_up(self, rows, log):
        """Join the rows to results.csv, once all else that follows from them is there; return the summary."""
        summary, lines = self.work.sum_up(rows)
        self.results.write_table(rows)
        for line in lines:
            log(line)
        return summary


class _StepCounter:
    """Shows on a bar of pictures that network steps go on, searches' included; the first of a process is logged."""

    logged = False

    def __init__(self, bar, quiet):
        self.bar, self.quiet, self.count = bar, quiet, 0

    def __call__(self, *_):
        self.count += 1
        if not (_StepCounter.logged or self.quiet):
            self.bar.write(f"first reverse step after {time.monotonic() - STARTED:.1f} s", file=StandardError())
        _StepCounter.logged = True
        self.bar.set_postfix_str(f"{self.count} steps")


def run_pictures(config, weights, parts, log, share=ALONE, quiet=False):
    """Run every point of a sampling config (see `config.sweep`), sum each up, and draw curves where there are several.

    Of several shares, one that finds all pictures of all points there sums up; the others end before.

    :param parts: what `build_link.sampling_parts` or `receiving_parts` returns.
    :param log: function of a line.
    :param share: the `Share` of each point's pictures that this process makes.
    :param quiet: show no progress bar.
    """
    points, runs, summaries, made = sweep(config) if config.role != "receive" else [config], [], [], 0
    for number, point in enumerate(points, 1):
        run = Run(point, weights, parts, share, quiet)
        place = f" ({number} of {len(points)})" if len(points) > 1 else ""
        part = f"share {share.index + 1} of {share.count} of " if share.count > 1 else ""
        what = f"{part}{run.count} {run.work.items} with {weights}"
        log(f"{run.work.verb} {what} into {point.results_path}{place}")
        runs.append(run)
        made += run.run()
        if share.count == 1:  # at once, so that a long sweep shows its first results
            summaries.append(run.sum_up(run.rows(), log))
    if share.count > 1:
        tables = [run.rows() for run in runs]
        if not _is_last(runs, tables, made, log):
            return
        summaries = [run.sum_up(rows, log) for run, rows in zip(runs, tables, strict=True)]
    for note in parts["measures"].metrics.notes if "measures" in parts else ():
        log(f"note: {note}")
    if len(points) > 1:
        log(
            write_curves(
                Path(config.results_path), [(p.link, p.pool, p.snr, s) for p, s in zip(points, summaries, strict=True)]
            )
        )
    for run in runs:
        run.results.remove_leftovers()


def _is_last(runs, tables, made, log):
    """Log how one share of several ended; return whether it is to sum up."""
    share, where = runs[0].share, runs[0].results.path
    done = f"share {share.index + 1} of {share.count} is done ({made} pictures made)"
    if None in tables:
        log(f"{done}; the last share to end sums up. Should one fail, give the same command again: it does the rest")
        return False
    # Where nothing was left to do, one sums up again, as a process alone does.
    if made == 0 and share.index > 0 and all((run.results.path / "results.csv").exists() for run in runs):
        log(f"{done}; the results of all shares are in {where}")
        return False
    log(f"{done}, and so are the others: joining their rows")
    return True
