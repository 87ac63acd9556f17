"""A results folder: names, settings, the table, digests."""

import csv
import hashlib
import json
import math

import numpy as np
import pytest
import torch

from guided_diffusion.errors import InputError
from guided_diffusion.panels import save_picture
from guided_diffusion.results import ResultsFolder, digest, picture_digest, read_picture_file, settings_of, unique_names

COLUMNS = ("path", "name", "psnr_db")


@pytest.fixture
def results(tmp_path):
    folder = ResultsFolder(tmp_path / "out", COLUMNS)
    folder.claim({"snr": 10.0, "pool": "None"})
    return folder


def test_equal_stems_are_kept_apart():
    paths = ["d/val/a/x.png", "d/val/b/x.png", "d/val/b/y.png", "gs://d/val/c/z.jpg"]
    assert unique_names(paths) == ["a__x", "b__x", "y", "z"]
    assert unique_names([]) == []
    for paths in (["d/1/a/x.png", "d/2/a/x.png"], ["d/x/y.png", "e/y.png", "d/x__y.png"]):
        assert len(set(unique_names(paths))) == len(paths)


def test_digests_are_sha_256(tmp_path):
    (tmp_path / "f").write_bytes(b"weights" * 300_000)
    assert digest(tmp_path / "f") == hashlib.sha256(b"weights" * 300_000).digest()
    image = torch.rand(3, 4, 5)
    assert picture_digest(image) == picture_digest(image.clone().to(memory_format=torch.preserve_format))
    assert picture_digest(image) != picture_digest(image + 1e-6)
    assert len(picture_digest(image)) == 64


def test_a_folder_is_claimed_once_and_checked_after(results):
    results.claim({"snr": 10.0, "pool": "None"})
    results.claim({"snr": 10.0, "pool": "med"}, free={"pool"})
    with pytest.raises(InputError, match=r"with snr 10\.0, now 5\.0"):
        results.claim({"snr": 5.0, "pool": "None"})


def test_infinite_settings_compare_equal(tmp_path):
    folder = ResultsFolder(tmp_path, COLUMNS)
    folder.claim({"snr": math.inf})
    folder.claim({"snr": math.inf})


@pytest.mark.parametrize("name", ["results.csv", "config.json"])
def test_a_folder_with_other_files_is_refused(tmp_path, name):
    (tmp_path / name).write_text("x")
    with pytest.raises(InputError, match=f"holds a {name}"):
        ResultsFolder(tmp_path, COLUMNS).claim({})


@pytest.mark.parametrize("contents", ["[]", "{"])
def test_a_broken_settings_file_is_named(results, contents):
    (results.path / "settings.json").write_text(contents)
    with pytest.raises(InputError, match=r"settings\.json"):
        results.claim({})


def test_the_table_keeps_whole_rows_and_forgets_lost_pictures(results):
    rows = [{"path": f"p{k}", "name": f"n{k}", "psnr_db": "1.5", "more": 3} for k in range(3)]
    results.write_table(rows)
    with open(results.table) as f:
        assert list(csv.DictReader(f)) == [{"path": f"p{k}", "name": f"n{k}", "psnr_db": "1.5"} for k in range(3)]
    for k in (0, 2):
        save_picture(np.zeros((2, 2, 3), np.uint8), results.file("samples", f"n{k}"))
    found = results.finished_rows({f"p{k}": k for k in range(3)}, ["n0", "n1", "n2"])
    assert sorted(found) == [0, 2] and found[2]["psnr_db"] == "1.5"
    assert ResultsFolder(results.path / "none", COLUMNS).finished_rows({}, []) == {}


def test_json_and_pictures(results):
    results.write_json("summary.json", {"a": 1})
    assert json.loads((results.path / "summary.json").read_text()) == {"a": 1}
    picture = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    save_picture(picture, results.file("samples", "n"))
    np.testing.assert_array_equal(read_picture_file(results.file("samples", "n")), picture)
    assert read_picture_file(results.file("samples", "none")) is None


def test_settings_leave_free_flags_out_and_make_paths_absolute(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    found = settings_of({"snr": 10, "device": "cpu"}, {"device"}, {"data_dir": "d", "model_path": "gs://m"})
    assert found == {"snr": 10, "data_dir": str(tmp_path / "d"), "model_path": "gs://m"}
