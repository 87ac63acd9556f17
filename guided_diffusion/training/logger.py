"""What a training run logs: progress.csv, TensorBoard and a progress bar."""

import csv
import errno
import io
import os
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from tqdm import tqdm

from ..console import StandardError, bar_options
from ..files import atomic_write

COLUMNS = ["step", "images", "loss", "mse", "vb", "grad_norm", "lr", "images_per_second", "seconds", "skipped_steps"]
COLUMNS += ["val_score", "colour_error"]


class RunLogger:
    """Appends rows to directory/progress.csv and TensorBoard, and drives a tqdm bar; does nothing without a directory.

    A full disk does not end a run: rows wait in memory for the next one, and TensorBoard is left out once it failed.

    :param start_step: the step the run starts from; later rows of an earlier, interrupted run are removed.
    :param total_steps: where the run will end, or None.
    """

    def __init__(self, directory, start_step=0, total_steps=None):
        self.bar = tqdm(total=total_steps, initial=start_step, unit="step", disable=not directory, **bar_options())
        self._path, self._waiting, self._board = None, b"", None
        if directory:
            from torch.utils.tensorboard import SummaryWriter  # slow to import

            self._path = Path(directory) / "progress.csv"
            self._length = self._keep_rows(start_step)  # bytes of whole lines in the file
            with suppress(OSError):
                self._board = SummaryWriter(str(Path(directory) / "tensorboard"), purge_step=start_step + 1)

    def _keep_rows(self, start_step):
        """Remove rows after start_step, and torn lines; return the length of what stays, in bytes."""
        content = self._path.read_bytes() if self._path.exists() else b""
        text = content[: content.rfind(b"\n") + 1].replace(b"\0", b"").decode(errors="replace")  # crashes leave zeros
        rows = [row for row in csv.DictReader(io.StringIO(text, newline="")) if None not in row.values()]
        rows = [row for row in rows if (row.get("step") or "").isdigit() and int(row["step"]) <= start_step]
        kept = _lines([dict(zip(COLUMNS, COLUMNS, strict=True)), *rows])
        if content.startswith(kept):
            os.truncate(self._path, len(kept))  # needs no room on the disk
        else:
            with atomic_write(self._path, "wb") as f:
                f.write(kept)
        return len(kept)

    def row(self, values):
        """Write one row (a dict of columns; those left out stay empty)."""
        if not self._path:
            return
        self._append(_lines([{key: f"{v:.6g}" if isinstance(v, float) else v for key, v in values.items()}]))
        for name in values.keys() - {"step"}:
            self.show("add_scalar", name, values[name], values["step"])
        shown = {name: f"{values[name]:.4g}" for name in ("loss", "images_per_second") if name in values}
        self.bar.set_postfix(shown, refresh=False)

    def _append(self, line):
        """Add what waits and a line to the end of the file; where that fails they wait."""
        failed, self._waiting = bool(self._waiting), self._waiting + line
        try:
            with open(self._path, "ab", buffering=0) as f:  # a buffer would write again what failed
                f.truncate(self._length)  # what an earlier, failed write left
                if f.write(self._waiting) < len(self._waiting):
                    raise OSError(errno.ENOSPC, "no space for a whole row")
                os.fsync(f.fileno())  # network file systems find out only now that there is no room
        except OSError as error:
            if not failed:
                self.log(f"warning: {self._path} cannot be written ({error.strerror}): its rows wait in memory")
        else:
            self._length, self._waiting = self._length + len(self._waiting), b""

    def show(self, method, *arguments, **options):
        """Call a method of TensorBoard's SummaryWriter."""
        try:
            if self._board:
                getattr(self._board, method)(*arguments, **options)
        except Exception as error:  # where tensorflow is installed, a full disk is not an OSError
            self._board = None
            self.log(f"warning: TensorBoard cannot be written ({error}) and is left out from here on")

    def log(self, text):
        """Print a line without breaking the progress bar."""
        if self._path:
            self.bar.write(text, file=StandardError())

    def close(self):
        """Write what still waits, and close the files; the bar stays as it stands."""
        if self._waiting:
            self._append(b"")
        self.show("close")
        self.bar.close()


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

        :param batch_size: of all ranks, all of which must call this.
        """
        sums = torch.stack([*self.sums.values()])
        means = (self.group.joined((sums / self.finite)[None]).sum(0) / self.group.world_size).tolist()  # waits
        rate = self.steps * batch_size / (time.monotonic() - self.since)
        found = dict(zip(self.sums, means, strict=True)) if int(self.finite) else {}
        self.reset()
        return found, rate
