"""A results folder: names, settings, the table, digests."""

import csv
import math

import numpy as np
import pytest
import torch

from guided_diffusion.console import InputError
from guided_diffusion.data.pictures import save_picture
from guided_diffusion.evaluation.results import ResultsFolder, picture_digest, unique_names


@pytest.fixture
def results(tmp_path):
    folder = ResultsFolder(tmp_path / "out")
    folder.claim({"snr": math.inf, "pool": "None"})
    return folder


def test_unique_names_keep_equal_stems_apart():
    paths = ["d/val/a/x.png", "d/val/b/x.png", "d/val/b/y.png", "gs://d/val/c/z.jpg"]
    assert unique_names(paths) == ["a__x", "b__x", "y", "z"]
    assert unique_names([]) == [] and unique_names(["d/session.png"], ["session"]) == ["d__session"]
    for paths in (["d/1/a/x.png", "d/2/a/x.png"], ["d/x/y.png", "e/y.png", "d/x__y.png"]):
        assert len(set(unique_names(paths))) == len(paths)


def test_claim_notes_settings_and_checks_them_after(results):
    results.claim({"snr": math.inf, "pool": "None"})
    with pytest.raises(InputError, match=r"with snr inf, now 5\.0"):
        results.claim({"snr": 5.0, "pool": "None"})


def test_claim_refuses_a_folder_with_other_files(tmp_path):
    (tmp_path / "config.json").write_text("x")
    with pytest.raises(InputError, match=r"holds a config\.json"):
        ResultsFolder(tmp_path).claim({})


def test_row_is_finished_with_its_picture(results):
    row = {"name": "n", "picture_sha256": "0", "psnr_db": "1.5", "realised_snr_db": math.inf, "more": 3}
    results.write_row(row)
    assert results.finished_row("n", "samples") is None and results.finished_row("m", "samples") is None
    picture = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    save_picture(picture, results.file("samples", "n"))
    save_picture(picture[..., 0], results.file("labels", "n"), np.zeros((12, 3)))
    np.testing.assert_array_equal(results.pixels("samples", "n"), picture)
    np.testing.assert_array_equal(results.pixels("labels", "n"), picture[..., 0])
    assert results.pixels("samples", "none") is None
    assert results.finished_row("n", "samples") == row
    results.write_row({"name": "bad", "problems": "damaged"})  # which has no picture
    assert results.finished_row("bad", "samples")["problems"] == "damaged"
    results.write_table("results.csv", ("path", "name", "psnr_db"), [row])
    with open(results.path / "results.csv") as f:
        assert list(csv.DictReader(f)) == [{"path": "", "name": "n", "psnr_db": "1.5"}]


def test_remove_leftovers_keeps_what_is_written_whole(results):
    results.write_row({"name": "n"})
    for name in ("rows/n.json.00c0ffee.tmp", "rows/m.json.1234abcd.tmp"):
        (results.path / name).touch()
    others = results.path / "summary.json.00c0ffee.tmp"  # of another process that sums up at this moment
    others.touch()
    results.remove_leftovers()
    assert [*results.path.rglob("*.tmp")] == [others] and results.file("rows", "n", ".json").exists()


def test_picture_digest_tells_every_bit():
    image = torch.rand(3, 4, 5)
    assert picture_digest(image) == picture_digest(image.clone())
    assert picture_digest(image) != picture_digest(image + 1e-6) and len(picture_digest(image)) == 64
