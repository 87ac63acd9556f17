"""Manifests: which checkpoints are whole, and what damage to them is recognised."""

import hashlib
import json

import pytest
import torch
from corruption import Folder, run

from guided_diffusion.console import InputError
from guided_diffusion.training.checkpoint import save_parts
from guided_diffusion.training.manifest import (
    HashedWriter,
    file_name,
    manifest_name,
    manifest_text,
    noted_config,
    predates_manifests,
    problem_of,
    read_manifest,
    saved_steps,
    weights_entry,
)

KINDS = ("model", "opt", "state", "ema_0.99_")


def save(folder, step, value=1.0, facts=None):
    save_parts(folder, step, {kind: {"w": torch.full((50,), value)} for kind in KINDS}, facts)


def test_a_manifest_tells_size_digest_and_facts(tmp_path):
    facts = {"config": {"lr": 1e-4, "preset": "", "ümlaut": [1, None]}, "val_score": 0.25}
    save(tmp_path, 4, facts=facts)
    manifest = json.loads((tmp_path / "manifest000004.json").read_text())
    assert manifest["step"] == 4 and manifest["config"] == facts["config"] and manifest["val_score"] == 0.25
    assert manifest["files"].keys() == {file_name(kind, 4) for kind in KINDS}
    for name, entry in manifest["files"].items():
        raw = (tmp_path / name).read_bytes()
        assert entry == {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    del manifest["sha256"]
    assert read_manifest(tmp_path, 4) == manifest
    assert read_manifest(tmp_path, 5) is None


def test_facts_that_json_writes_in_its_own_way_read_back(tmp_path):
    save(tmp_path, 4, facts={"config": {"pair": (1, 2), 3: float("inf")}, "val_score": 1e-300})
    assert read_manifest(tmp_path, 4)["config"] == {"pair": [1, 2], "3": float("inf")}


def test_torch_writes_in_sequence(tmp_path):
    """The hashed writer has neither seek nor tell."""
    contents = {"w": torch.rand(300, 100), "v": [torch.rand(7).half()]}
    with open(tmp_path / "a.pt", "wb") as f:
        writer = HashedWriter(f)
        torch.save(contents, writer)
    assert writer.entry()["bytes"] == (tmp_path / "a.pt").stat().st_size
    assert torch.equal(torch.load(tmp_path / "a.pt", weights_only=True)["w"], contents["w"])


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: raw.replace(b'"val_score": 0.5', b'"val_score": 0.1'),
        lambda raw: raw.replace(b'"lr"', b'"lR"'),
        lambda raw: raw.replace(b'"step": 4', b'"step": 5'),
        lambda raw: raw.replace(b"\n", b"\r\n"),
        lambda raw: raw + b" ",
        lambda raw: raw[:-1],
        lambda raw: b"",
        lambda raw: b"[" * 100_000,
        lambda raw: b"\xff" * 50,
        lambda raw: b"[1]",
        lambda raw: b"{}",
    ],
)
def test_any_other_text_is_no_manifest(tmp_path, change):
    save(tmp_path, 4, facts={"config": {"lr": 1}, "val_score": 0.5})
    path = tmp_path / manifest_name(4)
    assert problem_of(tmp_path, 4) == "" and change(path.read_bytes()) != path.read_bytes()
    path.write_bytes(change(path.read_bytes()))
    assert problem_of(tmp_path, 4).startswith("the manifest cannot be read (")
    with pytest.raises(InputError, match=r"manifest000004\.json: the manifest cannot be read \(") as caught:
        read_manifest(tmp_path, 4)
    assert "\n" not in str(caught.value)


def test_a_manifest_cannot_point_elsewhere(tmp_path):
    for name, entry in (
        ("../model000004.pt", {"bytes": 1, "sha256": "0" * 64}),
        ("a.pt", {"bytes": "1", "sha256": "0" * 64}),
    ):
        (tmp_path / manifest_name(4)).write_text(manifest_text(4, {name: entry}))
        with pytest.raises(InputError, match="makes no sense"):
            read_manifest(tmp_path, 4)


# -- which checkpoint is whole ----------------------------------------------------------------------------------------


def test_problems_are_named(tmp_path):
    save(tmp_path, 4)
    path = tmp_path / "opt000004.pt"
    raw = path.read_bytes()
    assert problem_of(tmp_path, 4) == "" and problem_of(tmp_path, 4, ["0.99"]) == ""
    assert problem_of(tmp_path, 4, ["0.99", "0.9"]) == "the manifest lists no ema_0.9_000004.pt"
    path.write_bytes(raw[:812])
    assert problem_of(tmp_path, 4) == f"opt000004.pt has 812 bytes, the manifest says {len(raw):,}"
    path.write_bytes(raw[:812] + bytes([raw[812] ^ 1]) + raw[813:])
    assert problem_of(tmp_path, 4) == "opt000004.pt differs from its SHA-256"
    assert problem_of(tmp_path, 4, digests=False) == ""
    path.unlink()
    assert problem_of(tmp_path, 4) == problem_of(tmp_path, 4, digests=False) == "opt000004.pt is missing"
    path.mkdir()
    assert problem_of(tmp_path, 4) == "opt000004.pt cannot be read (Is a directory)"


def test_a_step_without_a_manifest_predates_them_or_was_cut_short(tmp_path):
    for step in (2, 4, 6):
        save(tmp_path, step)
    (tmp_path / manifest_name(2)).unlink()
    (tmp_path / manifest_name(6)).unlink()
    assert predates_manifests(tmp_path, 2) and not predates_manifests(tmp_path, 6)
    assert problem_of(tmp_path, 2) == ""
    assert problem_of(tmp_path, 6) == "it has no manifest: its save was cut short"
    (tmp_path / "state000002.pt").unlink()
    assert problem_of(tmp_path, 2) == "state000002.pt is missing"


def test_steps_are_found_by_any_of_their_files(tmp_path):
    assert saved_steps(tmp_path / "gone") == set()
    for name in (
        "model000001.pt",
        "opt000002.pt",
        "state000003.pt",
        "manifest1000004.json",
        "model000005.pt.tmp",
        "manifest000006.pt",
        "opt000007.json",
        "ema_0.9_000008.pt",
        "model9.pt",
    ):
        (tmp_path / name).touch()
    assert saved_steps(tmp_path) == {1, 2, 3, 1_000_004}
    assert saved_steps(tmp_path, ["model"]) == {1}


# -- beside a weights file --------------------------------------------------------------------------------------------


def test_entry_and_config_of_a_weights_file(tmp_path):
    save(tmp_path, 4, facts={"config": {"lr": 1}})
    save(tmp_path, 6)
    for name in ("model000004.pt", "ema_0.99_000004.pt"):
        assert weights_entry(tmp_path / name) == read_manifest(tmp_path, 4)["files"][name]
        assert noted_config(tmp_path / name) == {"lr": 1}
    assert weights_entry(tmp_path / "ema_0.5_000004.pt") is None  # not listed
    for name in ("model000006.pt", "model000005.pt", "weights.pt", "anything"):
        assert noted_config(tmp_path / name) == {}
    assert weights_entry(tmp_path / "weights.pt") is None
    (tmp_path / manifest_name(4)).write_text("{}")
    for function in (weights_entry, noted_config):
        with pytest.raises(InputError, match="the manifest cannot be read"):
            function(tmp_path / "model000004.pt")


def test_damage_is_recognised_every_time(tmp_path):
    """A short run of the script `corruption.py`."""
    outcomes = run(Folder(tmp_path, small=True), 30, seed=0)
    assert not [key for key in outcomes if key[3].startswith("WRONG")]
    seen = {(attempt, outcome) for _, _, attempt, outcome in outcomes}
    assert {("resume", "fell back"), ("newest averages", "fell back"), ("named averages", "refused")} <= seen
