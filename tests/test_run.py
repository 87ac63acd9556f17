"""A sampling run: files, resuming, independence from batches, labels alone."""

import csv
import json
import shutil

import numpy as np
import pytest
from conftest import TINY, as_arguments
from PIL import Image

from guided_diffusion import build_link, prepare
from guided_diffusion.config import SampleConfig, parse_config, points
from guided_diffusion.console import InputError, StartUp
from guided_diffusion.evaluation.run import Regeneration, run_points
from guided_diffusion.link.message import receive_parts

KINDS = ("images", "labels", "received", "samples")


@pytest.fixture
def make_run(scenes, trained, tmp_path):
    def make(folder="results", **flags):
        flags = {
            "data_dir": scenes,
            "model_path": trained,
            "results_path": tmp_path / folder,
            **TINY,
            "timestep_respacing": "3",
            "use_ddim": True,
            **flags,
        }
        config, _ = parse_config(SampleConfig, "", as_arguments(flags))
        weights = prepare.find_weights(config.model_path)
        parts = build_link.sampling_parts(config, weights, log=lambda line: None)
        return Regeneration(points(config)[0], weights, parts)

    return make


def samples(folder):
    return {path.name: np.asarray(Image.open(path)).astype(int) for path in (folder / "samples").iterdir()}


def test_every_picture_gets_its_files_and_its_row(make_run, tmp_path):
    run = make_run(snr=10, pool="med", batch_size=2)
    rows = run.run()
    run.sum_up(rows)
    folder = tmp_path / "results"
    with open(folder / "results.csv") as f:
        table = list(csv.DictReader(f))
    assert [row["name"] for row in table] == run.names and len(rows) == 3
    for row in table:
        assert row["steps"] == "3" and row["snr_db"] == "10" and 0 <= int(row["bank_index"]) < 16
        assert float(row["seconds"]) > 0 and float(row["psnr_db"]) > 0
        for kind in KINDS:
            with Image.open(folder / kind / f"{row['name']}.png") as picture:
                assert picture.size == (32, 16)
    with Image.open(folder / "panel.png") as panel:
        assert panel.width > 4 * 32 and panel.height > 3 * 16
    assert "3 pictures" in run.summary(rows)[-1] and any("PSNR" in line for line in run.summary(rows))
    assert not list(folder.rglob("*.tmp"))


def test_saved_labels_are_the_ids(make_run, tmp_path):
    run = make_run(num_samples=1)
    run.run()
    with Image.open(tmp_path / "results" / "labels" / f"{run.names[0]}.png") as picture:
        assert picture.mode == "P"
        np.testing.assert_array_equal(np.asarray(picture), run.dataset[0]["label"][0].numpy())


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"use_ddim": False},
        {"eta": 0.7},
        {"s": 2},
        {"noise_bank_size": 0},
        {"use_ddim": False, "sampler": "dpm++", "noise_bank_size": 0},
    ],
)
def test_a_picture_does_not_depend_on_its_batch(make_run, tmp_path, flags):
    flags = {"snr": 10, **flags}
    make_run("one", batch_size=1, **flags).run()
    make_run("three", batch_size=3, **flags).run()
    one, three = samples(tmp_path / "one"), samples(tmp_path / "three")
    assert one.keys() == three.keys()
    for name in one:
        assert np.abs(one[name] - three[name]).max() <= 1  # a rounding of 8-bit pixels


def test_an_interrupted_run_goes_on_where_it_stopped(make_run, tmp_path):
    make_run("straight").run()
    make_run("broken", num_samples=1).run()
    first = next((tmp_path / "broken" / "samples").iterdir())
    stamp = first.stat().st_mtime_ns
    rows = make_run("broken").run()
    assert len(rows) == 3 and first.stat().st_mtime_ns == stamp
    for name, picture in samples(tmp_path / "straight").items():
        np.testing.assert_array_equal(picture, samples(tmp_path / "broken")[name])


def test_a_lost_picture_is_made_again(make_run, tmp_path):
    run = make_run()
    run.run()
    lost = tmp_path / "results" / "samples" / f"{run.names[1]}.png"
    lost.unlink()
    make_run().run()
    assert lost.exists()


def test_other_settings_in_the_same_folder_are_refused(make_run, tmp_path):
    make_run(num_samples=1).run()
    with pytest.raises(InputError, match=r"snr 100\.0, now 10\.0"):
        make_run(snr=10).run()
    assert len(samples(tmp_path / "results")) == 1


def test_early_stop_is_reported(make_run):
    rows = make_run(stop_tol=10, stop_patience=1, timestep_respacing="6").run()
    assert [row["steps"] for row in rows] == [2, 2, 2]


def test_one_index_for_all_or_one_each(make_run):
    assert {row["bank_index"] for row in make_run("a", noise_index=5).run()} == {5}
    assert len({row["bank_index"] for row in make_run("b").run()}) > 1
    for index in ("16", "-1", "worst"):
        with pytest.raises(InputError, match=f"--noise_index {index}"):
            make_run("c", noise_index=index)


def test_the_same_folder_by_another_name_goes_on(make_run, tmp_path, monkeypatch):
    make_run(num_samples=1).run()
    monkeypatch.chdir(tmp_path)
    assert len(make_run(results_path="./results").run()) == 3


def test_fewer_pictures_the_next_time_lose_no_rows(make_run, tmp_path):
    run = make_run()
    run.run()
    make_run(num_samples=1).run()
    assert (tmp_path / "results" / "results.csv").read_text().count("\n") == 4


def test_a_further_picture_changes_nothing_for_the_others(make_run, scenes, tmp_path):
    folder = tmp_path / "more"
    shutil.copytree(scenes, folder)
    make_run("before", data_dir=folder, snr=10).run()
    for path in sorted(folder.rglob("val/*/toytown_000000*.png")):
        shutil.copy(path, path.with_name(path.name.replace("000000_000000", "000000_000001")))
    make_run("after", data_dir=folder, snr=10).run()
    before, after = samples(tmp_path / "before"), samples(tmp_path / "after")
    assert len(after) == 4
    for name, picture in before.items():
        assert np.abs(picture - after[name]).max() <= 1


@pytest.mark.parametrize("contents", ["[]", "{"])
def test_a_broken_settings_file_is_named(make_run, tmp_path, contents):
    make_run(num_samples=1).run()
    (tmp_path / "results" / "settings.json").write_text(contents)
    with pytest.raises(InputError, match=r"settings\.json"):
        make_run().run()


def test_labels_alone_are_enough(make_run, scenes, tmp_path):
    shutil.copytree(scenes / "gtFine", tmp_path / "labels_only" / "gtFine")
    run = make_run(data_dir=tmp_path / "labels_only")
    rows = run.run()
    assert len(rows) == 3 and not any(row.get("psnr_db") for row in rows)
    assert not (tmp_path / "results" / "images").exists()
    assert len(samples(tmp_path / "results")) == 3


# -- the link ---------------------------------------------------------------------------------------------------------


def table(folder):
    with open(folder / "results.csv", newline="") as f:
        return list(csv.DictReader(f))


@pytest.mark.parametrize("flags", [{}, {"edge_levels": 2}, {"use_ddim": False, "selection": "both", "candidates": 2}])
def test_transmitting_writes_messages_of_the_size_that_is_counted(make_run, tmp_path, flags):
    run = make_run(role="transmit", **flags)
    rows = run.run()
    summary = run.sum_up(rows)
    for row in table(tmp_path / "results"):
        bits = {part: int(row[f"bits_{part}"]) for part in ("header", "labels", "edges", "indices", "total")}
        assert (tmp_path / "results" / "messages" / f"{row['name']}.dgo").stat().st_size * 8 == bits["total"]
        assert sum(bits.values()) == 2 * bits["total"] and float(row["bpp"]) == pytest.approx(
            bits["total"] / 512, abs=1e-4
        )
        assert (tmp_path / "results" / "local" / f"{row['name']}.png").exists() and row["psnr_db"] and not row["snr_db"]
    assert not (tmp_path / "results" / "samples").exists()
    assert summary == json.loads((tmp_path / "results" / "summary.json").read_text())
    assert summary["pictures"] == 3 and summary["mean"]["bits_total"] == np.mean([float(r["bits_total"]) for r in rows])


def test_the_mismatch_of_both_ends(make_run):
    ideal = make_run("ideal", link="ideal", local_picture=True).run()
    assert [row["mismatch_db"] for row in ideal] == ["inf"] * 3
    noisy = make_run("noisy", snr=5, local_picture=True).run()
    assert all(0 < float(row["mismatch_db"]) < 100 for row in noisy)
    assert not any(row.get("mismatch_db") for row in make_run("none").run())


@pytest.mark.parametrize("flags", [{"selection": "per_step"}, {"selection": "both", "candidates": 2}])
def test_selected_steps_do_not_depend_on_the_batch(make_run, tmp_path, flags):
    flags = {"use_ddim": False, "link": "ideal", "step_candidates": 8, "step_atoms": 2, **flags}
    one = make_run("one", batch_size=1, **flags).run()
    two = make_run("two", batch_size=2, **flags).run()
    assert [row["mismatch_db"] for row in one] == ["inf"] * 3
    assert all(float(row["mismatch_db"]) > 60 for row in two)
    for row in one:
        name = f"messages/{row['name']}.dgo"
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_several_points_make_curves(make_run, tmp_path):
    run = make_run()
    config, _ = parse_config(
        SampleConfig,
        "",
        as_arguments(
            {
                **TINY,
                "data_dir": run.config.data_dir,
                "model_path": run.weights,
                "results_path": tmp_path / "points",
                "timestep_respacing": "2",
                "link": "analog,ideal",
                "pool": "None,med",
                "snr": "30,5",
                "num_samples": 2,
            }
        ),
    )
    said = []
    parts = build_link.sampling_parts(config, run.weights, said.append)
    run_points(config, run.weights, parts, said.append)
    folders = {"analog_30dB", "analog_5dB", "analog_med_30dB", "analog_med_5dB", "ideal"}
    assert {path.name for path in (tmp_path / "points").iterdir() if path.is_dir()} == folders
    for folder in folders:
        assert (
            len(table(tmp_path / "points" / folder)) == 2 and (tmp_path / "points" / folder / "summary.json").exists()
        )
    lines = (tmp_path / "points" / "curves.csv").read_text().splitlines()
    assert len(lines) == 6 and lines[0].startswith("line,snr_db,psnr_db") and "curves.csv" in said[-1]


@pytest.mark.parametrize("snr", [2, 5.8])
def test_a_lossy_digital_run_goes_on_as_if_never_interrupted(make_run, tmp_path, snr):
    pytest.importorskip("sionna")
    flags = {"link": "digital", "snr": snr, "seed": 3, "edge_levels": 2, "fading": "rayleigh"}
    straight = make_run("straight", **flags).run()
    assert any(row["problems"] for row in straight)
    for count in (1, 2):
        make_run(f"broken{count}", num_samples=count, **flags).run()
        rows = make_run(f"broken{count}", **flags).run()
        assert [row["picture_sha256"] for row in rows] == [row["picture_sha256"] for row in straight]
        assert [row["problems"] for row in rows] == [row["problems"] for row in straight]


def without(*lost):
    """A crossing that loses the parts `lost[number of the call]`."""
    calls = iter(lost)

    class Losing:
        def cross(self, sent, receiver, stream):
            gone = next(calls)
            parts = {name: None if name in gone else part for name, part in sent.message.parts().items()}
            return receiver.accept(receive_parts(parts)), {}

    return Losing()


@pytest.mark.parametrize(
    "lost", [((), ("labels",), ("header",)), (("edges",), ("labels",), ("labels",)), (("header",), (), ("header",))]
)
@pytest.mark.parametrize("hole", [1, 2])
def test_a_receiver_that_goes_on_has_the_last_good_label_map(make_run, monkeypatch, lost, hole):
    monkeypatch.setattr(build_link, "crossing", lambda point: without(*pending))
    flags = {"link": "digital", "edge_levels": 2}
    pending = lost
    run = make_run(**flags)
    straight = run.run()
    assert [row["problems"] for row in straight] == [" ".join(parts) for parts in lost]
    run.results.file("samples", run.names[hole]).unlink()
    pending = lost[hole:]
    again = make_run(**flags).run()
    assert [row["picture_sha256"] for row in again] == [row["picture_sha256"] for row in straight]


def test_a_lost_header_of_another_size_leaves_no_picture(make_run, scenes, monkeypatch, tmp_path):
    folder = tmp_path / "sizes"
    shutil.copytree(scenes, folder)
    for path in sorted(folder.rglob("val/*/toytown_00000[12]*.png")):
        Image.open(path).crop((0, 0, 32, 32)).save(path)
    monkeypatch.setattr(build_link, "crossing", lambda point: without((), ("header",), ()))
    rows = make_run(data_dir=folder, link="digital").run()
    assert [row["problems"] for row in rows] == ["", "header", ""] and not rows[1].get("steps")


def test_the_first_reverse_step_is_told_once(make_run, capsys):
    run = make_run(num_samples=2)
    run.start = StartUp()
    run.run()
    told = [
        line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if "first reverse step after" in line
    ]
    assert len(told) == 1 and "noise bank" in told[0]
    assert run.bank.seconds > 0  # of the bank that the chain draws from, which is this one
