"""Several processes against one, with real launchers; what happens to all of them when one fails."""

import csv
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import TINY, TRAIN, as_arguments

SCRIPT = str(Path(__file__).resolve().parent.parent / "image_train.py")
FLAGS = {
    **TINY,
    **TRAIN,
    "lr": 1e-4,
    "total_steps": 30,
    "save_interval": 15,
    "eval_interval": 10,
    "eval_items": 3,
    "log_interval": 4,
    "preview_items": 1,
    "preview_steps": 2,
    "schedule_sampler": "loss-second-moment",
    "diffusion_steps": 2,
}
ALONE = {
    name: value
    for name, value in os.environ.items()
    if not name.startswith(("SLURM_", "PMI_", "OMPI_")) and name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
}
ENVIRONMENT = {**ALONE, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
TORCHRUN = [
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--nproc_per_node",
    "2",
    "--rdzv_backend",
    "c10d",
    "--rdzv_endpoint",
    "localhost:0",
]


def train(launcher, folder, scenes, **changes):
    """Train in real processes; return what they said."""
    command = [*launcher, SCRIPT, *as_arguments({"data_dir": scenes, "checkpoint_dir": folder, **FLAGS, **changes})]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def alone(scenes, tmp_path_factory):
    """A run of one process with batches of four."""
    folder = tmp_path_factory.mktemp("alone")
    said = train([sys.executable], folder, scenes, batch_size=4)
    assert "global batch 4 = 2 × 1 process × 2 accumulated" in said
    return folder


def rows(folder):
    with open(folder / "progress.csv") as f:
        return list(csv.DictReader(f))


def assert_same_training(folder, other, tolerance):
    """Losses within 1e-5 relative, scores alike, weights within a tolerance."""
    assert [row["step"] for row in rows(folder)] == [row["step"] for row in rows(other)]
    for one, two in zip(rows(folder), rows(other), strict=True):
        assert float(one["loss"]) == pytest.approx(float(two["loss"]), rel=1e-5)
        assert one["images"] == two["images"]
        if one["val_score"]:
            assert float(one["val_score"]) == pytest.approx(float(two["val_score"]), rel=1e-5)
    for name in ("model000030.pt", "ema_0.9_000030.pt"):
        one, two = (torch.load(where / name, weights_only=True) for where in (folder, other))
        assert list(one) == list(two)
        for key in one:
            torch.testing.assert_close(one[key], two[key], atol=tolerance, rtol=0, msg=f"{name} {key}")


def assert_nearly_same_training(folder, other):
    """The same but for the rounding of sums, which Adam blows up where a gradient is zero but for rounding."""
    assert_same_training(folder, other, tolerance=2e-3)
    one, two = (torch.load(where / "model000030.pt", weights_only=True) for where in (folder, other))
    moved = torch.cat([(one[key] - two[key]).abs().flatten() for key in one])
    assert (moved > 1e-5).float().mean() < 1e-3


LAUNCHERS = {"torchrun": TORCHRUN, "mpiexec": ["mpiexec", "-n", "2", sys.executable]}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_train_as_one_with_the_same_global_batch(alone, scenes, tmp_path, launcher):
    if launcher == "mpiexec" and not shutil.which("mpiexec"):
        pytest.skip("no mpiexec: pip install mpich")
    said = train(LAUNCHERS[launcher], tmp_path / "two", scenes, batch_size=2)
    assert "global batch 4 = 2 × 2 processes × 1 accumulated" in said
    assert said.count("finished at step 30") == 1  # one of them speaks
    assert_same_training(alone, tmp_path / "two", tolerance=1e-5)


def test_sharded_training_is_the_same_and_its_checkpoints_are_anybodys(alone, scenes, tmp_path):
    folder = tmp_path / "sharded"
    train(TORCHRUN, folder, scenes, batch_size=2, microbatch=1, fsdp=True, total_steps=15)
    opt = torch.load(folder / "opt000015.pt", weights_only=True)
    whole = torch.load(alone / "opt000015.pt", weights_only=True)
    assert opt["state"].keys() == whole["state"].keys()
    assert all(opt["state"][k]["exp_avg"].shape == whole["state"][k]["exp_avg"].shape for k in whole["state"])
    shutil.copytree(folder, tmp_path / "one")
    train(
        [sys.executable], tmp_path / "one", scenes, batch_size=4, resume_checkpoint="auto"
    )  # another number of processes
    train(TORCHRUN, folder, scenes, batch_size=2, microbatch=1, fsdp=True, resume_checkpoint="auto")
    for other in (folder, tmp_path / "one"):
        assert_nearly_same_training(alone, other)


def test_resuming_with_another_number_of_processes_goes_on_alike(alone, scenes, tmp_path):
    shutil.copytree(alone, tmp_path / "two")
    for path in (tmp_path / "two").glob("*000030*"):
        path.unlink()
    said = train(TORCHRUN, tmp_path / "two", scenes, batch_size=2, resume_checkpoint="auto")
    assert "resumed from step 15" in said
    assert_same_training(alone, tmp_path / "two", tolerance=1e-5)


def test_accumulation_in_two_processes(alone, scenes, tmp_path):
    said = train(TORCHRUN, tmp_path / "two", scenes, batch_size=2, microbatch=1)
    assert "global batch 4 = 1 × 2 processes × 2 accumulated" in said
    assert_nearly_same_training(alone, tmp_path / "two")


# -- failures: two processes that nobody watches over -------------------------------------------------------------------


class Pair:
    """Two ranks that were started by hand, each with its own data folder."""

    def __init__(self, folders, checkpoint_dir, per_rank=({}, {}), **changes):
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
        self.processes, self.logs = [], []
        for rank, folder in enumerate(folders):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            flags = {"data_dir": folder, "checkpoint_dir": checkpoint_dir, **FLAGS, "total_steps": 10**6}
            flags |= changes | per_rank[rank]
            self.logs.append(checkpoint_dir.parent / f"rank{rank}.log")
            with open(self.logs[-1], "w") as log:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, SCRIPT, *as_arguments(flags)],
                        stdout=log,
                        stderr=log,
                        env=ENVIRONMENT | {name: str(value) for name, value in place.items()},
                    )
                )

    def wait_for(self, path):
        deadline = time.monotonic() + 180
        while not path.exists() and time.monotonic() < deadline and all(p.poll() is None for p in self.processes):
            time.sleep(0.05)
        assert path.exists(), self.said()

    def codes(self, seconds=120):
        """Exit codes of both, who must end by themselves; seconds from now."""
        return [process.wait(timeout=seconds) for process in self.processes]

    def said(self):
        return [path.read_text() for path in self.logs]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.wait()


@pytest.mark.parametrize("bad", [0, 1])
def test_one_rank_without_its_data_ends_both_with_the_reason(scenes, tmp_path, bad):
    folders = [scenes, scenes]
    folders[bad] = tmp_path / "nowhere"
    with Pair(folders, tmp_path / "run") as pair:
        codes = pair.codes()
        said = pair.said()
    assert codes[bad] == 2 and codes[1 - bad] == 1
    assert f"error: rank {bad}: --data_dir {tmp_path / 'nowhere'} does not exist" in said[bad]
    assert f"error: rank {1 - bad} ends because rank {bad} failed: --data_dir" in said[1 - bad]
    assert not any("Traceback" in text for text in said)


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ({"batch_size": 4}, "--batch_size is 4 in rank 1 and 2 in rank 0"),
        ({"device": "cuda"}, "rank 1: --device cuda: this machine shows 0 CUDA devices"),
    ],
)
def test_what_one_rank_cannot_or_does_otherwise_is_refused_by_both(scenes, tmp_path, flag, words):
    with Pair([scenes, scenes], tmp_path / "run", per_rank=({}, flag)) as pair:
        assert pair.codes() == [2, 2]
        assert all(words in text for text in pair.said())


def test_a_rank_that_hangs_ends_the_other(scenes, tmp_path):
    with Pair([scenes, scenes], tmp_path / "run", save_interval=2) as pair:
        pair.wait_for(tmp_path / "run" / "manifest000002.json")
        pair.processes[0].send_signal(signal.SIGSTOP)  # as a node that is lost without a word: no connection closes
        assert pair.processes[1].wait(timeout=120) == 1
        assert "error: rank 1 ends because rank 0 has not answered for 30 s" in pair.said()[1]


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_rank_ends_the_other(scenes, tmp_path, killed):
    with Pair([scenes, scenes], tmp_path / "run", save_interval=2) as pair:
        pair.wait_for(tmp_path / "run" / "manifest000002.json")
        pair.processes[killed].send_signal(signal.SIGKILL)
        codes = pair.codes(60)
        said = pair.said()[1 - killed]
    assert codes[killed] == -signal.SIGKILL and codes[1 - killed] == 1
    assert (
        re.search(rf"error: rank {1 - killed} ends because (it lost|rank {killed})", said) and "Traceback" not in said
    )


def test_a_signal_to_one_rank_saves_and_ends_both_alike(scenes, tmp_path):
    with Pair([scenes, scenes], tmp_path / "run", save_interval=10**6) as pair:
        pair.wait_for(tmp_path / "run" / "progress.csv")
        time.sleep(1)
        pair.processes[1].send_signal(signal.SIGUSR1)
        assert pair.codes(60) == [75, 75], pair.said()
    (manifest,) = (tmp_path / "run").glob("manifest*.json")
    step = int(manifest.stem[8:])
    assert step > 0 and f"step {step} is saved" in pair.said()[0]
    assert not list((tmp_path / "run").glob("*.tmp"))
