"""Checkpoints: whole writes, which are resumed, sampled and kept, and the weights of the family."""

import hashlib
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import normals, tiny_network
from corruption import Folder, Part, run
from test_logger import full_disk

from guided_diffusion import load_weights
from guided_diffusion.console import InputError
from guided_diffusion.diffusion.unet import ResBlock
from guided_diffusion.training.checkpoint import (
    file_name,
    find_weights,
    load_checkpoint,
    problem_of,
    prune_checkpoints,
    read_manifest,
    remove_temporary_files,
    resume_point,
    save_checkpoint,
    trained_config,
    with_legacy_keys,
)

KINDS = ("model", "opt", "state", "ema_0.9999_", "ema_0.99_")


def network(**flags):
    return tiny_network(learn_sigma=False, **flags)[0]


def save(directory, step, value=1.0, kinds=KINDS, val_score=0.25):
    """Save a checkpoint whose parts are a tensor each."""
    save_checkpoint(directory, step, {kind: Part({"w": torch.full((50,), value)}) for kind in kinds}, val_score)


def load(directory, step, partial=False):
    """Return the parts of a checkpoint, and the kinds that were left out."""
    parts = {kind: Part() for kind in KINDS}
    missing = load_checkpoint(directory, step, parts, partial)
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


@pytest.fixture(scope="module")
def weights():
    return {key: value + 1 for key, value in network().state_dict().items()}


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
    def killed(source, target, count=[0], replace=os.replace):  # noqa: B006 - counts
        count[0] += 1
        if count[0] > renames:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        patch.setattr(os, "remove", lambda path: None)  # a killed process removes nothing
        with pytest.raises(KeyboardInterrupt):
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


@pytest.mark.parametrize(
    ("files", "newest"),
    [
        (["ema_0.9999_000010.pt", "ema_0.9999_000009.pt", "model000011.pt"], "ema_0.9999_000010.pt"),
        (["ema_0.9999_999999.pt", "ema_0.9999_1000000.pt"], "ema_0.9999_1000000.pt"),
        (["ema_.9999_000010.pt", "ema_0.99_000010.pt"], "ema_.9999_000010.pt"),
        (["ema_0.99_000020.pt", "ema_best_000030.pt", "ema_0.9_000030.pt.tmp"], "ema_0.99_000020.pt"),
    ],
)
def test_find_weights_takes_the_newest_of_a_foreign_folder(tmp_path, files, newest):
    for name in files:
        (tmp_path / name).touch()
    assert find_weights(str(tmp_path)) == str(tmp_path / newest)


def test_find_weights_passes_over_damaged_averages(tmp_path):
    for step in (4, 6, 8):
        save(tmp_path, step)

    def found(log=lambda line: None):
        return Path(find_weights(str(tmp_path), log=log)).name

    logged = []
    assert found(logged.append) == "ema_0.9999_000008.pt" and not logged
    flip(tmp_path / "ema_0.9999_000008.pt")
    assert found(logged.append) == "ema_0.99_000008.pt"
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
    cases = (
        (str(tmp_path / "none.pt"), "no such file"),
        (str(tmp_path), "the folder has no ema_"),
        ("", "none is given"),
    )
    for path, words in cases:
        with pytest.raises(InputError, match=f"--model_path .*: {words}"):
            find_weights(path)
    assert find_weights("none.pt", may_lack=True) == "none.pt"


def test_trained_config_is_in_config_json_or_unknown(trained, tmp_path):
    flags, where = trained_config(str(trained / "ema_0.9_000004.pt"))
    assert flags["num_channels"] == 32 and where == str(trained / "config.json")
    assert trained_config(str(tmp_path / "ema_0.9_000004.pt"))[0] == {}


# -- reading ----------------------------------------------------------------------------------------------------------


def refuse(path, words):
    with pytest.raises(InputError, match=rf"{path.name}: {words}") as caught:
        load_weights(network(), path)
    assert "\n" not in str(caught.value)


def test_load_weights_refuses_code_and_does_not_run_it(tmp_path):
    class Burglar:
        def __reduce__(self):
            return open, (str(tmp_path / "trace"), "w")

    torch.save({"w": torch.zeros(1), "x": Burglar()}, tmp_path / "evil.pt")
    refuse(tmp_path / "evil.pt", "it cannot be read as a checkpoint of plain tensors")
    assert not (tmp_path / "trace").exists()


def test_load_weights_refuses_garbage_and_other_contents(tmp_path):
    path = tmp_path / "model000001.pt"
    for content in (b"", b"not a checkpoint", b"PK\x03\x04 half a zip"):
        path.write_bytes(content)
        refuse(path, "it cannot be read")
    torch.save([1, 2], path)
    refuse(path, "expected a state dict, found list")


def test_load_weights_from_dicts_and_paths(tmp_path, weights):
    torch.save(weights, tmp_path / "w.pt")
    unused = {"input_blocks.12.0.spade_norm.mlp_shared.0.weight": torch.zeros(3)}
    for source in (weights, weights | unused, tmp_path / "w.pt", str(tmp_path / "w.pt")):
        model = network()
        load_weights(model, source)
        assert same(model.state_dict(), weights)


SHAPE = r"key {} has shape {}, the network expects \(3, 32, 3, 3\)"


@pytest.mark.parametrize(
    "key, value, words",
    [
        ("middle_block.0.spade_norm.mlp_gamma.weight", torch.zeros(1), "unexpected key {} "),
        ("input_blocks.1.spade_norm.w", torch.zeros(1), "unexpected key {} "),
        ("ema.out.2.bias", torch.zeros(1), "unexpected key {} "),
        ("out.2.weight", torch.zeros(3, 32, 1, 1), SHAPE.format("{}", r"\(3, 32, 1, 1\)")),
        ("out.2.weight", 1.5, SHAPE.format("{}", "float")),
    ],
)
def test_load_weights_names_what_does_not_fit(weights, key, value, words):
    with pytest.raises(InputError, match=words.format(re.escape(key))):
        load_weights(network(), {**weights, key: value})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_load_weights_assigns_to_a_model_without_values(tmp_path, weights, dtype):
    torch.save({key: value.to(dtype) for key, value in weights.items()}, tmp_path / "w.pt")
    trained, model = network(), network().to("meta")
    load_weights(model, tmp_path / "w.pt")
    assert not any(value.is_meta for value in (*model.parameters(), *model.buffers()))
    assert {value.dtype for value in model.parameters()} == {torch.float32}
    load_weights(trained, tmp_path / "w.pt")
    inputs = normals(1, 3, 8, 8), torch.tensor([5]), normals(1, 5, 8, 8)
    assert torch.equal(model(*inputs), trained(*inputs))


def test_with_legacy_keys_adds_them_to_every_plain_block_of_the_encoder():
    model = network(resblock_updown=True, channel_mult="1,2", num_res_blocks=2)
    extended = with_legacy_keys(model.state_dict(), model)
    added = {k: v for k, v in extended.items() if k not in model.state_dict()}
    blocks = {f"input_blocks.{k}": m for k, m in model.input_blocks.named_modules() if isinstance(m, ResBlock)}
    assert len(blocks) == 5 and len(added) == 6 * len(blocks)
    for name, block in blocks.items():
        n = block.in_layers[0].num_channels
        for part, shape in (("shared.0", (128, 3, 3, 3)), ("gamma", (n, 128, 3, 3)), ("beta", (n, 128, 3, 3))):
            for key, size in (("weight", shape), ("bias", shape[:1])):
                value = added[f"{name}.spade_norm.mlp_{part}.{key}"]
                assert tuple(value.shape) == size and not value.any()


# -- old checkpoints --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keep", "scores", "kept"),
    [
        (0, [5, 4, 3, 2, 1], [1, 2, 3, 4, 5]),
        (2, [5, 4, 3, 2, 1], [4, 5]),
        (2, [5, 1, 3, 2, 4], [2, 4, 5]),
        (1, [None, 4, None, 4, None], [4, 5]),
        (1, [None] * 5, [5]),
        (2, [float("nan"), 3, float("inf"), None, None], [2, 4, 5]),
        (9, [5, 4, 3, 2, 1], [1, 2, 3, 4, 5]),
    ],
)
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
    left = {file_name(kind, step) for kind in KINDS for step in (1, 2, 4)} | {
        "manifest000002.json",
        "manifest000004.json",
    }
    assert {*os.listdir(tmp_path)} == left | others


def test_prune_finishes_an_interrupted_deletion(tmp_path, monkeypatch):
    for step in (1, 2):
        save(tmp_path, step)
    unlink, calls = Path.unlink, iter("ab")

    def stop_at_the_third(path, missing_ok=False):
        next(calls)
        unlink(path, missing_ok)

    with monkeypatch.context() as patch, pytest.raises(StopIteration):
        patch.setattr(Path, "unlink", stop_at_the_third)
        prune_checkpoints(tmp_path, 1)
    prune_checkpoints(tmp_path, 1)
    assert sorted(os.listdir(tmp_path)) == names(2)
