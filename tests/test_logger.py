"""progress.csv, TensorBoard and the progress bar."""

import csv
import errno
import inspect
import math
import os
import resource
import subprocess
import sys
import threading
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest

from guided_diffusion.training.logger import COLUMNS, RunLogger, SilentLogger

ROOT = Path(__file__).resolve().parents[1]


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


def test_columns(tmp_path):
    log(tmp_path, [10], vb=0.125)
    assert set(rows(tmp_path)[0]) == set(COLUMNS) >= {"step", "loss", "mse", "vb", "lr", "images_per_second"}


def test_rows_read_back(tmp_path):
    log(tmp_path, [10, 20], vb=0.125, val_score=math.nan)
    row = rows(tmp_path)[1]
    assert row["step"] == "20" and float(row["loss"]) == 0.5 and float(row["vb"]) == 0.125 and float(row["lr"]) == 1e-4
    assert row["val_score"] == "nan" and row["colour_error"] == ""


def test_a_row_is_in_the_file_at_once(tmp_path):
    logger = RunLogger(tmp_path)
    logger.row(values(10))
    assert logged_steps(tmp_path) == [10]
    logger.close()


def test_unknown_columns_are_refused(tmp_path):
    logger = RunLogger(tmp_path)
    with pytest.raises(ValueError, match="loss_q9"):
        logger.row(values(10, loss_q9=1.0))
    logger.close()


@pytest.mark.parametrize(("start", "kept"), [(20, [10, 20]), (25, [10, 20]), (40, [10, 20, 30, 40]), (0, [])])
def test_rows_after_the_resumed_step_are_removed(tmp_path, start, kept):
    log(tmp_path, [10, 20, 30, 40], vb=1.0)
    log(tmp_path, [50], start_step=start)
    assert logged_steps(tmp_path) == [*kept, 50]
    assert (tmp_path / "progress.csv").read_text().count("step,") == 1
    assert not list(tmp_path.glob("*.tmp"))
    if kept:
        assert float(rows(tmp_path)[0]["vb"]) == 1.0


def test_a_torn_last_line_is_removed(tmp_path):
    log(tmp_path, [10, 20])
    with open(tmp_path / "progress.csv", "a") as f:
        f.write("gar")
    log(tmp_path, [30], start_step=20)
    assert logged_steps(tmp_path) == [10, 20, 30]


def test_an_earlier_header_is_brought_up_to_date(tmp_path):
    (tmp_path / "progress.csv").write_text("step,loss,old\n10,0.5,1\n")
    log(tmp_path, [20], start_step=10)
    assert logged_steps(tmp_path) == [10, 20] and tuple(rows(tmp_path)[0]) == COLUMNS


def test_tensorboard_gets_scalars_and_pictures(tmp_path):
    logger = RunLogger(tmp_path)
    logger.row(values(10))
    logger.picture("preview", np.zeros((4, 6, 3), np.uint8), 10)
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
    assert "loss=0.5000" in str(logger.bar) and "images/s=3.00" in str(logger.bar)
    logger.close()
    captured = capsys.readouterr()
    assert captured.out == "" and "\ra line\n" in captured.err


def test_torn_lines_and_zeros_of_a_crashed_machine_are_removed(tmp_path):
    log(tmp_path, [10, 20])
    empty = b"," * (len(COLUMNS) - 1)
    with open(tmp_path / "progress.csv", "ab") as f:
        f.write(
            b"15,480\r\n" + bytes(64) + b"18" + empty + b"\r\n19" + empty + b"0.1"
        )  # 19 is cut off in its last value
    log(tmp_path, [30], start_step=20)
    assert logged_steps(tmp_path) == [10, 20, 18, 30] and b"\0" not in (tmp_path / "progress.csv").read_bytes()


# ---- a full disk


@contextmanager
def full_disk(size):
    """Let no file of this process grow beyond so many bytes: a write ends short, and the next is an OSError."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_rows_wait_for_room_and_no_line_is_torn(tmp_path, capsys):
    logger = RunLogger(tmp_path)
    logger.row(values(10))
    content = logger.path.read_bytes()
    with full_disk(len(content) + 20):
        for step in (20, 30):
            logger.row(values(step))
            assert logger.path.read_bytes() == content
    logger.row(values(40))
    assert logged_steps(tmp_path) == [10, 20, 30, 40]
    with full_disk(10):
        logger.row(values(50))
    logger.row(values(60))
    logger.close()
    assert logged_steps(tmp_path) == [10, 20, 30, 40, 50, 60]
    said = capsys.readouterr().err
    assert said.count("progress.csv cannot be written (File too large)") == 2
    assert said.count("3 rows that waited") == said.count("2 rows that waited") == 1


def test_a_line_that_could_not_be_taken_back_is_removed_later(tmp_path):
    logger = RunLogger(tmp_path)
    logger.row(values(10))
    with open(logger.path, "a") as f:
        f.write("20,0.")  # as if truncating had failed, too
    logger.row(values(20))
    logger.close()
    assert [(row["step"], row["loss"]) for row in rows(tmp_path)] == [("10", "0.5"), ("20", "0.5")]


def test_a_sync_that_fails_counts_as_not_written(tmp_path, monkeypatch):
    def fail(number):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    logger = RunLogger(tmp_path)
    monkeypatch.setattr(os, "fsync", fail)
    logger.row(values(10))
    assert logged_steps(tmp_path) == []
    monkeypatch.undo()
    logger.row(values(20))
    logger.close()
    assert logged_steps(tmp_path) == [10, 20]


def test_the_rows_that_wait_are_bounded(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("guided_diffusion.training.logger.WAITING", 3)
    logger = RunLogger(tmp_path)
    with full_disk(0):
        for step in range(1, 6):
            logger.row(values(step))
    logger.row(values(6))
    logger.close()
    assert logged_steps(tmp_path) == [4, 5, 6]
    assert "3 rows that waited are in it; the 3 before them are lost" in capsys.readouterr().err


def test_starting_and_ending_on_a_full_disk(tmp_path, capsys):
    with full_disk(0):
        logger = RunLogger(tmp_path, total_steps=9)
        logger.row(values(1))
        logger.picture("preview", np.zeros((4, 6, 3), np.uint8), 1)
        logger.close()
        logger.close()
    assert not logger.path.read_bytes()
    said = capsys.readouterr().err
    assert said.count("TensorBoard cannot be written") == said.count("cannot be written (File too large)") == 1
    assert said.count("the last 1 rows could not be written") == 1 and "Traceback" not in said


def test_resuming_on_a_full_disk_removes_later_rows(tmp_path):
    log(tmp_path, [10, 20, 30])
    with full_disk(0):
        logger = RunLogger(tmp_path, start_step=20)
        assert logged_steps(tmp_path) == [10, 20]
        logger.row(values(30, loss=0.75))
    logger.close()
    assert [(row["step"], row["loss"]) for row in rows(tmp_path)] == [("10", "0.5"), ("20", "0.5"), ("30", "0.75")]


def test_an_earlier_header_is_kept_whole_where_there_is_no_room_for_the_new_one(tmp_path):
    (tmp_path / "progress.csv").write_text("step,loss\n10,0.5\n")
    with full_disk(0), pytest.raises(OSError, match="File too large"):
        RunLogger(tmp_path, start_step=10)
    assert (tmp_path / "progress.csv").read_text() == "step,loss\n10,0.5\n" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("its own kind")])
def test_tensorboard_is_left_out_after_its_thread_failed(tmp_path, capsys, monkeypatch, error):
    hook = threading.excepthook
    logger = RunLogger(tmp_path)
    logger.row(values(10))

    def fail(self, data):
        raise error

    monkeypatch.setattr("tensorboard.summary.writer.record_writer.RecordWriter.write", fail)
    for step in range(20, 60, 10):
        logger.row(values(step))
        logger.picture("preview", np.zeros((4, 6, 3), np.uint8), step)
    logger.close()
    assert logged_steps(tmp_path) == [10, 20, 30, 40, 50]
    said = capsys.readouterr().err
    assert (
        said.count(f"TensorBoard cannot be written ({error}): left out from here on") == 1 and "Traceback" not in said
    )
    assert threading.excepthook is hook


def test_failures_of_other_threads_are_shown(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(threading, "excepthook", shown.append)
    logger = RunLogger(tmp_path)
    thread = threading.Thread(target=lambda: 1 / 0)
    thread.start()
    thread.join()
    logger.close()
    assert [each.exc_type for each in shown] == [ZeroDivisionError]


def test_a_standard_error_on_a_full_disk_is_passed_over(tmp_path, monkeypatch):
    with suppress(OSError), open("/dev/full", "w", buffering=1) as full:  # closing it fails, too
        monkeypatch.setattr(sys, "stderr", full)
        with pytest.raises(OSError, match="No space left"):
            print("a line", file=sys.stderr)
        logger = RunLogger(tmp_path, total_steps=30)
        for step in (10, 20, 30):
            logger.bar.update(10)
            logger.bar.refresh()
            logger.log("a line")
            logger.row(values(step))
        logger.close()
        monkeypatch.undo()
    assert logged_steps(tmp_path) == [10, 20, 30]


def test_a_disk_that_is_really_full(tmp_path):
    """A file system of 64 KB with TensorBoard, progress.csv and the log on it: filled, then freed."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", disk], capture_output=True).returncode:
        pytest.skip("mounting needs root")
    try:
        with open(disk / "log", "w") as log_file:
            done = subprocess.run([sys.executable, "-c", FILLED, disk], stderr=log_file, cwd=ROOT, timeout=120)
        said = (disk / "log").read_text()
        assert done.returncode == 0, said
        assert (
            logged_steps(disk) == list(range(1, 401)) and len((disk / "progress.csv").read_text().splitlines()) == 401
        )
        assert said.count("can be written again: ") == 1 and "Traceback" not in said
    finally:
        subprocess.run(["umount", disk], check=True)


FILLED = """
import pathlib, sys
from guided_diffusion.training.logger import RunLogger
disk = pathlib.Path(sys.argv[1])
filler = disk / "filler"
filler.write_bytes(bytes(40_000))
logger = RunLogger(disk, total_steps=400)
for step in range(1, 401):
    logger.bar.update()
    logger.row({"step": step, "loss": 0.1234567, "lr": 1e-4, "images_per_second": 3.0})
    if step % 10 == 0:
        logger.log(f"step {step}")
    if step == 300:
        assert logger._waiting and logger._board is None
        filler.unlink()
logger.close()
"""


# ---- the other ranks


def test_silent_logger_takes_what_the_other_takes_and_does_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("row", "picture", "log", "close"):
        assert inspect.signature(getattr(SilentLogger, name)) == inspect.signature(getattr(RunLogger, name))
    logger = SilentLogger()
    logger.row(values(10))
    logger.picture("preview", np.zeros((4, 6, 3), np.uint8), 10)
    logger.log("a line")
    logger.bar.update()
    logger.bar.set_postfix({"loss": "1"}, refresh=True)
    logger.close()
    assert capsys.readouterr() == ("", "") and not list(tmp_path.iterdir())
