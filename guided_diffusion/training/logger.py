"""What a training run says about itself: progress.csv, TensorBoard and a progress bar."""

import csv
import sys
from pathlib import Path

from tqdm import tqdm

from ..files import whole_file

COLUMNS = ("step", "images", "loss", "mse", "vb", "grad_norm", "lr", "images_per_second", "seconds", "skipped_steps",
           "val_score", "colour_error")  # fmt: skip


class RunLogger:
    """Appends rows to directory/progress.csv and TensorBoard, and drives a tqdm bar.

    :param start_step: the step the run starts from; later rows of an earlier, interrupted run are removed.
    :param total_steps: where the run will end, or None.
    """

    def __init__(self, directory, start_step=0, total_steps=None):
        self.path = Path(directory) / "progress.csv"
        self._keep_rows(start_step)
        self._file = open(self.path, "a", newline="")  # noqa: SIM115 - open for the whole run
        self._writer = csv.DictWriter(self._file, COLUMNS)
        if self._file.tell() == 0:
            self._writer.writeheader()
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        self._board = SummaryWriter(str(Path(directory) / "tensorboard"), purge_step=start_step + 1)
        self.bar = tqdm(total=total_steps, initial=start_step, unit="step", file=sys.stderr, dynamic_ncols=True)

    def _keep_rows(self, start_step):
        if not self.path.exists():
            return
        with open(self.path, newline="") as f:
            rows = [row for row in csv.DictReader(f) if (row.get("step") or "").isdigit()]
        with whole_file(self.path) as f:
            writer = csv.DictWriter(f, COLUMNS, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(row for row in rows if int(row["step"]) <= start_step)

    def row(self, values):
        """Write one row (a dict of columns; those left out stay empty)."""
        self._writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in values.items()})
        self._file.flush()
        for name, value in values.items():
            if name != "step":
                self._board.add_scalar(name, value, values["step"])
        shown = {"loss": f"{values['loss']:.4f}", "images/s": f"{values['images_per_second']:.2f}"}
        self.bar.set_postfix(shown, refresh=False)

    def picture(self, name, image, step):
        """Show a uint8 array (H, W, 3) in TensorBoard."""
        self._board.add_image(name, image, step, dataformats="HWC")

    def say(self, text):
        """Print a line without breaking the progress bar."""
        self.bar.write(text, file=sys.stderr)

    def close(self):
        """Close the files; the bar stays as it stands."""
        self.bar.close()
        self._file.close()
        self._board.close()
