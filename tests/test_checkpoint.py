"""Checkpoints: whole writes, and which are resumed, sampled and kept (their weights: test_weights)."""

import hashlib
import json
import math
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from corruption import Folder, Part, run
from test_logger import full_disk

from guided_diffusion.console import InputError
from guided_diffusion.training.checkpoint import (
    file_name,
    find_weights,
    problem_of,
    prune_checkpoints,
    read_manifest,
    remove_temporary_files,
    restore_checkpoint,
    resume_point,
    save_checkpoint,
    trained_config,
)

KINDS = ("model", "opt", "state", "ema_0.9999_", "ema_0.99_")


def save(directory, step, value=1.0, kinds=KINDS, val_score=0.25):
    """Save a checkpoint whose parts are a tensor each."""
    save_checkpoint(directory, step, {kind: Part({"w": torch.full((50,), value)}) for kind in kinds}, val_score)


def load(directory, step, partial=False):
    """Return the parts of a checkpoint, and the kinds that were left out."""
    parts = {kind: Part() for kind in KINDS}
    missing = restore_checkpoint(directory, step, parts, partial)
    return {kind: part.contents["w"] for kind, part in parts.items() if part.contents}, missing


def names(step, kinds=KINDS):
    return sorted(file_name(kind, step) for kind in ("manifest", *kinds))


def flip(path):
    """Change one bit in the middle of a file."""
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 4
    path.write_bytes(raw)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def killed_after(count, function):
    """A function that is interrupted after so many calls."""
    left = iter(range(count))

    def call(*arguments, **options):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return function(*arguments, **options)

    return call


# -- saving -----------------------------------------------------------------------------------------------------------


def test_save_writes_files_and_a_manifest_with_sizes_and_digests(tmp_path):
    save(tmp_path, 4)
    assert sorted(os.listdir(tmp_path)) == names(4)
    manifest = json.loads((tmp_path / "manifest000004.json").read_text())
    assert (manifest["step"], manifest["val_score"]) == (4, 0.25)
    assert manifest["files"].keys() == {file_name(kind, 4) for kind in KINDS}
    for name, entry in manifest["files"].items():
        raw = (tmp_path / name).read_bytes()
        assert entry == {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    del manifest["sha256"]
    assert read_manifest(tmp_path / "manifest000004.json") == manifest


@pytest.mark.parametrize("renames", range(6))
def test_save_that_is_cut_short_first_is_no_checkpoint_yet(tmp_path, monkeypatch, renames):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", killed_after(renames, os.replace))
        patch.setattr(os, "remove", lambda path: None)  # a killed process removes nothing
        save(tmp_path, 7)
    assert resume_point(tmp_path, "auto") is None and resume_point(tmp_path, "") is None
    save(tmp_path, 7)
    assert resume_point(tmp_path, "auto") == (str(tmp_path), 7)


@pytest.mark.parametrize("fails_at", [0, 4])
def test_save_that_fails_leaves_the_earlier_files_and_nothing_else(tmp_path, monkeypatch, fails_at):
    save(tmp_path, 7)
    write, calls = torch.save, []

    def fill_the_disk(contents, f):
        calls.append(f)
        if len(calls) <= fails_at:
            return write(contents, f)
        f.write(b"half a check")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fill_the_disk)
    for step in (7, 8):  # over a whole checkpoint, and a new one
        calls.clear()
        with pytest.raises(OSError, match=rf"{KINDS[fails_at]}00000{step}\.pt: cannot be written .*--checkpoint_dir"):
            save(tmp_path, step, 2.0)
    assert sorted(os.listdir(tmp_path)) == names(7)
    assert problem_of(tmp_path, 7) == "" and resume_point(tmp_path, "auto")[1] == 7
    assert all(torch.equal(value, torch.ones(50)) for value in load(tmp_path, 7)[0].values())


def test_save_reports_a_real_limit_on_file_sizes(tmp_path):
    """torch writes from C++: its error must come through as ours."""
    parts = {"model": Part({}), "opt": Part({"w": torch.zeros(100_000)})}
    refused = pytest.raises(OSError, match=r"opt000007\.pt: cannot be written \(.*File too large")
    with full_disk(100_000), refused:
        save_checkpoint(tmp_path, 7, parts)
    assert os.listdir(tmp_path) == []


def test_remove_temporary_files_leaves_all_others(tmp_path):
    for name in ("model000006.pt", "manifest000006.json", "progress.csv"):
        (tmp_path / f"{name}.0123abcd.tmp").write_bytes(b"half")
    others = ["model000006.pt.mine.tmp", "notes.pt.tmp", "progress.csv"]
    for name in others:
        (tmp_path / name).write_bytes(b"kept")
    remove_temporary_files(tmp_path)
    assert sorted(os.listdir(tmp_path)) == others


# -- a disk that is full for a while ----------------------------------------------------------------------------------


def mount(*options):
    """Run mount; return whether it worked."""
    return bool(shutil.which("mount")) and subprocess.run(["mount", *options], capture_output=True).returncode == 0


@pytest.fixture
def small_disk(tmp_path):
    """A folder of 64 MiB, room for one checkpoint of the tiny network and not for two."""
    folder = tmp_path / "run"
    folder.mkdir()
    if not mount("-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)):
        pytest.skip("mounting a tmpfs needs root")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.slow
def test_full_disk_is_survived_until_there_is_room_again(make_loop, small_disk, capsys):
    straight = make_loop("straight", total_steps=7)
    straight.run()
    loop = make_loop("run", total_steps=7, save_interval=1, keep_checkpoints=1)
    train_step, whole = loop.train_step, []

    def step(batch):
        whole.append(problem_of(small_disk, 1) if loop.step else "")
        if loop.step == 4:
            assert mount("-o", "remount,size=160m", str(small_disk))
        return train_step(batch)

    loop.train_step = step
    assert loop.run() == 7
    logged = capsys.readouterr().err
    assert all(f"step {k} could not be saved" in logged for k in (2, 3, 4)) and "No space left" in logged
    assert "saved step 5" in logged
    assert whole[:5] == [""] * 5  # the checkpoint of step 1, all the while
    assert problem_of(small_disk, 7) == "" and [path.name for path in small_disk.glob("model*")] == ["model000007.pt"]
    assert same(torch.load(small_disk / "model000007.pt", weights_only=True), straight.model.state_dict())


# -- manifests and damage ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("old, new", [(b"0.25", b"0.1"), (b'"step": 4', b'"step": 5'), (b"\n", b""), (b"{", b"")])
def test_read_manifest_refuses_any_other_text(tmp_path, old, new):
    save(tmp_path, 4)
    path = tmp_path / file_name("manifest", 4)
    path.write_bytes(path.read_bytes().replace(old, new))
    assert "the manifest cannot be read (" in problem_of(tmp_path, 4)


def test_problem_of_names_the_file(tmp_path):
    save(tmp_path, 4)
    path = tmp_path / "opt000004.pt"
    raw = path.read_bytes()
    assert problem_of(tmp_path, 4) == ""
    path.write_bytes(raw[:812])
    assert problem_of(tmp_path, 4) == f"opt000004.pt has 812 bytes, the manifest says {len(raw):,}"
    path.write_bytes(raw[:812] + bytes([raw[812] ^ 1]) + raw[813:])
    assert problem_of(tmp_path, 4) == "opt000004.pt differs from its SHA-256"
    assert problem_of(tmp_path, 4, digests=False) == problem_of(tmp_path, 4, partial=True) == ""
    path.unlink()
    assert "opt000004.pt is missing" in problem_of(tmp_path, 4)
    save(tmp_path, 5)
    (tmp_path / "manifest000005.json").unlink()
    assert problem_of(tmp_path, 5) == "it has no manifest" and problem_of(tmp_path, 5, partial=True) == ""


def test_damage_is_recognised_every_time(tmp_path):
    """A short run of the script `corruption.py`."""
    outcomes = run(Folder(tmp_path, small=True), 30, seed=0)
    assert not [key for key in outcomes if key[3].startswith("WRONG")]
    seen = {(attempt, outcome) for _, _, attempt, outcome in outcomes}
    assert {("resumed", "fell back"), ("sampled", "fell back"), ("direct", "refused")} <= seen


def test_load_verifies_every_part(tmp_path):
    for kind in KINDS:
        save(tmp_path, 4)
        flip(tmp_path / file_name(kind, 4))
        with pytest.raises(InputError, match=rf"{kind}000004\.pt: it is damaged: .*differs from its SHA-256;"):
            load(tmp_path, 4)
        if kind != "model":
            parts, missing = load(tmp_path, 4, partial=True)
            assert missing == [kind] and kind not in parts
    save(tmp_path, 4, kinds=KINDS[:4])
    assert (tmp_path / "ema_0.99_000004.pt").exists()  # left over from the save before
    with pytest.raises(InputError, match=r"no readable manifest lists ema_0\.99_000004\.pt"):
        load(tmp_path, 4)
    (tmp_path / file_name("manifest", 4)).write_bytes(b"{}")
    with pytest.raises(InputError, match="the manifest cannot be read"):
        load(tmp_path, 4)
    assert load(tmp_path, 4, partial=True)[1] == []


# -- where to resume --------------------------------------------------------------------------------------------------


def test_resume_point_of_auto_is_the_newest_whole_step(tmp_path):
    assert resume_point(tmp_path, "auto") is None and resume_point(tmp_path / "gone", "auto") is None
    for step in (2, 999_999, 1_000_000):
        save(tmp_path, step)
    logged = []
    assert resume_point(tmp_path, "auto", log=logged.append) == (str(tmp_path), 1_000_000) and not logged
    flip(tmp_path / "state1000000.pt")
    (tmp_path / "manifest999999.json").unlink()
    assert resume_point(tmp_path, "auto", log=logged.append) == (str(tmp_path), 2)
    assert len(logged) == 2 and "state1000000.pt differs" in logged[0] and "looking for an older one" in logged[0]
    assert resume_point(tmp_path, "auto", partial=True) == (str(tmp_path), 1_000_000)
    flip(tmp_path / "model1000000.pt")
    assert resume_point(tmp_path, "auto", partial=True) == (str(tmp_path), 999_999)
    flip(tmp_path / "opt000002.pt")
    with pytest.raises(InputError, match=r"no checkpoint is whole.*--resume_partial True"):
        resume_point(tmp_path, "auto")


def test_resume_point_of_a_path_must_be_whole(tmp_path):
    run, branch = tmp_path / "run", tmp_path / "branch"
    run.mkdir()
    save(run, 4)
    flip(run / "state000004.pt")
    for folder in (run, branch):
        with pytest.raises(InputError, match=r"model000004\.pt: .*\(state000004\.pt differs.*; use an older one"):
            resume_point(folder, str(run / "model000004.pt"))
    assert resume_point(run, str(run / "model000004.pt"), partial=True) == (str(run), 4)


def test_resume_point_never_lets_a_run_be_overwritten_or_mixed_with_another(tmp_path):
    run, other = tmp_path / "run", tmp_path / "other"
    run.mkdir()
    for step in (2, 4):
        save(run, step)
    with pytest.raises(InputError, match=r"reached step 4.*--resume_checkpoint auto"):
        resume_point(run, "")
    with pytest.raises(InputError, match="no such file"):
        resume_point(other, str(run / "model000003.pt"))
    with pytest.raises(InputError, match="steps up to 4"):
        resume_point(run, str(run / "model000002.pt"))
    assert resume_point(run, str(run / "model000004.pt")) == (str(run), 4)
    assert resume_point(other, str(run / "model000002.pt")) == (str(run), 2)
    assert resume_point(other, "") is None
    other.mkdir()
    save(other, 1)
    with pytest.raises(InputError, match="another run"):
        resume_point(other, str(run / "model000002.pt"))
    (other / "model000001.pt").unlink()  # lost, which is no reason to start over
    with pytest.raises(InputError, match="no checkpoint is whole"):
        resume_point(other, "auto")


# -- which weights are sampled ----------------------------------------------------------------------------------------


AVERAGES = ["0.9999_000010 0.9999_000009", "0.9999_1000000 0.9999_999999", ".9999_000010 0.99_000010"]
AVERAGES += ["0.99_000020 best_000030 0.9"]


@pytest.mark.parametrize("rates", AVERAGES)
def test_find_weights_takes_the_newest_of_a_foreign_folder(tmp_path, rates):
    for name in (*(f"ema_{rate}.pt" for rate in rates.split()), "model2000000.pt", "ema_0.9_2000000.pt.tmp"):
        (tmp_path / name).touch()
    assert find_weights(str(tmp_path)) == str(tmp_path / f"ema_{rates.split()[0]}.pt")


def test_find_weights_passes_over_damaged_averages(tmp_path):
    for step in (4, 6, 8):
        save(tmp_path, step)

    logged = []

    def found():
        return Path(find_weights(str(tmp_path), log=logged.append)).name

    assert found() == "ema_0.9999_000008.pt" and not logged
    flip(tmp_path / "ema_0.9999_000008.pt")
    assert found() == "ema_0.99_000008.pt"
    assert "ema_0.9999_000008.pt differs from its SHA-256; going back" in logged[0]
    (tmp_path / "manifest000008.json").unlink()  # a save cut short
    (tmp_path / "ema_0.9999_000006.pt").unlink()
    (tmp_path / "ema_0.99_000006.pt").write_bytes(b"short")
    (tmp_path / "ema_0.999_000006.pt").write_bytes(b"left over, and in no manifest")
    assert found() == "ema_0.9999_000004.pt"
    (tmp_path / "manifest000004.json").write_bytes(b"{}")
    with pytest.raises(InputError, match=r"no ema_\*\.pt file is whole"):
        found()


def test_find_weights_names_what_is_lacking(tmp_path):
    cases = {str(tmp_path / "none.pt"): "no such file", str(tmp_path): "the folder has no ema_", "": "none is given"}
    for path, words in cases.items():
        with pytest.raises(InputError, match=f"--model_path .*: {words}"):
            find_weights(path)
    assert find_weights("none.pt", may_lack=True) == "none.pt"


def test_trained_config_is_in_config_json_or_unknown(trained, tmp_path):
    flags, where = trained_config(str(trained / "ema_0.9_000004.pt"))
    assert flags["num_channels"] == 32 and where == str(trained / "config.json")
    assert trained_config(str(tmp_path / "ema_0.9_000004.pt"))[0] == {}


# -- old checkpoints --------------------------------------------------------------------------------------------------


DESCENDING = [5, 4, 3, 2, 1]
PRUNED = [(0, DESCENDING, [1, 2, 3, 4, 5]), (2, DESCENDING, [4, 5]), (9, DESCENDING, [1, 2, 3, 4, 5])]
PRUNED += [(2, [5, 1, 3, 2, 4], [2, 4, 5]), (1, [None, 4, None, 4, None], [4, 5]), (1, [None] * 5, [5])]
PRUNED += [(2, [math.nan, 3, math.inf, None, None], [2, 4, 5])]


@pytest.mark.parametrize("keep, scores, kept", PRUNED)
def test_prune_keeps_the_newest_and_the_best(tmp_path, keep, scores, kept):
    for step, score in enumerate(scores, 1):
        save(tmp_path, step, val_score=score)
    prune_checkpoints(tmp_path, keep)
    assert sorted(os.listdir(tmp_path)) == sorted(name for step in kept for name in names(step))


def test_prune_leaves_other_files(tmp_path):
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    (tmp_path / "manifest000001.json").unlink()
    (tmp_path / "manifest000002.json").write_bytes(b"{}")
    others = {"ema_mine_000003.pt", "config.json", "model000003.pt.bak"}
    for name in others:
        (tmp_path / name).touch()
    prune_checkpoints(tmp_path, 1)
    left = {name for step in (1, 2, 4) for name in names(step)} - {"manifest000001.json"}
    assert {*os.listdir(tmp_path)} == left | others


def test_prune_finishes_an_interrupted_deletion(tmp_path, monkeypatch):
    for step in (1, 2):
        save(tmp_path, step)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "unlink", killed_after(2, Path.unlink))
        prune_checkpoints(tmp_path, 1)
    prune_checkpoints(tmp_path, 1)
    assert sorted(os.listdir(tmp_path)) == names(2)
