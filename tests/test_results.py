"""A results folder: names, settings, the table, digests."""

import csv
import json
import math

import numpy as np
import pytest
import torch

from guided_diffusion.console import InputError
from guided_diffusion.evaluation.panels import save_picture
from guided_diffusion.evaluation.results import (
    ResultsFolder,
    is_last,
    picture_digest,
    read_picture_file,
    settings_of,
    unique_names,
)
from guided_diffusion.training.distributed import Share

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


def test_digests_of_pictures_tell_every_bit():
    image = torch.rand(3, 4, 5)
    assert picture_digest(image) == picture_digest(image.clone().to(memory_format=torch.preserve_format))
    assert picture_digest(image) != picture_digest(image + 1e-6)
    assert len(picture_digest(image)) == 64


def test_a_folder_is_claimed_once_and_checked_after(results):
    results.claim({"snr": 10.0, "pool": "None"})
    results.claim({"snr": 10.0, "pool": "med"}, free={"pool"})
    with pytest.raises(InputError, match=r"with snr 10\.0, now 5\.0"):
        results.claim({"snr": 5.0, "pool": "None"})


@pytest.mark.parametrize("use_ddim, sampler", [(True, "ddim"), (False, "ddpm")])
def test_a_folder_from_before_a_flag_goes_on(tmp_path, use_ddim, sampler):
    results = ResultsFolder(tmp_path, COLUMNS)
    results.claim({"use_ddim": use_ddim})
    results.claim({"use_ddim": use_ddim, "sampler": sampler, "compile": False})
    with pytest.raises(InputError, match=r"with sampler 'dd.m', now 'dpm\+\+'"):
        results.claim({"use_ddim": use_ddim, "sampler": "dpm++"})


def test_infinite_settings_compare_equal(tmp_path):
    folder = ResultsFolder(tmp_path, COLUMNS)
    folder.claim({"snr": math.inf})
    folder.claim({"snr": math.inf})


@pytest.mark.parametrize("name", ["results.csv", "config.json"])
def test_a_folder_with_other_files_is_refused(tmp_path, name):
    (tmp_path / name).write_text("x")
    with pytest.raises(InputError, match=f"holds a {name}"):
        ResultsFolder(tmp_path, COLUMNS).claim({})


def test_another_process_may_claim_and_write_meanwhile(results, monkeypatch):
    """The other is through between two looks of this one: it sees no settings.json, but would see results.csv."""
    settings, late, looks = results.path / "settings.json", ResultsFolder(results.path, COLUMNS), []
    kept = settings.read_bytes()
    settings.unlink()
    exists = type(settings).exists

    def look(path):
        found = exists(path)
        if not looks:
            settings.write_bytes(kept)
            results.write_table([])
        looks.append(path)
        return found

    monkeypatch.setattr(type(settings), "exists", look)
    late.claim({"snr": 10.0, "pool": "None"})
    assert settings in looks


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


# -- shares -----------------------------------------------------------------------------------------------------------

NUMBERS, NAMES = {f"p{k}": k for k in range(6)}, [f"n{k}" for k in range(6)]


@pytest.fixture
def shared(results):
    """Function that gives the folder as one share has it; all pictures are there."""
    for name in NAMES:
        save_picture(np.zeros((2, 2, 3), np.uint8), results.file("samples", name))
    return lambda *share: ResultsFolder(results.path, COLUMNS, share)


def rows_of(*numbers, psnr="1.0"):
    return {k: {"path": f"p{k}", "name": f"n{k}", "psnr_db": psnr} for k in numbers}


def test_shares_see_each_others_rows_and_write_their_own(shared):
    shared(0, 1).write_own(rows_of(4, 0))
    shared(1, 2).write_own(rows_of(3, 1))
    shared(2, 3).write_own(rows_of(2, 1))
    for share in ((0, 1), (0, 2), (2, 3)):
        assert shared(*share).finished_rows(NUMBERS, NAMES) == rows_of(0, 1, 2, 3, 4)
    found = {
        share: shared(*share).finished_rows(NUMBERS, NAMES, own=True) for share in ((0, 1), (0, 2), (1, 2), (2, 3))
    }
    assert found == {(0, 1): rows_of(0, 4), (0, 2): {}, (1, 2): rows_of(1, 3), (2, 3): rows_of(1, 2)}
    assert [path.name for path in shared(0, 1).shard_tables()] == ["results_1of2.csv", "results_2of3.csv"]


def test_a_shares_row_is_newer_than_that_of_results_csv(shared):
    shared(0, 1).write_own(rows_of(0, 1))
    shared(1, 2).write_own(rows_of(1, psnr="2.0"))
    assert shared(0, 2).finished_rows(NUMBERS, NAMES) == rows_of(0) | rows_of(1, psnr="2.0")


def test_no_row_is_missed_while_another_share_sums_up(shared, monkeypatch):
    shared(0, 2).write_own(rows_of(0))
    shared(1, 2).write_own(rows_of(1))
    found = ResultsFolder.shard_tables

    def overtaken(self):
        tables = found(self)
        if tables:  # between the look for the tables and their reading
            monkeypatch.undo()
            shared(0, 2).write_table(rows_of(0, 1).values())
            shared(0, 2).tidy()
        return tables

    monkeypatch.setattr(ResultsFolder, "shard_tables", overtaken)
    assert shared(1, 2).finished_rows(NUMBERS, NAMES) == rows_of(0, 1)
    assert not (shared(0, 2).path / "shards").exists()


def test_what_shares_and_killed_processes_left_goes_twice_without_harm(shared):
    shared(0, 2).write_own(rows_of(0))
    folder = shared(0, 2).path
    for name in ("shards/results_1of2.csv", "samples/n1.png"):
        (folder / f"{name}.00c0ffee.tmp").touch()
    others = folder / "summary.json.00c0ffee.tmp"  # of another process that sums up at this moment
    others.touch()
    for _ in range(2):
        shared(0, 2).tidy()
        assert not (folder / "shards").exists() and [*folder.rglob("*.tmp")] == [others]
        assert len([*(folder / "samples").iterdir()]) == len(NAMES)


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("complete", [[True, True], [True, False]])
@pytest.mark.parametrize("tables", [True, False])
def test_who_sums_up(shared, index, complete, tables):
    if tables:
        shared(0, 2).write_own(rows_of(0))
    said = []
    last = is_last(Share(index, 2), 3, [(shared(index, 2), found) for found in complete], "out", said.append)
    assert last == (all(complete) and (tables or index == 0))
    assert len(said) == 1 and said[0].startswith(f"share {index + 1} of 2 is done (3 pictures)")
    assert ("give the same command again" in said[0]) == (not all(complete))


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
