"""What a training run logs: progress.csv, TensorBoard and a progress bar."""

import csv
import io
import os
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from tqdm import tqdm

from ..console import StandardError, bar_options
from ..files import atomic_write

COLUMNS = [
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
]


class RunLogger:
    """Appends rows to directory/progress.csv and TensorBoard, and drives a tqdm bar.

    A full disk does not end a run: rows wait in memory until progress.csv can be written again, and TensorBoard is left out
    from its first failure on.

    :param start_step: the step the run starts from; later rows of an earlier, interrupted run are removed.
    :param total_steps: where the run will end, or None.
    :raises OSError: progress.csv has damaged lines, and there is no room to write it anew.
    """

    def __init__(self, directory, start_step=0, total_steps=None):
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        self.path, self._waiting, self._failing, self._board = Path(directory) / "progress.csv", b"", False, None
        self._length = self._keep_rows(start_step)  # bytes of whole lines in the file
        self.bar = tqdm(total=total_steps, initial=start_step, unit="step", **bar_options())
        with self._optional_board():
            self._board = SummaryWriter(str(Path(directory) / "tensorboard"), purge_step=start_step + 1)

    def _keep_rows(self, start_step):
        """Remove rows after start_step, and torn lines; return the length of what stays, in bytes."""
        content = self.path.read_bytes() if self.path.exists() else b""
        text = content[: content.rfind(b"\n") + 1].replace(b"\0", b"").decode(errors="replace")  # crashes leave zeros
        rows = [row for row in csv.DictReader(io.StringIO(text, newline="")) if None not in row.values()]
        rows = [row for row in rows if (row.get("step") or "").isdigit() and int(row["step"]) <= start_step]
        kept = _lines([dict(zip(COLUMNS, COLUMNS, strict=True)), *rows])
        if content.startswith(kept):
            os.truncate(self.path, len(kept))  # needs no room on the disk
        else:
            with atomic_write(self.path, "wb") as f:
                f.write(kept)
        return len(kept)

    def row(self, values):
        """Write one row (a dict of columns; those left out stay empty)."""
        self._waiting += _lines([{key: f"{v:.6g}" if isinstance(v, float) else v for key, v in values.items()}])
        try:
            self._append()
        except OSError as error:
            if not self._failing:
                self.log(f"{self.path} cannot be written ({error.strerror}): its rows wait in memory; training goes on")
            self._failing = True
        with self._optional_board() as board:
            for name in values.keys() - {"step"} if board else ():
                board.add_scalar(name, values[name], values["step"])
        shown = {name: f"{values[name]:.4g}" for name in ("loss", "images_per_second") if name in values}
        self.bar.set_postfix(shown, refresh=False)

    def _append(self):
        """Add the waiting rows to the end of the file, all of them or none."""
        with open(self.path, "ab", buffering=0) as f:  # a buffer would write again what failed
            f.truncate(self._length)  # what a failed attempt left
            f.write(self._waiting)
            os.fsync(f.fileno())  # network file systems find out only now that there is no room
            if f.tell() < self._length + len(self._waiting):
                raise OSError(28, "No space left on device")
            self._length, self._waiting = f.tell(), b""
        if self._failing:
            self.log(f"{self.path} can be written again: the rows that waited are in it")
        self._failing = False

    @contextmanager
    def _optional_board(self):
        """Give the TensorBoard writer, or None; drop it where the block fails."""
        try:
            yield self._board
        except Exception as error:  # where tensorflow is installed, a full disk is not an OSError
            board, self._board = self._board, None
            self.log(
                f"TensorBoard cannot be written ({error}): left out from here on; progress.csv has the same figures"
            )
            with suppress(Exception):
                board.close()

    def picture(self, name, image, step):
        """Show a uint8 array (H, W, 3) in TensorBoard."""
        with self._optional_board() as board:
            if board:
                board.add_image(name, image, step, dataformats="HWC")

    def log(self, text):
        """Print a line without breaking the progress bar."""
        self.bar.write(text, file=StandardError())

    def close(self):
        """Write what still waits, and close the files; the bar stays as it stands."""
        with suppress(OSError):
            self._append()
        if self._waiting:
            self.log(f"{self.path}: the last rows could not be written")
        with self._optional_board() as board:
            if board:
                board.close()
        self.bar.close()


class SilentLogger(RunLogger):
    """Does nothing, by the same methods: for the processes whose rank is not 0."""

    def __init__(self):
        self.bar = tqdm(disable=True)

    def row(self, values):
        """Leave a row unwritten."""

    def picture(self, name, image, step):
        """Leave a picture unshown."""

    def log(self, text):
        """Log nothing."""

    def close(self):
        """Close nothing."""


def _lines(rows):
    text = io.StringIO(newline="")
    csv.DictWriter(text, COLUMNS, extrasaction="ignore").writerows(rows)
    return text.getvalue().encode()


class RunningMeans:
    """Means of the losses since the last row, over the ranks of a `Group`; they stay on the device until asked for."""

    def __init__(self, group):
        self.group = group
        self.reset()

    def reset(self):
        """Start anew."""
        self.sums, self.finite, self.steps, self.since = {}, 0, 0, time.monotonic()

    def add(self, terms, finite):
        """Add one step's losses, scalars on the device; a step that is not `finite` counts for the rate alone."""
        for name, value in terms.items():
            self.sums[name] = self.sums.get(name, 0) + torch.where(finite, value, 0)
        self.finite = self.finite + finite
        self.steps += 1

    @contextmanager
    def paused(self):
        """Leave the time of the block out of the rate."""
        start = time.monotonic()
        yield
        self.since += time.monotonic() - start

    def close(self, batch_size):
        """Return the means as floats (none where no step was finite) and the images per second, and start anew.

        All ranks must call it, with the batch size of all of them.
        """
        sums = torch.stack([*self.sums.values()])
        means = (self.group.joined((sums / self.finite)[None]).sum(0) / self.group.world_size).tolist()  # waits
        rate = self.steps * batch_size / (time.monotonic() - self.since)
        found = dict(zip(self.sums, means, strict=True)) if int(self.finite) else {}
        self.reset()
        return found, rate
