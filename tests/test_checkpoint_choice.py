"""Which checkpoint of a folder is taken, which are refused, and which are deleted."""

import os
from pathlib import Path

import pytest
import torch
from test_checkpoint import KINDS, RATES, flip, names, parts

from guided_diffusion.console import InputError
from guided_diffusion.training.checkpoint import (
    load_parts,
    problem_of,
    prune_checkpoints,
    save_parts,
    sweep_temporary_files,
)
from guided_diffusion.training.checkpoint_choice import newest_checkpoint, newest_ema, resume_point
from guided_diffusion.training.manifest import file_name, manifest_name

# -- finding checkpoints ----------------------------------------------------------------------------------------------


def test_newest_checkpoint_is_one_that_is_whole_and_what_is_passed_over_is_said(tmp_path):
    for step in (9, 10, 100):
        save_parts(tmp_path, step, parts())
    said = []
    assert newest_checkpoint(tmp_path, log=said.append) == 100 and said == []
    flip(tmp_path / "opt000100.pt")
    (tmp_path / "state000010.pt").unlink()
    assert newest_checkpoint(tmp_path) == 9
    assert resume_point(tmp_path, "auto", log=said.append) == (str(tmp_path), 9)
    assert said == [
        f"checkpoint 100 in {tmp_path} is damaged or incomplete (opt000100.pt differs from its SHA-256); going back to 9",
        f"checkpoint 10 in {tmp_path} is damaged or incomplete (state000010.pt is missing); going back to 9",
    ]
    (tmp_path / manifest_name(100)).unlink()
    newest_checkpoint(tmp_path, log=said.append)
    assert "it has no manifest: its save was cut short" in said[2]


def test_damage_everywhere_is_not_a_reason_to_start_afresh(tmp_path):
    for step in (4, 5):
        save_parts(tmp_path, step, parts())
        (tmp_path / file_name("opt", step)).unlink()
    with pytest.raises(
        InputError, match=r"checkpoint 5 .*\(opt000005\.pt is missing\), and no older one is whole; .*partial"
    ):
        resume_point(tmp_path, "auto")
    said = []
    assert resume_point(tmp_path, "auto", True, said.append) == (str(tmp_path), 5)
    assert len(said) == 1 and "--resume_partial True goes on from what is left" in said[0]


def test_partial_never_takes_a_model_that_differs_from_its_manifest(tmp_path):
    for step in (4, 5, 6):
        save_parts(tmp_path, step, parts())
    flip(tmp_path / "model000006.pt")
    (tmp_path / "opt000005.pt").unlink()
    assert newest_checkpoint(tmp_path, partial=True) == 5
    with pytest.raises(InputError, match=r"model000006\.pt differs from its SHA-256"):
        resume_point(tmp_path, str(tmp_path / "model000006.pt"), partial=True)
    with pytest.raises(InputError, match=r"model000006\.pt: it is damaged"):
        load_parts(tmp_path, 6, RATES, partial=True)
    (tmp_path / manifest_name(6)).write_bytes(b"{")  # its digest is lost, and the file cannot be read any more
    (tmp_path / "model000006.pt").write_bytes(b"PK")
    assert newest_checkpoint(tmp_path, partial=True) == 5
    torch.save({}, tmp_path / "model000006.pt")
    assert newest_checkpoint(tmp_path, partial=True) == 6


def test_checkpoints_of_older_versions_are_taken_unverified(tmp_path):
    for step in (2, 4):
        save_parts(tmp_path, step, parts())
        (tmp_path / manifest_name(step)).unlink()
    said = []
    assert newest_checkpoint(tmp_path, log=said.append) == 4
    assert resume_point(tmp_path, str(tmp_path / "model000004.pt"), log=said.append) == (str(tmp_path), 4)
    assert len(said) == 2 and all("could not be verified" in line for line in said)
    (tmp_path / "state000004.pt").unlink()
    assert newest_checkpoint(tmp_path) == 2
    assert load_parts(tmp_path, 2, RATES)[1] == []


def test_an_explicit_checkpoint_must_be_whole(tmp_path):
    run, branch = tmp_path / "run", tmp_path / "branch"
    run.mkdir()
    save_parts(run, 4, parts())
    flip(run / "state000004.pt")
    asked = str(run / "model000004.pt")
    with pytest.raises(InputError, match=r"model000004\.pt: .*\(state000004\.pt differs.*use --resume_checkpoint auto"):
        resume_point(run, asked)
    with pytest.raises(InputError, match=r"state000004\.pt differs.*name an older model file"):
        resume_point(branch, asked)
    assert resume_point(run, asked, partial=True) == (str(run), 4)


def test_newest_checkpoint_counts_steps_not_letters(tmp_path):
    for step in (999_999, 1_000_000):
        save_parts(tmp_path, step, parts())
    assert newest_checkpoint(tmp_path) == 1_000_000


def test_no_checkpoint(tmp_path):
    assert newest_checkpoint(tmp_path) is None
    assert newest_checkpoint(tmp_path / "gone") is None
    assert resume_point(tmp_path, "auto") is None and resume_point(tmp_path / "gone", "") is None


def test_a_run_is_neither_overwritten_nor_mixed_with_another(tmp_path):
    run, other = tmp_path / "run", tmp_path / "other"
    run.mkdir()
    for step in (2, 4):
        save_parts(run, step, parts())
    with pytest.raises(InputError, match="reached step 4"):
        resume_point(run, "")
    assert resume_point(run, str(run / "model000004.pt")) == (str(run), 4)
    with pytest.raises(InputError, match="steps up to 4"):
        resume_point(run, str(run / "model000002.pt"))
    assert resume_point(other, str(run / "model000002.pt")) == (str(run), 2)
    other.mkdir()
    save_parts(other, 1, parts())
    with pytest.raises(InputError, match="another run"):
        resume_point(other, str(run / "model000002.pt"))


def test_half_written_files_are_swept_and_nothing_else(tmp_path):
    save_parts(tmp_path, 5, parts())
    for name in (
        "model000006.pt.tmp",
        "opt000006.pt.0123abcd.tmp",
        "ema_0.9999_000006.pt.89abcdef.tmp",
        "manifest000006.json.01234567.tmp",
        "config.json.01234567.tmp",
        "progress.csv.01234567.tmp",
    ):
        (tmp_path / name).write_bytes(b"half")
    others = ["notes.pt.tmp", "model000006.pt.mine.tmp", "flags.json.01234567.tmp", "progress.csv"]
    for name in others:
        (tmp_path / name).write_bytes(b"kept")
    sweep_temporary_files(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names(5) + others)


@pytest.mark.parametrize(
    ("files", "newest"),
    [
        (["ema_0.9999_000010.pt", "ema_0.9999_000009.pt", "model000011.pt"], "ema_0.9999_000010.pt"),
        (["ema_0.9999_999999.pt", "ema_0.9999_1000000.pt"], "ema_0.9999_1000000.pt"),
        (["ema_0.99_000010.pt", "ema_0.9999_000010.pt", "ema_0.9_000010.pt"], "ema_0.9999_000010.pt"),
        (["ema_.9999_000010.pt", "ema_0.99_000010.pt"], "ema_.9999_000010.pt"),
        (["ema_0.99_000020.pt", "ema_0.9999_000010.pt", "ema_0.9999_000030.pt.tmp"], "ema_0.99_000020.pt"),
        (["ema_0.99_000020.pt", "ema_best_000030.pt"], "ema_0.99_000020.pt"),
    ],
)
def test_newest_ema(tmp_path, files, newest):
    for name in files:
        (tmp_path / name).touch()
    assert newest_ema(tmp_path) == tmp_path / newest


def test_damaged_averages_are_passed_over_and_said(tmp_path):
    for step in (4, 6, 8):
        save_parts(tmp_path, step, parts())
    said = []
    assert newest_ema(tmp_path, said.append).name == "ema_0.9999_000008.pt" and said == []
    flip(tmp_path / "ema_0.9999_000008.pt")
    assert newest_ema(tmp_path, said.append).name == "ema_0.99_000008.pt"
    assert (
        len(said) == 1 and "ema_0.9999_000008.pt differs from its SHA-256); going back to ema_0.99_000008.pt" in said[0]
    )
    (tmp_path / manifest_name(8)).unlink()  # a save cut short
    (tmp_path / "ema_0.9999_000006.pt").unlink()
    (tmp_path / "ema_0.99_000006.pt").write_bytes(b"short")
    (tmp_path / "ema_0.999_000006.pt").write_bytes(b"left over, and in no manifest")
    assert newest_ema(tmp_path).name == "ema_0.9999_000004.pt"
    (tmp_path / manifest_name(4)).write_bytes(b"{}")
    with pytest.raises(
        InputError, match=r"no ema_\*\.pt file is whole \(newest: .*ema_0\.9999_000008\.pt has no manifest"
    ):
        newest_ema(tmp_path)


def test_a_folder_without_averages_is_named(tmp_path):
    (tmp_path / "model000001.pt").touch()
    with pytest.raises(InputError, match=rf"--model_path {tmp_path}: the folder has no ema_"):
        newest_ema(tmp_path)


# -- old checkpoints --------------------------------------------------------------------------------------------------


def kept_steps(folder):
    """Return the steps of a folder that have all their files, after checking that no step has some of them."""
    files = set(os.listdir(folder))
    steps = {int(name[5:-3]) for name in files if name.startswith("model")}
    assert files == {name for step in steps for name in names(step)}
    return sorted(steps)


@pytest.mark.parametrize(
    ("keep", "scores", "kept"),
    [
        (0, [5, 4, 3, 2, 1], [1, 2, 3, 4, 5]),
        (1, [5, 4, 3, 2, 1], [5]),
        (2, [5, 4, 3, 2, 1], [4, 5]),
        (2, [5, 1, 3, 2, 4], [2, 4, 5]),
        (1, [None, 4, None, 4, None], [4, 5]),
        (1, [None] * 5, [5]),
        (2, [float("nan"), 3, float("inf"), None, None], [2, 4, 5]),
        (9, [5, 4, 3, 2, 1], [1, 2, 3, 4, 5]),
    ],
)
def test_the_newest_and_the_best_are_kept(tmp_path, keep, scores, kept):
    for step, score in enumerate(scores, 1):
        save_parts(tmp_path, step, parts(), {"val_score": score})
    assert prune_checkpoints(tmp_path, keep) == [step for step in range(1, 6) if step not in kept]
    assert kept_steps(tmp_path) == kept
    assert prune_checkpoints(tmp_path, keep) == []


def test_damaged_checkpoints_do_not_count_as_kept(tmp_path):
    for step in range(1, 8):
        save_parts(tmp_path, step, parts(), {"val_score": 1 if step == 4 else 2})
    (tmp_path / "opt000004.pt").write_bytes(b"torn")  # the best, had it been whole
    (tmp_path / "opt000005.pt").unlink()
    (tmp_path / "opt000007.pt").unlink()  # newer than every whole one: a resumed run saves it again
    assert prune_checkpoints(tmp_path, 2) == [1, 2, 4, 5]
    assert problem_of(tmp_path, 3) == problem_of(tmp_path, 6) == "" and (tmp_path / "model000007.pt").exists()


def test_steps_without_manifest_and_other_files_stay(tmp_path):
    for step in (1, 2, 3, 4):
        save_parts(tmp_path, step, parts())
    (tmp_path / manifest_name(1)).unlink()
    (tmp_path / manifest_name(2)).write_bytes(b"{}")
    others = ["ema_mine_000003.pt", "config.json", "model000003.pt.bak"]
    for name in others:
        (tmp_path / name).touch()
    assert prune_checkpoints(tmp_path, 1) == [3]
    for step in (1, 2, 4):
        assert {file_name(kind, step) for kind in KINDS} <= set(os.listdir(tmp_path))
    assert set(others) <= set(os.listdir(tmp_path))


def test_an_interrupted_deletion_is_finished_by_the_next(tmp_path, monkeypatch):
    for step in (1, 2):
        save_parts(tmp_path, step, parts())
    unlink, calls = Path.unlink, []

    def stop_at_the_third(path, missing_ok=False):
        calls.append(path)
        if len(calls) == 3:
            raise KeyboardInterrupt
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        prune_checkpoints(tmp_path, 1)
    monkeypatch.undo()
    assert 2 < len([name for name in os.listdir(tmp_path) if "000001" in name]) < 6
    assert prune_checkpoints(tmp_path, 1) == [1]
    assert kept_steps(tmp_path) == [2]
