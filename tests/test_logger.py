"""progress.csv, TensorBoard and the progress bar."""

import csv
import math

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
    logger.say("a line")
    logger.bar.update(10)
    assert (logger.bar.n, logger.bar.total) == (50, 100)
    assert "loss=0.5000" in str(logger.bar) and "images/s=3.00" in str(logger.bar)
    logger.close()
    captured = capsys.readouterr()
    assert captured.out == "" and "a line\n" in captured.err
