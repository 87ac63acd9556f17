"""The receiver alone: messages and a checkpoint in, pictures out."""

import dataclasses
import sys
import time
from pathlib import Path

from tqdm import tqdm

from .errors import InputError
from .link.message import Message, receive_parts
from .panels import palette, picture_grid, save_picture, show_semantics, to_uint8
from .regenerate import COLUMNS, FREE, PARTS
from .results import ResultsFolder, digest, picture_digest, read_picture_file, settings_of

ENDING = ".dgo"


def read_message(path):
    """Read one message file; InputError, naming it, where it is damaged."""
    try:
        return Message.from_bytes(path.read_bytes())
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


class Receiving:
    """Regenerates the pictures of a folder of messages.

    :param config: a `SampleConfig` with `messages`.
    :param weights: path of the weights file.
    :param parts: what `build_link.receiving_parts` returns.
    """

    def __init__(self, config, weights, parts):
        self.config, self.weights, self.parts = config, weights, parts
        self.results = ResultsFolder(config.results_path, (*COLUMNS, "message_sha256"))
        files = sorted(path for path in Path(config.messages).rglob(f"*{ENDING}") if path.is_file())
        if not files:
            raise InputError(f"--messages {config.messages}: no {ENDING} files there; write them with --role transmit")
        self.files = files[: config.num_samples]
        folder = Path(config.messages)
        self.names = [str(path.relative_to(folder).with_suffix("")).replace("/", "__") for path in self.files]
        if len({*self.names}) < len(self.names):
            raise InputError(f"--messages {folder}: two files would give pictures of one name; rename one of them")
        self.count = len(self.files)

    def run(self):
        """Make the pictures that are not there yet; return the rows of the whole table."""
        make_chain = self.parts["make_chain"]
        for path in self.files:  # before the long work
            try:
                make_chain(read_message(path).header)
            except InputError as error:
                raise InputError(str(error) if str(path) in str(error) else f"{path}: {error}") from None
        settings = settings_of(dataclasses.asdict(self.config), FREE, {"model_path": self.weights})
        settings["weights_sha256"] = digest(self.weights).hex()
        self.results.claim(settings, free={"model_path"})
        rows = self.results.finished_rows({str(path): k for k, path in enumerate(self.files)}, self.names)
        rows = {k: row for k, row in rows.items() if row.get("message_sha256") == digest(self.files[k]).hex()}
        todo = [k for k in range(self.count) if k not in rows]
        if len(todo) < self.count:
            print(f"{self.count - len(todo)} of {self.count} pictures are done already", file=sys.stderr)
        with tqdm(total=len(todo), unit="picture", file=sys.stderr, dynamic_ncols=True) as bar:
            for k in todo:
                rows[k] = self._picture(k)
                self.results.write_table([rows[j] for j in sorted(rows)])
                bar.update()
        self._write_panel(sorted(rows)[: self.config.panel_items])
        return [rows[k] for k in sorted(rows)]

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
        row = {"path": str(self.files[k]), "name": self.names[k], "bank_index": arrival.start, "steps": int(result.steps[0]),
               "link": "messages", "seconds": f"{time.monotonic() - started:.3f}",
               "bpp": f"{bits['total'] / (header.height * header.width):.4f}",
               "picture_sha256": picture_digest(image[0]), "message_sha256": digest(self.files[k]).hex()}  # fmt: skip
        return row | {f"bits_{part}": bits[part] for part in PARTS}

    def _write_panel(self, numbers):
        kinds = ("received", "samples")
        rows = [[read_picture_file(self.results.file(kind, self.names[k])) for kind in kinds] for k in numbers]
        same_size = [row for row in rows if row[0].shape == rows[0][0].shape]
        if same_size:
            save_picture(picture_grid(same_size, ["received semantics", "regenerated"]), self.results.path / "panel.png")

    def summary(self, rows):
        """Return lines that say where the output is."""
        return [f"{len(rows)} pictures; results.csv, panel.png and pictures are in {self.results.path}"]
