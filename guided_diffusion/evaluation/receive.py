"""The receiver alone: messages and a checkpoint in, pictures out; shared out over processes as a sampling run is."""

import dataclasses
import sys
import time
from pathlib import Path

from tqdm import tqdm

from ..console import InputError, bar_options
from ..files import digest, digest_once
from ..link.message import receive_parts
from .measures import PARTS
from .panels import palette, picture_grid, save_picture, show_semantics, to_uint8
from .results import ResultsFolder, is_last, picture_digest, read_picture_file, settings_of, share_out
from .run import ALONE, COLUMNS, FREE, read_message

ENDING = ".dgo"


class Receiving:
    """Regenerates the pictures of a folder of messages.

    :param config: a `SampleConfig` with `messages`.
    :param weights: path of the weights file.
    :param parts: what `build_link.receiving_parts` returns.
    :param share: the `Share` of the messages that this process receives.
    :param quiet: show no progress bar.
    """

    def __init__(self, config, weights, parts, share=ALONE, quiet=False):
        self.config, self.weights, self.parts, self.share, self.quiet = config, weights, parts, share, quiet
        self.results = ResultsFolder(config.results_path, (*COLUMNS, "message_sha256"), share)
        files = sorted(path for path in Path(config.messages).rglob(f"*{ENDING}") if path.is_file())
        if not files:
            raise InputError(f"--messages {config.messages}: no {ENDING} files there; write them with --role transmit")
        self.files, self.count = files, min(config.num_samples, len(files))
        folder = Path(config.messages)
        self.names = [str(path.relative_to(folder).with_suffix("")).replace("/", "__") for path in self.files]
        if len({*self.names}) < len(self.names):
            raise InputError(f"--messages {folder}: two files would give pictures of one name; rename one of them")
        self.own = [k for batch in share_out(self.count, 1, share) for k in batch]

    def run(self):
        """Make the pictures of this share that are not there yet; return the rows of the whole table, as far as there are."""
        make_chain = self.parts["make_chain"]
        for path in self.files[: self.count]:  # before the long work
            try:
                make_chain(read_message(path).header)
            except InputError as error:
                raise InputError(str(error) if str(path) in str(error) else f"{path}: {error}") from None
        settings = settings_of(dataclasses.asdict(self.config), FREE, {"model_path": self.weights})
        settings["weights_sha256"] = digest_once(self.weights).hex()
        self.results.claim(settings, free={"model_path"})
        rows = self._finished_rows()
        own = rows if self.share.count == 1 else self._finished_rows(own=True)
        todo = [k for k in self.own if k not in rows]
        if len(todo) < len(self.own):
            print(f"{len(self.own) - len(todo)} of {len(self.own)} pictures are done already", file=sys.stderr)
        with tqdm(total=len(todo), unit="picture", **bar_options(), disable=self.quiet) as bar:
            for k in todo:
                own[k] = self._picture(k)
                self.results.write_own(own)
                bar.update()
        return self.rows() if self.share.count > 1 else [rows[k] for k in sorted(rows)]

    def rows(self):
        """Return the rows of all tables, in the order of the messages."""
        rows = self._finished_rows()
        return [rows[k] for k in sorted(rows)]

    def _finished_rows(self, own=False):
        rows = self.results.finished_rows({str(path): k for k, path in enumerate(self.files)}, self.names, own=own)
        return {k: row for k, row in rows.items() if row.get("message_sha256") == digest(self.files[k]).hex()}

    def _picture(self, k):
        """Make one picture, alone (batch 1) as the transmitter made its own."""
        started = time.monotonic()
        message = read_message(self.files[k])
        receiver = self.parts["receiver"]()
        arrival = receiver.accept(receive_parts(message.parts()))
        result = receiver.pictures([arrival])
        image = result.images.float().cpu()
        header, bits = message.header, message.bits()
        num_classes = header.num_classes
        label = arrival.y[0, :num_classes].argmax(0).numpy().astype("uint8") if header.one_hot else None
        if label is not None:
            save_picture(label, self.results.file("labels", self.names[k]), palette(num_classes))
        received = show_semantics(arrival.y, num_classes, header.one_hot)[0]
        save_picture(received, self.results.file("received", self.names[k]))
        save_picture(to_uint8(image)[0], self.results.file("samples", self.names[k]))
        row = {
            "path": str(self.files[k]),
            "name": self.names[k],
            "bank_index": arrival.start,
            "steps": int(result.steps[0]),
            "link": "messages",
            "seconds": f"{time.monotonic() - started:.3f}",
            "bpp": f"{bits['total'] / (header.height * header.width):.4f}",
            "picture_sha256": picture_digest(image[0]),
            "message_sha256": digest(self.files[k]).hex(),
        }
        return row | {f"bits_{part}": bits[part] for part in PARTS}

    def sum_up(self, rows):
        """Write results.csv and panel.png."""
        self.results.write_table(rows)
        kinds = ("received", "samples")
        names = [row["name"] for row in rows][: self.config.panel_items]
        pictures = [[read_picture_file(self.results.file(kind, name)) for kind in kinds] for name in names]
        same_size = [row for row in pictures if row[0].shape == pictures[0][0].shape]
        if same_size:
            save_picture(
                picture_grid(same_size, ["received semantics", "regenerated"]), self.results.path / "panel.png"
            )


def receive_all(config, weights, parts, log, share=ALONE, quiet=False):
    """Receive a folder of messages, or a share of it, and sum up where all are received.

    :param say: function that prints one line. The others: as of `Receiving`.
    """
    run = Receiving(config, weights, parts, share, quiet)
    part = f"share {share.index + 1} of {share.count} of " if share.count > 1 else ""
    log(f"receiving {part}{run.count} messages with {weights} into {config.results_path}")
    rows = run.run()
    if share.count > 1:
        complete = {*map(str, run.files[: run.count])} <= {row["path"] for row in rows}
        if not is_last(share, len(run.own), [(run.results, complete)], config.results_path, log):
            return
    run.sum_up(rows)
    log(f"{len(rows)} pictures; results.csv, panel.png and pictures are in {config.results_path}")
    run.results.tidy()
