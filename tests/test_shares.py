"""Sampling over several processes: each works off its share, the last puts the tables together, as if one had done all."""

import csv
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY, as_arguments

from guided_diffusion import build_link, prepare
from guided_diffusion.config import SampleConfig, parse_config
from guided_diffusion.evaluation import run as regenerate
from guided_diffusion.evaluation.receive import receive_all
from guided_diffusion.evaluation.results import is_last, share_out
from guided_diffusion.evaluation.run import Regeneration, run_points
from guided_diffusion.link.message import receive_parts
from guided_diffusion.training.distributed import Share

ROOT = Path(__file__).resolve().parent.parent
COUNT = 5
TIMES = {"seconds", "transmit_seconds"}


@pytest.fixture(scope="module")
def street(tmp_path_factory):
    """Five validation scenes, 32x64."""
    from guided_diffusion.data.toy_scenes import write_toy_scenes

    folder = tmp_path_factory.mktemp("shares") / "scenes"
    write_toy_scenes(str(folder), train=0, val=COUNT, height=32, width=64, seed=3, progress=False)
    return folder


@pytest.fixture
def sample(street, trained, tmp_path):
    """Function that runs one share of a sampling run into a folder; returns what was said."""

    def run(folder, share=(0, 1), **flags):
        flags = {
            "data_dir": street,
            "model_path": trained,
            "results_path": tmp_path / folder,
            **TINY,
            "timestep_respacing": "2",
            "use_ddim": True,
            **flags,
        }
        config, _ = parse_config(SampleConfig, "", as_arguments(flags))
        weights, said, receiving = prepare.find_weights(config.model_path), [], config.role == "receive"
        build_parts = build_link.receiving_parts if receiving else build_link.sampling_parts
        parts = build_parts(config, weights, lambda line: None)
        (receive_all if receiving else run_points)(config, weights, parts, said.append, Share(*share))
        return said

    return run


def table(path):
    with open(path, newline="") as f:
        return [{name: value for name, value in row.items() if name not in TIMES} for row in csv.DictReader(f)]


def summary(folder):
    found = json.loads((folder / "summary.json").read_text())
    return found | {"mean": {name: value for name, value in found["mean"].items() if name not in TIMES}}


def contents(folder):
    """Every file but the tables and the summary, as bytes."""
    names = ("results.csv", "summary.json", "settings.json", "curves.csv")
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in names
    }


def assert_equal(ours, theirs):
    """Two results folders hold the same, but for the times that it took and what the command line said."""
    assert table(ours / "results.csv") == table(theirs / "results.csv")
    mine, other = contents(ours), contents(theirs)
    assert mine.keys() == other.keys()
    assert [name for name in mine if mine[name] != other[name]] == []
    if (theirs / "summary.json").exists():
        assert summary(ours) == summary(theirs)


# -- who does what ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_batches_go_to_the_shares_in_turn(size):
    alone = [[*batch] for batch in share_out(11, size, Share())]
    assert [k for batch in alone for k in batch] == [*range(11)] and {*map(len, alone[:-1])} <= {size}
    for count in range(1, 14):
        shares = [[[*batch] for batch in share_out(11, size, Share(index, count))] for index in range(count)]
        in_turn = [batch for batches in itertools.zip_longest(*shares) for batch in batches if batch]
        assert in_turn == alone


@pytest.mark.parametrize(
    "flags, order",
    [
        ({"snr": 5}, [0, 1, 2]),
        ({"snr": 5, "batch_size": 2}, [2, 0, 1]),
        ({"noise_bank_size": 0, "batch_size": 2}, [1, 0]),
        ({"link": "ideal", "edge_levels": 2, "baseline": "jpeg"}, [1, 0]),
        (
            {"role": "transmit", "selection": "per_step", "step_candidates": 8, "step_atoms": 2, "use_ddim": False},
            [1, 2, 0],
        ),
        ({"num_samples": 2}, [3, 1, 0, 2]),  # more shares than pictures
    ],
)
def test_the_last_share_leaves_what_one_run_leaves(sample, tmp_path, flags, order):
    sample("alone", **flags)
    count = len(order)
    for index in order:
        said = sample("shared", (index, count), **flags)
        whole = (tmp_path / "shared" / "results.csv").exists()
        if whole:
            break
        assert f"share {index + 1} of {count} is done" in said[-1] and "the last share to end sums up" in said[-1]
    assert whole and (index == order[-1] or flags == {"num_samples": 2})
    assert (
        any("putting their tables together" in line for line in said) and not (tmp_path / "shared" / "shards").exists()
    )
    assert_equal(tmp_path / "shared", tmp_path / "alone")


def test_a_share_writes_its_own_rows_alone(sample, tmp_path):
    sample("out", (0, 2))
    sample("out", (0, 2))
    assert [path.name for path in (tmp_path / "out" / "shards").iterdir()] == ["results_0of2.csv"]
    assert len(table(tmp_path / "out" / "shards" / "results_0of2.csv")) == 3
    assert not (tmp_path / "out" / "results.csv").exists() and not (tmp_path / "out" / "summary.json").exists()
    sample("out", (1, 3))  # pictures 1 and 4, of which 4 is there
    assert len(table(tmp_path / "out" / "shards" / "results_1of3.csv")) == 1


def test_what_a_shares_table_held_stays_in_it(sample, tmp_path):
    sample("out", (1, 2), batch_size=1)
    sample("out", (1, 2), batch_size=2)  # other pictures are its own now
    rows = table(tmp_path / "out" / "shards" / "results_1of2.csv")
    assert [int(row["path"].split("_")[-3]) for row in rows] == [1, 2, 3]


# -- going on ---------------------------------------------------------------------------------------------------------


def stamps(folder):
    return {path.name: path.stat().st_mtime_ns for path in (folder / "samples").iterdir()}


@pytest.mark.parametrize("rest", [[(0, 1)], [(1, 2), (0, 2)], [(0, 3), (1, 3), (2, 3)]])
def test_another_number_of_shares_goes_on(sample, tmp_path, monkeypatch, rest):
    sample("alone", snr=5)
    sample("broken", (1, 3), snr=5)
    with monkeypatch.context() as patch:
        made = []

        def killed(self, *arguments):
            if made:
                raise KeyboardInterrupt
            made.append(write(self, *arguments))

        write = Regeneration._write_pictures
        patch.setattr(Regeneration, "_write_pictures", killed)
        with pytest.raises(KeyboardInterrupt):
            sample("broken", (0, 3), snr=5)
    before = stamps(tmp_path / "broken")
    assert len(before) == 3
    for share in rest:
        said = sample("broken", share, snr=5)
    assert any(f"{COUNT} pictures" in line for line in said)
    after = stamps(tmp_path / "broken")
    assert {name: after[name] for name in before} == before and len(after) == COUNT
    assert_equal(tmp_path / "broken", tmp_path / "alone")


def test_a_picture_that_is_gone_is_made_again_by_its_share(sample, tmp_path):
    sample("alone")
    for index in (0, 1):
        sample("out", (index, 2))
    path = sorted((tmp_path / "out" / "samples").iterdir())[3]
    path.unlink()
    assert "the last share to end sums up" in sample("out", (0, 2))[-1] and not path.exists()
    assert any("putting" in line for line in sample("out", (1, 2)))
    assert_equal(tmp_path / "out", tmp_path / "alone")


def test_a_share_that_dies_while_it_sums_up_does_so_the_next_time(sample, tmp_path, monkeypatch):
    sample("alone")
    sample("out", (0, 2))
    with monkeypatch.context() as patch:
        patch.setattr(Regeneration, "_write_panel", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            sample("out", (1, 2))
    assert (tmp_path / "out" / "results.csv").exists()
    sample("out", (1, 2))
    assert_equal(tmp_path / "out", tmp_path / "alone")


def test_what_is_summed_up_already_is_summed_up_by_the_first_alone(sample, tmp_path):
    for index in (0, 1):
        sample("out", (index, 2))
    (tmp_path / "out" / "panel.png").unlink()
    assert "the results of all shares are in" in sample("out", (1, 2))[-1]
    assert not (tmp_path / "out" / "panel.png").exists()
    sample("out", (0, 2))
    assert (tmp_path / "out" / "panel.png").exists()


def test_two_that_end_at_the_same_moment_both_sum_up(sample, tmp_path, monkeypatch):
    sample("alone")
    sample("out", (1, 2))
    others = [(1, 2)]

    def overtaken(*arguments):
        """The other share sums up, and is through, after this one has found that it is to do so."""
        last = is_last(*arguments)
        if last and others:
            sample("out", others.pop())
            assert (tmp_path / "out" / "panel.png").exists() and not (tmp_path / "out" / "shards").exists()
        return last

    monkeypatch.setattr(regenerate, "is_last", overtaken)
    sample("out", (0, 2))
    assert not others
    assert_equal(tmp_path / "out", tmp_path / "alone")


# -- several points, and the link -------------------------------------------------------------------------------------


def test_the_curves_come_once_from_the_last(sample, tmp_path):
    flags = {"snr": "30,5", "pool": "None,med", "num_samples": 3}
    sample("alone", **flags)
    said = sample("shared", (1, 2), **flags)
    assert "share 2 of 2 is done (4 pictures)" in said[-1]
    assert not list((tmp_path / "shared").rglob("summary.json")) and not (tmp_path / "shared" / "curves.csv").exists()
    assert "curves.csv" in sample("shared", (0, 2), **flags)[-1]
    assert (tmp_path / "shared" / "curves.csv").read_bytes() == (tmp_path / "alone" / "curves.csv").read_bytes()
    points = [path.name for path in (tmp_path / "alone").iterdir() if path.is_dir()]
    assert len(points) == 4
    for point in points:
        assert_equal(tmp_path / "shared" / point, tmp_path / "alone" / point)


def losing(lost):
    """A crossing that loses the parts `lost[k]` of picture k: it knows a picture by its stream, and the first run has all."""
    seeds = {}

    class Losing:
        def cross(self, sent, receiver, stream):
            gone = lost[seeds.setdefault(stream.initial_seed(), len(seeds))]
            parts = {name: None if name in gone else part for name, part in sent.message.parts().items()}
            return receiver.accept(receive_parts(parts)), {}

    return Losing()


@pytest.mark.parametrize("stop", [0, 10])
@pytest.mark.parametrize(
    "lost",
    [
        [(), ("labels",), ("header",), ("labels",), ("header",)],
        [("header",), ("labels",), (), ("header",), ("labels",)],
        [("labels",), ("header",), ("header",), ("header",), ("labels",)],
    ],
)
def test_what_the_channel_loses_is_replaced_as_in_one_run(sample, tmp_path, monkeypatch, lost, stop):
    crossing = losing(lost)
    monkeypatch.setattr(build_link, "crossing", lambda point: crossing)
    flags = {"link": "digital", "edge_levels": 2, "stop_tol": stop, "stop_patience": 1}
    sample("alone", **flags)
    assert [row["problems"] for row in table(tmp_path / "alone" / "results.csv")] == [" ".join(parts) for parts in lost]
    for index in (2, 1, 0):
        sample("shared", (index, 3), **flags)
    assert_equal(tmp_path / "shared", tmp_path / "alone")


@pytest.mark.parametrize("snr", [2, 5.8])
def test_a_noisy_digital_link_loses_the_same_on_any_number_of_shares(sample, tmp_path, snr):
    pytest.importorskip("sionna")
    flags = {"link": "digital", "snr": snr, "seed": 3, "edge_levels": 2, "fading": "rayleigh"}
    sample("alone", **flags)
    assert any(row["problems"] for row in table(tmp_path / "alone" / "results.csv"))
    for index in (2, 0, 1):
        sample("shared", (index, 3), **flags)
    assert_equal(tmp_path / "shared", tmp_path / "alone")


def test_messages_are_received_in_shares(sample, tmp_path):
    sample("sent", role="transmit")
    flags = {"role": "receive", "messages": tmp_path / "sent" / "messages"}
    sample("alone", **flags)
    sample("shared", (2, 3), **flags)
    assert len(table(tmp_path / "shared" / "shards" / "results_2of3.csv")) == 1
    sample("shared", (0, 3), **flags)
    assert not (tmp_path / "shared" / "panel.png").exists()
    assert any("putting" in line for line in sample("shared", (1, 3), **flags))
    assert not (tmp_path / "shared" / "shards").exists()
    assert_equal(tmp_path / "shared", tmp_path / "alone")


# -- real processes ---------------------------------------------------------------------------------------------------


def test_two_tasks_of_an_array_at_once(sample, street, trained, tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the tasks: pictures are equal to the bit
    sample("alone", snr=5)
    torch.set_num_threads(threads)
    flags = {
        "data_dir": street,
        "model_path": trained,
        "results_path": tmp_path / "shared",
        "snr": 5,
        "num_workers": 0,
        "timestep_respacing": 2,
        "use_ddim": True,
    }
    command = [sys.executable, str(ROOT / "image_sample.py"), *as_arguments(flags)]
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "PMI", "OMPI", "RANK"))}
    tasks = [
        subprocess.Popen(
            command,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            env={
                **plain,
                "OMP_NUM_THREADS": "1",
                "SLURM_ARRAY_TASK_ID": str(task),
                "SLURM_ARRAY_TASK_MIN": "3",
                "SLURM_ARRAY_TASK_MAX": "5",
                "SLURM_ARRAY_TASK_COUNT": "2",
            },
        )
        for task in (3, 5)
    ]
    said = [task.communicate(timeout=200)[1] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], said
    assert "share 1 of 2 of 5 pictures" in said[0] and "share 2 of 2 of 5 pictures" in said[1]
    assert any("putting their tables together" in text for text in said)
    assert not (tmp_path / "shared" / "shards").exists()
    assert_equal(tmp_path / "shared", tmp_path / "alone")
