"""progress.csv, TensorBoard and the progress bar."""

import csv
import errno
import math
import resource
from contextlib import contextmanager

import numpy as np
import pytest

from guided_diffusion.training.logger import COLUMNS, RunLogger


def values(step, **more):
    return {"step": step, "loss": 0.5, "mse": 0.25, "lr": 1e-4, "images_per_second": 3.0, **more}


def log(directory, steps, start_step=0, **more):
    logger = RunLogger(directory, start_step, total_steps=100)
    for step in steps:
        logger.row(values(step, **more))
    logger.close()


def rows(directory):
    with open(directory / "progress.csv", newline="") as f:
        return list(csv.DictReader(f))


def logged_steps(directory):
    return [int(row["step"]) for row in rows(directory)]


def test_row_reads_back_at_once(tmp_path):
    log(tmp_path, [10, 20], vb=0.125, val_score=math.nan)
    row = rows(tmp_path)[1]
    assert row["step"] == "20" and float(row["loss"]) == 0.5 and float(row["vb"]) == 0.125 and float(row["lr"]) == 1e-4
    assert row["val_score"] == "nan" and row["colour_error"] == ""


@pytest.mark.parametrize(("start", "kept"), [(20, [10, 20]), (25, [10, 20]), (40, [10, 20, 30, 40]), (0, [])])
def test_progress_loses_rows_after_the_resumed_step(tmp_path, start, kept):
    log(tmp_path, [10, 20, 30, 40], vb=1.0)
    log(tmp_path, [50], start_step=start)
    assert logged_steps(tmp_path) == [*kept, 50]
    assert (tmp_path / "progress.csv").read_text().count("step,") == 1
    assert not list(tmp_path.glob("*.tmp"))
    if kept:
        assert float(rows(tmp_path)[0]["vb"]) == 1.0


def test_tensorboard_gets_scalars_and_pictures(tmp_path):
    logger = RunLogger(tmp_path)
    logger.row(values(10))
    logger.show("add_image", "preview", np.zeros((4, 6, 3), np.uint8), 10, dataformats="HWC")
    logger.close()
    (events,) = (tmp_path / "tensorboard").glob("events.*")
    content = events.read_bytes()
    assert b"loss" in content and b"images_per_second" in content and b"preview" in content


def test_bar_shows_loss_rate_and_goes_on_from_the_resumed_step(tmp_path, capsys):
    logger = RunLogger(tmp_path, start_step=40, total_steps=100)
    logger.row(values(50))
    logger.log("a line")
    logger.bar.update(10)
    assert (logger.bar.n, logger.bar.total) == (50, 100)
    assert "loss=0.5" in str(logger.bar) and "images_per_second=3" in str(logger.bar)
    logger.close()
    captured = capsys.readouterr()
    assert captured.out == "" and "\ra line\n" in captured.err


def test_progress_loses_torn_lines_and_zeros_of_a_crashed_machine(tmp_path):
    log(tmp_path, [10, 20])
    empty = b"," * (len(COLUMNS) - 1)
    with open(tmp_path / "progress.csv", "ab") as f:
        f.write(b"15,480\r\n" + bytes(64) + b"18" + empty + b"\r\n")
        f.write(b"19" + empty + b"0.1")  # cut off in its last value
    log(tmp_path, [30], start_step=20)
    assert logged_steps(tmp_path) == [10, 20, 18, 30] and b"\0" not in (tmp_path / "progress.csv").read_bytes()


@contextmanager
def full_disk(size):
    """Let no file of this process grow beyond so many bytes: a write ends short, and the next is an OSError."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_row_waits_for_room_and_no_line_is_torn(tmp_path, capsys):
    logger = RunLogger(tmp_path)
    logger.row(values(10))
    with full_disk((tmp_path / "progress.csv").stat().st_size + 20):
        for step in (20, 30):
            logger.row(values(step))
    logger.row(values(40))
    with full_disk(10):
        logger.row(values(50))
    logger.close()
    assert logged_steps(tmp_path) == [10, 20, 30, 40, 50]
    assert capsys.readouterr().err.count("progress.csv cannot be written (") == 2


def test_tensorboard_is_left_out_after_its_first_failure(tmp_path, capsys, monkeypatch):
    def fail(self, *arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    logger = RunLogger(tmp_path)
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.add_scalar", fail)
    for step in (10, 20, 30):
        logger.row(values(step))
        logger.show("add_image", "preview", np.zeros((4, 6, 3), np.uint8), step, dataformats="HWC")
    logger.close()
    assert logged_steps(tmp_path) == [10, 20, 30]
    assert capsys.readouterr().err.count("TensorBoard cannot be written ([Errno 28] No space left on device)") == 1


def test_logger_without_a_directory_does_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    logger = RunLogger(None, 3, 10)
    logger.row(values(10))
    logger.show("add_image", "preview", np.zeros((4, 6, 3), np.uint8), 10, dataformats="HWC")
    logger.log("a line")
    logger.bar.update()
    logger.close()
    assert capsys.readouterr() == ("", "") and not list(tmp_path.iterdir())
