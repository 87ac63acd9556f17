"""A sampling run: files, rows, resuming, shares, sweeps, and what the link loses."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import as_arguments, train_into
from PIL import Image

from guided_diffusion import build_link
from guided_diffusion.console import InputError
from guided_diffusion.evaluation.run import _log_first_step
from guided_diffusion.link.message import SESSION, to_bytes

ROOT = Path(__file__).resolve().parent.parent
TIMES = {"seconds", "transmit_seconds"}
STEPS = {"use_ddim": False, "step_candidates": 8, "step_atoms": 2}


@pytest.fixture(scope="module")
def street(tmp_path_factory):
    """Five validation scenes, 32x64."""
    from guided_diffusion.data.toy_scenes import write_toy_scenes

    folder = tmp_path_factory.mktemp("shares") / "scenes"
    write_toy_scenes(str(folder), train=0, val=5, height=32, width=64, seed=3, progress=False)
    return folder


@pytest.fixture(scope="module")
def layered(scenes, tmp_path_factory):
    """The checkpoint folder of a network with a colour layer."""
    return train_into(tmp_path_factory.mktemp("layered"), scenes, color_layer=True)


def table(folder, without=()):
    with open(folder / "results.csv", newline="") as f:
        return [{name: value for name, value in row.items() if name not in without} for row in csv.DictReader(f)]


def column(folder, name):
    return [row[name] for row in table(folder)]


def pixels(folder):
    return {path.name: np.asarray(Image.open(path)).astype(int) for path in folder.iterdir()}


def stamps(folder):
    return {path.name: path.stat().st_mtime_ns for path in (folder / "samples").iterdir()}


def summary(folder):
    found = json.loads((folder / "summary.json").read_text())
    return found | {"mean": {name: value for name, value in found["mean"].items() if name not in TIMES}}


def contents(folder):
    """Every picture, message and table of codecs, as bytes."""
    paths = [path for path in folder.rglob("*") if path.suffix in (".png", ".dgo", ".tmp")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def assert_equal(ours, theirs):
    """Two folders hold the same, but for the times that it took."""
    assert table(ours, TIMES) == table(theirs, TIMES) and contents(ours) == contents(theirs)
    assert all(sorted(os.listdir(ours / k)) == sorted(os.listdir(theirs / k)) for k in (".", "rows"))
    if (theirs / "summary.json").exists():
        assert summary(ours) == summary(theirs)


def test_run_writes_every_picture_and_its_row(sample, tmp_path):
    logged = sample("out", snr=10, pool="med", batch_size=2, local_picture=True)
    folder = tmp_path / "out"
    assert len(table(folder)) == 3
    for row in table(folder):
        assert row["steps"] == "3" and row["snr_db"] == "10" and 0 <= int(row["bank_index"]) < 16
        assert float(row["seconds"]) > 0 and float(row["psnr_db"]) > 0 and 0 < float(row["mismatch_db"]) < 100
        for kind in ("images", "labels", "received", "samples"):
            with Image.open(folder / kind / f"{row['name']}.png") as picture:
                assert picture.size == (32, 16) and picture.mode == ("P" if kind == "labels" else "RGB")
    with Image.open(folder / "panel.png") as panel:
        assert panel.width > 4 * 32 and panel.height > 3 * 16
    assert logged[-1].startswith("3 pictures; report.html") and any("PSNR" in line for line in logged)


@pytest.mark.parametrize("flags", [{"s": 2, "use_ddim": True}, {"selection": "per_step", **STEPS}])
def test_run_with_a_colour_layer_is_the_same_at_both_ends(sample, receive, layered, tmp_path, flags):
    flags = flags | {"model_path": layered, "color_layer": True, "color_step": 152}
    sample("here", link="ideal", local_picture="selection" not in flags, **flags)
    assert column(tmp_path / "here", "mismatch_db") == ["inf"] * 3
    sizes = [[int(row[f"bits_{part}"]) for part in ("color", "total")] for row in table(tmp_path / "here")]
    assert all(48 < color < total for color, total in sizes)
    sample("sent", role="transmit", **flags)
    receive(model_path=layered, color_layer=True)
    bad = next((tmp_path / "sent" / "messages").glob("toytown*"))
    bad.write_bytes(to_bytes({"all": bad.read_bytes()[:-8] + b"\xff" * 6}))  # its CRC is right
    damaged = f"{bad}: its color part is damaged; send it again"
    assert receive(folder="damaged", model_path=layered, color_layer=True)[-1] == damaged
    for name in ("picture_sha256", "bits_color", "bits_total"):
        assert column(tmp_path / "received", name) == column(tmp_path / "sent", name)
    assert column(tmp_path / "here", "picture_sha256") == column(tmp_path / "sent", "picture_sha256")


def test_run_with_a_colour_layer_over_lossy_channels(sample, layered, tmp_path):
    flags = {"model_path": layered, "color_layer": True, "color_step": 152, "use_ddim": True}
    sample("analog", snr=5, pool="med", **flags)
    sample("grey", snr=5, pool="med", **{**flags, "color_step": 255})
    assert all(row["bits_color"] != "0" for row in table(tmp_path / "analog"))
    sample("color", snr=5, send="color", **flags)
    row = table(tmp_path / "color")[0]
    assert (row["channel_uses"], row["bits_labels"]) == ("0", "0") and float(row["psnr_db"]) > 0
    sample("digital", link="digital", snr=2, **flags)
    lost = [row["problems"].split() for row in table(tmp_path / "digital")]
    assert any("color" in names for names in lost) and column(tmp_path / "digital", "steps")[0]
    first, second = (pixels(tmp_path / name / "samples") for name in ("analog", "grey"))
    assert all(np.abs(first[name] - second[name]).mean() > 2 for name in first)  # the network's input is not the same


def test_run_with_fresh_noise_has_no_index(sample, tmp_path):
    sample("out", noise_bank_size=0, snr=10)
    for row in table(tmp_path / "out"):
        assert (row["bank_index"], row["bits_indices"], row["bits_total"]) == ("", "0", row["bits_labels"])
    assert "shared_once_bytes" not in summary(tmp_path / "out") and not (tmp_path / "out" / "messages").exists()


@pytest.mark.parametrize("flags", [{"use_ddim": True, "eta": 0.7, "s": 2}, {"sampler": "dpm++", "noise_bank_size": 0}])
def test_run_of_a_picture_does_not_depend_on_its_batch(sample, tmp_path, flags):
    for size in (1, 3):
        sample(str(size), batch_size=size, snr=10, **flags)
    one, three = pixels(tmp_path / "1" / "samples"), pixels(tmp_path / "3" / "samples")
    assert one.keys() == three.keys() and len(one) == 3
    assert all(np.abs(one[name] - three[name]).max() <= 1 for name in one)  # a rounding of 8-bit pixels


@pytest.mark.parametrize("flags", [{"selection": "per_step"}, {"selection": "both", "candidates": 2}])
def test_run_selects_steps_whatever_the_batch(sample, tmp_path, flags):
    for size in (1, 2):
        sample(str(size), batch_size=size, link="ideal", **STEPS, **flags)
    assert column(tmp_path / "1", "mismatch_db") == ["inf"] * 3
    assert all(float(value) > 60 for value in column(tmp_path / "2", "mismatch_db"))
    assert pixels(tmp_path / "1" / "local").keys() == pixels(tmp_path / "2" / "local").keys()
    for path in (tmp_path / "1" / "messages").iterdir():
        assert path.read_bytes() == (tmp_path / "2" / "messages" / path.name).read_bytes()


def test_run_takes_one_index_for_all_or_one_each(sample, tmp_path):
    sample("a", noise_index=5)
    sample("b")
    assert {*column(tmp_path / "a", "bank_index")} == {"5"} and len({*column(tmp_path / "b", "bank_index")}) > 1


def test_run_on_labels_alone(sample, scenes, tmp_path):
    shutil.copytree(scenes / "gtFine", tmp_path / "labels" / "gtFine")
    sample("out", data_dir=tmp_path / "labels")
    assert column(tmp_path / "out", "psnr_db") == [""] * 3 and not (tmp_path / "out" / "images").exists()
    with pytest.raises(InputError, match="noise selection compares with the picture"):
        sample("best", data_dir=tmp_path / "labels", noise_index="best", candidates=2)


def test_run_with_a_further_picture_changes_nothing_for_the_others(sample, scenes, tmp_path):
    folder = tmp_path / "more"
    shutil.copytree(scenes, folder)
    sample("before", data_dir=folder, snr=10, batch_size=1)
    for path in sorted(folder.rglob("val/*/toytown_000000*.png")):
        shutil.copy(path, path.with_name(path.name.replace("000000_000000", "000000_000001")))
    sample("after", data_dir=folder, snr=10, batch_size=1)
    before, after = column(tmp_path / "before", "picture_sha256"), column(tmp_path / "after", "picture_sha256")
    assert len(after) == 4 and {*before} < {*after}


def test_run_refuses_a_batch_of_several_sizes(sample, scenes, tmp_path):
    folder = tmp_path / "sizes"
    shutil.copytree(scenes, folder)
    for path in folder.rglob("val/*/toytown_000001*.png"):
        Image.open(path).crop((0, 0, 32, 32)).save(path)
    with pytest.raises(InputError, match=r"pictures 1 to 2 differ in size; use --batch_size 1"):
        sample("out", data_dir=folder, batch_size=2)


def test_run_goes_on_with_what_is_missing(sample, tmp_path, monkeypatch, capsys):
    sample("straight")
    folder = tmp_path / "broken"
    sample("broken", num_samples=1)
    before = stamps(folder)
    monkeypatch.chdir(tmp_path)
    sample("broken", results_path="./broken")
    assert "1 of 3 pictures are done already" in capsys.readouterr().err
    for kind in ("samples", "rows"):
        lost = sorted((folder / kind).iterdir())[-1]
        lost.unlink()
        sample("broken", num_samples=3)
        assert lost.exists()
    after = stamps(folder)
    assert {name: after[name] for name in before} == before
    assert_equal(folder, tmp_path / "straight")
    sample("broken", num_samples=1)  # fewer pictures the next time lose no rows
    assert len(table(folder)) == 3


def test_run_measures_metrics_added_later_from_the_files(sample, tmp_path):
    sample("both", metrics="psnr,ssim")
    sample("out", metrics="psnr")
    before = stamps(tmp_path / "out")
    assert column(tmp_path / "out", "ssim") == [""] * 3
    sample("out", metrics="psnr,ssim")
    assert stamps(tmp_path / "out") == before
    assert_equal(tmp_path / "out", tmp_path / "both")


@pytest.mark.parametrize(
    "flags, order",
    [
        ({"noise_bank_size": 0, "batch_size": 2}, [2, 0, 1]),
        ({"link": "ideal", "edge_levels": 2, "baseline": "jpeg"}, [1, 0]),
        ({"role": "transmit", "selection": "per_step", **STEPS}, [1, 2, 0]),
        ({"num_samples": 2}, [3, 1, 0]),  # more shares than pictures
    ],
)
def test_shares_leave_what_one_run_leaves(sample, street, tmp_path, flags, order):
    flags = {"data_dir": street, **flags}
    sample("alone", **flags)
    for index in order:
        assert not (tmp_path / "shared" / "results.csv").exists()
        logged = sample("shared", (index, max(order) + 1), **flags)
        last = any("joining their rows" in line for line in logged)
        assert last == (index == order[-1]) or "num_samples" in flags
    assert_equal(tmp_path / "shared", tmp_path / "alone")


@pytest.mark.parametrize("rest", [[(0, 1)], [(1, 2), (0, 2)]])
def test_shares_go_on_in_another_number(sample, street, tmp_path, rest):
    flags, folder = {"data_dir": street, "snr": 5, "batch_size": 1}, tmp_path / "broken"
    sample("alone", **flags)
    for index in (1, 0):
        sample("broken", (index, 3), **flags)
    sorted((folder / "rows").iterdir())[0].unlink()  # as if it had been killed at this picture
    before = stamps(folder)
    for share in rest:
        sample("broken", share, **flags)
    changed = [name for name, stamp in stamps(folder).items() if before.get(name) not in (None, stamp)]
    assert len(before) == 4 and len(changed) == 1
    assert_equal(folder, tmp_path / "alone")


def test_shares_sum_up_again_where_one_died_of_it(sample, tmp_path):
    sample("alone")
    for index in (0, 1):
        sample("out", (index, 2))
    for name in ("results.csv", "summary.json", "panel.png", "report.html"):
        (tmp_path / "out" / name).unlink()
    sample("out", (1, 2))
    assert_equal(tmp_path / "out", tmp_path / "alone")


def test_sweep_has_a_folder_for_each_point_and_curves(sample, tmp_path, capsys):
    _log_first_step.cache_clear()
    flags = {"snr": "30,5", "pool": "None,med", "link": "analog,ideal", "num_samples": 2}
    sample("alone", **flags)
    said = capsys.readouterr().err
    assert said.count("first reverse step after") == 1
    assert said.count("steps left of the chain") <= 5  # no terminal: where each bar ends
    folders = {"analog_30dB", "analog_5dB", "analog_med_30dB", "analog_med_5dB", "ideal"}
    assert {path.name for path in (tmp_path / "alone").iterdir() if path.is_dir()} == folders
    lines = (tmp_path / "alone" / "curves.csv").read_text().splitlines()
    assert len(lines) == 6 and lines[0].startswith("line,snr_db,psnr_db")
    sample("shared", (1, 2), **flags)
    assert not [*(tmp_path / "shared").rglob("summary.json")]
    assert "report.html" in sample("shared", (0, 2), **flags)[-1] and (tmp_path / "shared" / "report.html").exists()
    assert (tmp_path / "shared" / "curves.csv").read_bytes() == (tmp_path / "alone" / "curves.csv").read_bytes()
    for name in folders:
        assert_equal(tmp_path / "shared" / name, tmp_path / "alone" / name)


@pytest.mark.parametrize("flags", [{"edge_levels": 2}, {"selection": "both", "candidates": 2, **STEPS}])
def test_transmit_counts_the_bits_of_the_messages_it_writes(sample, tmp_path, flags):
    logged = sample("out", role="transmit", **flags)
    session = (tmp_path / "out" / "messages" / SESSION).stat().st_size
    assert f"session: {session} bytes, once for all messages" in logged
    assert summary(tmp_path / "out")["shared_once_bytes"]["session"] == session
    for row in table(tmp_path / "out"):
        assert int(row["bits_header"]) <= 80
        bits = {part: int(row[f"bits_{part}"]) for part in ("header", "labels", "edges", "indices", "total")}
        assert (tmp_path / "out" / "messages" / f"{row['name']}.dgo").stat().st_size * 8 == bits["total"]
        assert sum(bits.values()) == 2 * bits["total"]
        assert float(row["bpp"]) == pytest.approx(bits["total"] / 512, abs=1e-4)
        assert (tmp_path / "out" / "local" / f"{row['name']}.png").exists() and row["psnr_db"] and not row["snr_db"]
    assert not (tmp_path / "out" / "samples").exists() and summary(tmp_path / "out")["pictures"] == 3


def test_transmit_refuses_a_folder_of_another_session(sample, tmp_path):
    sample("out", role="transmit", num_samples=1)
    path = tmp_path / "out" / "messages" / SESSION
    path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(InputError, match=r"session\.dgo is of another precision .*; choose another --results_path"):
        sample("out", role="transmit")


def test_link_conceals_what_is_lost(sample, tmp_path, monkeypatch):
    lost = [("labels",), ("header",), ("edges",)]

    class Losing:
        """A channel that loses parts: it knows a picture by its stream, and the first run has all."""

        seeds = {}  # noqa: RUF012

        def __call__(self, sent, receiver, stream):
            gone = lost[self.seeds.setdefault(stream.initial_seed(), len(self.seeds))]
            parts = {name: None if name in gone else part for name, part in sent.parts.items()}
            return receiver.accept(receiver.session.decode(parts)), {}

    monkeypatch.setattr(build_link, "channel", lambda point: Losing())
    flags = {"link": "digital", "edge_levels": 2, "stop_tol": 10, "stop_patience": 1}
    sample("alone", **flags)
    rows = table(tmp_path / "alone")
    assert [row["problems"] for row in rows] == [" ".join(parts) for parts in lost]
    assert (pixels(tmp_path / "alone" / "samples")[f"{rows[1]['name']}.png"] == 128).all() and not rows[1]["bank_index"]
    assert not rows[1]["steps"] and all(float(row["psnr_db"]) > 0 for row in rows)


def test_digital_link_loses_the_same_in_any_shares_and_after_a_kill(sample, street, tmp_path):
    pytest.importorskip("sionna")
    flags = {"data_dir": street, "link": "digital", "snr": 5.8, "seed": 3, "edge_levels": 2, "fading": "rayleigh"}
    sample("alone", baseline="jpeg", **flags)
    assert any(column(tmp_path / "alone", "problems"))
    for index in (2, 0, 1):
        sample("shared", (index, 3), baseline="jpeg", **flags)
    assert_equal(tmp_path / "shared", tmp_path / "alone")
    sample("broken", num_samples=2, **flags)
    sample("broken", baseline="jpeg", **flags)
    assert_equal(tmp_path / "broken", tmp_path / "alone")


def script(**flags):
    return [sys.executable, str(ROOT / "image_sample.py"), *as_arguments(flags)]


@pytest.mark.slow
def test_shares_of_an_array_run_at_once_and_survive_kills(sample, street, trained, tmp_path):
    flags = {"data_dir": street, "snr": 5, "timestep_respacing": 2, "use_ddim": True}
    sample("alone", **flags)
    command = script(**flags, model_path=trained, results_path=tmp_path / "shared", num_workers=0)
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "PMI", "OMPI", "RANK"))}
    array = {"MIN": 3, "MAX": 5, "COUNT": 2, "STEP": 2}
    plain |= {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in array.items()}

    def start():
        options = {"stderr": subprocess.PIPE, "text": True, "cwd": tmp_path}
        ids = [{**plain, "SLURM_ARRAY_TASK_ID": str(task)} for task in (3, 5)]
        return [subprocess.Popen(command, env=environment, **options) for environment in ids]

    for task in start():
        try:
            task.communicate(timeout=2.5)  # somewhere between the imports and the last picture
        except subprocess.TimeoutExpired:
            task.kill()
            task.communicate()
    tasks = start()
    logged = [task.communicate(timeout=200)[1] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], logged
    assert "share 1 of 2 of 5 pictures" in logged[0] and "share 2 of 2 of 5 pictures" in logged[1]
    assert_equal(tmp_path / "shared", tmp_path / "alone")
