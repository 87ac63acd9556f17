"""A sampling run: pictures or messages in, regenerated pictures, a table and a panel out.

Each finished picture leaves a row file. Run again, a run goes on with what is missing. Several processes share the
pictures out without speaking to each other, and whoever finds all rows there joins them to results.csv.
"""

import functools
import hashlib
import os
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from ..config import results_settings, sweep
from ..console import STARTED, InputError, StandardError, bar_options, log, show_beside
from ..data.pictures import save_picture, to_uint8
from ..files import file_digest
from ..link.message import CRC_BYTES, SESSION, to_bytes
from ..link.source_coding import pack_choices
from ..random_streams import generator, text_number
from ..training.distributed import Share
from .curves import write_curves
from .html_report import write_report
from .metrics import psnr
from .panels import palette, show_semantics, write_panel
from .report import COLUMNS, size_columns, summary_lines
from .results import ResultsFolder, picture_digest, share_out, unique_names

MESSAGE = ".dgo"  # ending of a message's file
ALONE = Share()


class Run:
    """The run loop over the pictures of one point, or of a folder of messages.

    :param config, weights: a `SampleConfig` of one point (see `config.sweep`), and the path of the weights file.
    :param paths, names: of the pictures or messages, in their order, and what their results are called.
    """

    columns, batch_size, failures = COLUMNS, 1, ()
    kind, verb = "samples", "regenerating"  # kind: of the file that a finished picture leaves behind

    def __init__(self, config, weights, paths, names):
        self.config, self.weights, self.results = config, weights, ResultsFolder(config.results_path)
        self.paths, self.names, self.done = [*map(str, paths)], names, {}  # done: number -> row
        self.count, self.summary = min(config.num_samples, len(paths)), None

    def settings(self):
        """Return what identifies the results: flags, and the weights' digest."""
        return results_settings(self.config) | {"weights_sha256": file_digest(self.weights).hex()}

    def identity(self, k):
        """Return the columns that tell whether a row is of picture k."""
        return {"path": self.paths[k], "name": self.names[k]}

    def find_done(self):
        """Read the rows of finished pictures and bad messages; return whether none of this run's are missing."""
        rows = {k: self.results.finished_row(name, self.kind) for k, name in enumerate(self.names)}
        self.done = {k: row for k, row in rows.items() if row and row.items() >= self.identity(k).items()}
        return self.done.keys() >= {*range(self.count)}

    def claim(self):
        """Take the results folder, or refuse it."""
        self.results.claim(self.settings())

    def run(self, share=ALONE, quiet=False):
        """Make what is missing of a share, with or without a progress bar; return how many pictures that were."""
        self.claim()
        self.find_done()
        batches = share_out(self.count, self.batch_size, share)
        made = {k for k, row in self.done.items() if "picture_sha256" in row}  # a bad message is tried again
        todo = [left for batch in batches if (left := [k for k in batch if k not in made])]
        total, left = sum(map(len, batches)), sum(map(len, todo))
        if left < total:
            log(f"{total - left} of {total} pictures are done already")
        with tqdm(total=left, unit="picture", **bar_options(), disable=quiet) as bar:

            def on_step(t, *_):  # of searches, too
                if not quiet:
                    _log_first_step()
                show_beside(bar, f"{t} steps left of the chain")

            for numbers in todo:
                for k, row in zip(numbers, self.make(numbers, on_step), strict=True):
                    self.results.write_row(row)
                    self.done[k] = row
                bar.update(len(numbers))
        return left

    def save(self, k, pictures):
        """Write pictures (H, W, 3), and label maps (H, W), all uint8, as files of their kinds (dict: kind -> array)."""
        for kind, picture in pictures.items():
            colours = palette(self.config.num_classes) if picture.ndim == 2 else None
            save_picture(picture, self.results.file(kind, self.names[k]), colours)

    def sum_up(self, log):
        """Join the rows to results.csv, once all else that follows from them is there."""
        rows = [row for _, row in sorted(self.done.items())]
        made = [row for row in rows if "picture_sha256" in row]  # a bad message gave none
        self.summary = self.report(made)
        write_report(self.results.path, {self.results.path.name: self.summary}, self.columns, rows)
        self.results.write_table("results.csv", self.columns, rows)
        for line in summary_lines(self.summary) if self.summary else ():
            log(line)
        log(f"{len(made)} pictures; report.html, results.csv and pictures are in {self.results.path}")


@functools.cache
def _log_first_step():
    tqdm.write(f"first reverse step after {time.monotonic() - STARTED:.1f} s", file=StandardError())


class SceneRun(Run):
    """Sends the scenes of a split over the channel and regenerates them; of --role transmit, only writes messages."""

    def __init__(self, config, weights, parts):
        self.dataset, self.bank, self.measures = parts["dataset"], parts["bank"], parts["measures"]
        paths = [pair.image or pair.label for pair in self.dataset.pairs]
        super().__init__(config, weights, paths, unique_names(paths, taken=[Path(SESSION).stem]))
        # What is drawn for a picture follows from its name, so that further files in the split change nothing.
        stems = [pair.stem for pair in self.dataset.pairs]
        self.numbers = dict(zip(self.paths, map(text_number, stems), strict=True))
        self.transmitting, self.batch_size = config.role == "transmit", config.batch_size
        if self.transmitting:
            self.kind, self.verb = "local", "writing the messages of"
        self.transmitter, self.receiver = parts["transmitter"](config), parts["receiver"](config)
        self.channel = None if self.transmitting else parts["channel"](config)
        self.analog = not self.transmitting and config.link == "analog"

    def claim(self):
        """Take the results folder; put the session there, before any message."""
        super().claim()
        if not self.analog:
            path, data = self.results.file("messages", SESSION, ""), self.transmitter.session.file
            if path.exists() and path.read_bytes() != data:
                raise InputError(f"{path} is of another precision or program version; choose another --results_path")
            self.results.write_bytes(path, data)

    def settings(self):
        """Return what identifies the results: also the data's place, and digests of networks that decide them."""
        config, found = self.config, super().settings()
        found["data_dir"] = config.data_dir if "://" in config.data_dir else os.path.abspath(config.data_dir)
        if config.extractor != "gt":
            found["extractor_sha256"] = file_digest(config.extractor).hex()
        if config.segmenter and config.distance == "segmenter":
            found["segmenter_sha256"] = file_digest(config.segmenter).hex()
        return found

    def make(self, numbers, on_step):
        """Make one batch of pictures, write their files, and return their rows."""
        if len({self.dataset.sample_size(k) for k in numbers}) > 1:
            raise InputError(f"pictures {numbers[0] + 1} to {numbers[-1] + 1} differ in size; use --batch_size 1")
        scenes = [self.dataset.batch([k]) for k in numbers]
        rows, sents, arrivals = [], [], []
        for k, scene in zip(numbers, scenes, strict=True):
            started, arrival = time.monotonic(), None
            sents.append(self.transmitter.send(scene, self._start(k), on_step))
            rows.append(self._sent_row(k, sents[-1]) | {"transmit_seconds": f"{time.monotonic() - started:.3f}"})
            if not self.transmitting:
                arrival, facts = self.channel(sents[-1], self.receiver, self._stream(self.paths[k]))
                rows[-1] |= facts | {"problems": " ".join(arrival.problems) if arrival else "header"}
            arrivals.append(arrival)
        if self.transmitting:
            images = torch.stack([sent.choice.picture for sent in sents]).float().cpu()
        else:
            images = self._receive(rows, arrivals, sents, on_step)
        for k, row, *picture in zip(numbers, rows, scenes, sents, arrivals, images.split(1), strict=True):
            row |= self._write(k, *picture)
        return rows

    def _stream(self, path):
        return generator(self.config.seed, "channel", self.numbers[path])

    def _start(self, k):
        """Bank index that picture k starts from, where none is chosen."""
        if self.config.noise_index.isdigit():
            return int(self.config.noise_index)
        if self.config.selection == "per_step":
            return 0
        return self.bank.index_for(self.config.seed, "picture index", self.numbers[self.paths[k]])

    def _sent_row(self, k, sent):
        config, choice, message = self.config, sent.choice, sent.message
        if self.analog:
            # The planes cross as they are; besides the indices, bits say which classes those are of.
            candidates = config.step_candidates, config.step_atoms
            indices = pack_choices(message.start_index, self.bank.size, message.codewords, *candidates)
            classes = config.num_classes if config.one_hot_label and message.label is not None else 0
            bits = {"header": 0, "labels": classes, "edges": 0, "indices": 8 * len(indices)}
            bits["color"] = 8 * len(message.color)
        else:
            bits = {name: 8 * len(part) for name, part in sent.parts.items()}
            if self.transmitting or config.link != "digital":  # whose blocks have CRCs
                bits["header"] += 8 * CRC_BYTES
            self.results.write_bytes(self.results.file("messages", self.names[k], MESSAGE), to_bytes(sent.parts))
        row = self.identity(k) | size_columns(bits, *sent.y.shape[2:])
        if self.transmitting:
            row |= {"bank_index": message.start_index or 0, "steps": choice.steps}
        else:
            row |= {"link": config.link, "snr_db": f"{config.snr:g}", "pool": config.pool}
        if choice is not None:
            distance = "" if choice.score is None else f"{float(choice.score):.6g}"
            row |= {"evaluations": choice.evaluations, "distance": distance}
        return row

    def _receive(self, rows, arrivals, sents, on_step):
        """Let the receiver make the pictures (N, 3, H, W) of a batch; grey where the header is lost."""
        started = time.monotonic()
        images = torch.zeros(len(sents), 3, *sents[0].y.shape[2:])
        there = [j for j, arrival in enumerate(arrivals) if arrival is not None]
        if there:
            result = self.receiver.pictures([arrivals[j] for j in there], on_step=on_step)
            images[there] = result.images.float().cpu()
            for j, steps in zip(there, result.steps.tolist(), strict=True):
                rows[j] |= {"steps": steps, "bank_index": arrivals[j].start}
        for row in rows:
            row["seconds"] = f"{(time.monotonic() - started) / len(rows):.3f}"
        return images

    def _write(self, k, scene, sent, arrival, image):
        """Write one picture's files; return what is measured of it (1, 3, H, W)."""
        files = {"labels": scene["label"][0, 0].numpy().astype(np.uint8)}  # (H, W)
        row = {"picture_sha256": picture_digest(image[0])}
        if not self.bank.size:
            row["bank_index"] = ""  # fresh noise has no index to share
        if "image" in scene:
            files["images"] = to_uint8(scene["image"])[0]
            row |= self.measures.per_picture(image, scene["image"])
        if sent.choice is not None:
            files["local"] = to_uint8(sent.choice.picture[None])[0]
        if not self.transmitting:
            received = torch.zeros_like(sent.y) if arrival is None else arrival.y
            files["received"] = show_semantics(received, self.config.num_classes, self.config.one_hot_label)[0]
            files["samples"] = to_uint8(image)[0]
            if sent.choice is not None:
                row["mismatch_db"] = f"{float(psnr(image, sent.choice.picture[None].float().cpu())):.3f}"
        self.save(k, files)
        return row

    def report(self, rows):
        """Compare with classical codecs, measure the set, write summary.json and panel.png; return the summary."""
        config, baseline_rows = self.config, []
        for row in self.measures.complete(self.results, rows, self.kind):
            self.results.write_row(row)
        facts = {"role": config.role, "picture": "x".join(map(str, self.dataset.sample_size(0)))}
        if not self.transmitting:
            facts |= {"link": config.link, "pool": config.pool, "snr_db": f"{config.snr:g}"}
        if self.measures.codecs and facts.get("link") != "analog":
            link = self.channel if facts.get("link") == "digital" else None  # a codec's bytes cross it, too
            baseline_rows = self.measures.compare(self.results, rows, link, self._stream)
        if self.bank.size:  # what both ends own before the first message, in bytes
            facts["shared_once_bytes"] = {"weights": os.path.getsize(self.weights), "bank_seed": 8}
            facts["shared_once_bytes"] |= {} if self.analog else {"session": len(self.transmitter.session.file)}
        self._write_panel(rows[: config.panel_items], self.measures.codecs if baseline_rows else ())
        return self.measures.summarise(self.results, rows, baseline_rows, facts)

    def _write_panel(self, rows, codecs):
        config = self.config

        def sent_semantics(name):
            y = self.transmitter.describe(self.dataset.batch([self.names.index(name)]))[1]
            return show_semantics(y, config.num_classes, config.one_hot_label)[0]

        columns = {"original": "images", "sent semantics": sent_semantics}
        if self.transmitting:
            columns["local picture"] = "local"
        else:
            channel = "ideal" if config.link == "ideal" else f"{config.link} {config.snr:g} dB"
            channel += "" if config.pool == "None" else f", {config.pool}"
            columns |= {f"received, {channel}": "received", "regenerated": "samples"}
        columns |= {f"{codec}, same bits": f"baseline_{codec}" for codec in codecs}
        write_panel(self.results, rows, columns)


class MessageRun(Run):
    """Regenerates the pictures of a folder of messages alone, as the transmitter made its own (--role receive)."""

    columns = (*COLUMNS, "message_sha256")
    verb = "receiving"

    def __init__(self, config, weights, parts):
        folder = Path(config.messages)
        files = sorted(path for path in folder.rglob(f"*{MESSAGE}") if path.is_file() and path.name != SESSION)
        if not files:
            raise InputError(f"--messages {config.messages}: no {MESSAGE} files there; write them with --role transmit")
        # By their place in the folder, whatever else comes into it.
        names = [str(path.relative_to(folder).with_suffix("")).replace("/", "__") for path in files]
        super().__init__(config, weights, files, names)
        self.receiver = parts["receiver"]()
        self.data = [path.read_bytes() for path in files]
        self.sent, beyond = ResultsFolder(config.verify).digests() if config.verify else {}, names[self.count :]
        self.sent = {name: digest for name, digest in self.sent.items() if name not in beyond}

    def identity(self, k):
        """Return the columns that tell whether a row is of message k, as it is."""
        return super().identity(k) | {"message_sha256": hashlib.sha256(self.data[k]).hexdigest()}

    def make(self, numbers, on_step):
        """Make the picture of one message, write its files, and return its row in a list; a bad one gets a row only."""
        (k,), started = numbers, time.monotonic()
        try:
            message, bits = self.receiver.session.from_bytes(self.data[k])
            self.receiver.make_chain(message.header)
            arrival = self.receiver.accept(message)
            if arrival.problems:
                raise InputError(f"its {arrival.problems[0]} part is damaged; send it again")
        except InputError as error:
            for kind in ("received", "samples", "labels"):  # of when it was whole
                self.results.file(kind, self.names[k]).unlink(missing_ok=True)
            return [self.identity(k) | {"link": "messages", "problems": str(error)}]
        header = arrival.header
        result = self.receiver.pictures([arrival], on_step)
        image = result.images.float().cpu()
        files = {"received": show_semantics(arrival.y, header.num_classes, header.one_hot)[0]}
        files["samples"] = to_uint8(image)[0]
        if header.one_hot:
            files["labels"] = arrival.y[0, : header.num_classes].argmax(0).numpy().astype(np.uint8)  # (H, W)
        self.save(k, files)
        row = {"link": "messages", "bank_index": arrival.start, "steps": int(result.steps[0])}
        row |= {"seconds": f"{time.monotonic() - started:.3f}", "picture_sha256": picture_digest(image[0])}
        return [self.identity(k) | row | size_columns(bits, header.height, header.width)]

    def report(self, rows):
        """Write panel.png; there is nothing to compare with."""
        columns = {"received semantics": "received", "regenerated": "samples"}
        write_panel(self.results, rows[: self.config.panel_items], columns)

    def sum_up(self, log):
        """Join the rows to results.csv; compare with --verify; note what went wrong in `failures`."""
        super().sum_up(log)
        self.failures = [f"{row['path']}: {row['problems']}" for row in self.done.values() if row.get("problems")]
        if self.config.verify:
            made = {row["name"]: row.get("picture_sha256") for row in self.done.values()}
            unequal = [name for name, digest in self.sent.items() if made.get(name) != digest]
            log(f"{len(self.sent) - len(unequal)} of {len(self.sent)} equal")
            other = f"another picture than in {self.config.verify}"
            self.failures += [f"{k}: {other if k in made else 'not received'}" for k in unequal if made.get(k, True)]
            unknown = [name for name in self.names[: self.count] if name not in self.sent and made.get(name)]
            self.failures += [f"{name}: not in {self.config.verify}" for name in unknown]


def run_pictures(config, weights, parts, log, share=ALONE, quiet=False):
    """Run every point of a sampling config (see `config.sweep`), sum each up, and draw curves where there are several.

    Of several shares, one that finds all pictures of all points there sums up; the others end before.

    :param parts, share: of `build_link`; the `Share` of each point's pictures that this process makes.
    :return: a line for each message without a picture and, with --verify, for each picture that differs.
    """
    kind, points = (MessageRun, [config]) if config.role == "receive" else (SceneRun, sweep(config))
    runs, made = [], 0
    for number, point in enumerate(points, 1):
        run = kind(point, weights, parts)
        runs.append(run)
        place = f" ({number} of {len(points)})" if len(points) > 1 else ""
        part = f"share {share.index + 1} of {share.count} of " if share.count > 1 else ""
        log(f"{run.verb} {part}{run.count} pictures with {weights} into {point.results_path}{place}")
        made += run.run(share, quiet)
        if share.count == 1:  # at once, so that a long sweep shows its first results
            run.sum_up(log)
    if share.count > 1:
        done = f"share {share.index + 1} of {share.count} is done ({made} pictures made)"
        if not all(run.find_done() for run in runs):
            log(f"{done}; the last to end sums up. Should one fail, give the same command again: it does the rest")
            return []
        if not made and share.index and all(run.results.file("", "results", ".csv").exists() for run in runs):
            log(f"{done}; the results of all shares are there, and another one sums them up again")
            return []
        log(f"{done}, and so are the others: joining their rows")
        for run in runs:
            run.sum_up(log)
    for note in sorted(parts["measures"].metrics.notes) if "measures" in parts else ():
        log(f"note: {note}")
    if len(points) > 1:
        folder = Path(config.results_path)
        line = write_curves(folder, [(run.config.link, run.config.pool, run.config.snr, run.summary) for run in runs])
        write_report(folder, {run.results.path.name: run.summary for run in runs})
        log(f"{line}; report.html links to each point's")
    for run in runs:
        run.results.remove_leftovers()
    return [line for run in runs for line in run.failures]
