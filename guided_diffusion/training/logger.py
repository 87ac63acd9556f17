"""What a training run says about itself: progress.csv, TensorBoard and a progress bar."""

import csv
import io
import os
import threading
from collections import deque
from contextlib import suppress
from pathlib import Path

from tqdm import tqdm

from ..console import StandardError, bar_options
from ..files import atomic_write

COLUMNS = (
    "step",
    "images",
    "loss",
    "mse",
    "vb",
    "grad_norm",
    "lr",
    "images_per_second",
    "seconds",
    "skipped_steps",
    "val_score",
    "colour_error",
)
HEADER = ",".join(COLUMNS) + "\r\n"
WAITING = 10_000  # rows kept in memory while progress.csv cannot be written


class RunLogger:
    """Appends rows to directory/progress.csv and TensorBoard, and drives a tqdm bar.

    A full disk does not end a run: rows wait in memory until progress.csv can be written again, TensorBoard is left out
    from its first failure on, and a standard error that goes to a full disk is passed over. The first two are said.

    :param start_step: the step the run starts from; later rows of an earlier, interrupted run are removed.
    :param total_steps: where the run will end, or None.
    :raises OSError: progress.csv has other columns or damaged lines, and there is no room to write it anew.
    """

    def __init__(self, directory, start_step=0, total_steps=None):
        self.path = Path(directory) / "progress.csv"
        self._length = self._keep_rows(start_step)  # bytes of whole lines in the file
        self._waiting, self._lost, self._failing = deque(maxlen=WAITING), 0, False
        self.bar = tqdm(total=total_steps, initial=start_step, unit="step", **bar_options())
        self._catch_up()
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        self._hook = threading.excepthook
        threading.excepthook = self._thread_failed
        self._board = None
        try:
            self._board = SummaryWriter(str(Path(directory) / "tensorboard"), purge_step=start_step + 1)
        except Exception as error:
            self._drop_board(error)

    def _keep_rows(self, start_step):
        """Remove rows after start_step, and torn lines; return the length of what stays, in bytes."""
        content = self.path.read_bytes() if self.path.exists() else b""
        text = (
            content[: content.rfind(b"\n") + 1].replace(b"\0", b"").decode(errors="replace")
        )  # crashed machines leave zeros
        rows = [row for row in csv.DictReader(io.StringIO(text, newline="")) if None not in row.values()]
        rows = [row for row in rows if (row.get("step") or "").isdigit() and int(row["step"]) <= start_step]
        kept = (HEADER + "".join(_line(row, extrasaction="ignore") for row in rows) if rows else "").encode()
        if not content.startswith(kept):
            with atomic_write(self.path, "wb") as f:
                f.write(kept)
        elif content != kept:
            os.truncate(self.path, len(kept))  # needs no room on the disk
        return len(kept)

    def row(self, values):
        """Write one row (a dict of columns; those left out stay empty)."""
        line = _line({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in values.items()})
        self._lost += len(self._waiting) == WAITING
        self._waiting.append(line)
        self._catch_up()
        for name, value in values.items():
            if name != "step":
                self._show("add_scalar", name, value, values["step"])
        shown = {"loss": f"{values['loss']:.4f}", "images/s": f"{values['images_per_second']:.2f}"}
        self.bar.set_postfix(shown, refresh=False)

    def picture(self, name, image, step):
        """Show a uint8 array (H, W, 3) in TensorBoard."""
        self._show("add_image", name, image, step, dataformats="HWC")

    def log(self, text):
        """Print a line without breaking the progress bar."""
        self.bar.write(text, file=StandardError())

    def close(self):
        """Write what still waits, and close the files; the bar stays as it stands."""
        self._catch_up()
        if self._waiting:
            self.log(f"{self.path}: the last {self._lost + len(self._waiting)} rows could not be written")
            self._waiting.clear()
        self._show("close")
        self._board = None
        threading.excepthook = self._hook
        self.bar.close()

    # -- progress.csv -------------------------------------------------------------------------------------------------

    def _catch_up(self):
        """Write the waiting rows; where that fails they go on waiting."""
        text = ("" if self._length else HEADER) + "".join(self._waiting)
        if not text:
            return
        try:
            self._append(text.encode())
        except OSError as error:
            if not self._failing:
                self.log(f"{self.path} cannot be written ({error.strerror}): its rows wait in memory; training goes on")
            self._failing = True
            return
        if self._failing:
            lost = f"; the {self._lost} before them are lost" if self._lost else ""
            self.log(f"{self.path} can be written again: {len(self._waiting)} rows that waited are in it{lost}")
        self._failing, self._lost = False, 0
        self._waiting.clear()

    def _append(self, data):
        """Add bytes to the end of the file, all of them or none."""
        with open(self.path, "ab", buffering=0) as f:  # a buffer would write again what failed
            if f.tell() > self._length:
                f.truncate(self._length)
            try:
                while data:
                    data = data[f.write(data) :]
                os.fsync(f.fileno())  # network file systems find out only now that there is no room
            except BaseException:
                f.truncate(self._length)
                raise
            self._length = f.tell()

    # -- TensorBoard --------------------------------------------------------------------------------------------------

    def _show(self, method, *arguments, **options):
        if self._board is None:
            return
        try:
            getattr(self._board, method)(*arguments, **options)
        except Exception as error:  # where tensorflow is installed, a full disk is not an OSError
            self._drop_board(error)

    def _drop_board(self, error):
        board, self._board = self._board, None
        self.log(f"TensorBoard cannot be written ({error}): left out from here on; progress.csv has the same figures")
        with suppress(Exception):
            board.close()

    def _thread_failed(self, arguments):
        # TensorBoard's thread hands its failure to the next call as well, which is where it is said
        if not type(arguments.thread).__module__.startswith("tensorboard."):
            self._hook(arguments)


class SilentLogger:
    """Does nothing, by the same methods: for the processes whose rank is not 0."""

    def __init__(self):
        self.bar = tqdm(disable=True)

    def row(self, values):
        """Leave a row unwritten."""

    def picture(self, name, image, step):
        """Leave a picture unshown."""

    def log(self, text):
        """Say nothing."""

    def close(self):
        """Close nothing."""


def _line(values, **options):
    """Return one line of progress.csv; ValueError names a column that it has not."""
    text = io.StringIO(newline="")
    csv.DictWriter(text, COLUMNS, **options).writerow(values)
    return text.getvalue()
