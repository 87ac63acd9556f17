"""Several processes against one, with real launchers; what happens to all of them when one fails."""

import contextlib
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
FLAGS = {**TINY, **TRAIN, "lr": 1e-4, "total_steps": 30, "save_interval": 15, "eval_interval": 10, "eval_items": 3}
FLAGS |= {"log_interval": 4, "preview_items": 1, "preview_steps": 2}
FLAGS |= {"schedule_sampler": "loss-second-moment", "diffusion_steps": 2}
ALONE = {
    name: value
    for name, value in os.environ.items()
    if not name.startswith(("SLURM_", "PMI_", "OMPI_")) and name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
}
ENVIRONMENT = {**ALONE, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
LAUNCHERS = {"torchrun": TORCHRUN, "mpiexec": ["mpiexec", "-n", "2", sys.executable]}
pytestmark = pytest.mark.slow


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
    """Losses and scores within 1e-5 relative, weights within a tolerance."""
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


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_train_as_one_with_the_same_global_batch(alone, scenes, tmp_path, launcher):
    if launcher == "mpiexec" and not shutil.which("mpiexec"):
        pytest.skip("no mpiexec: pip install mpich")
    said = train(LAUNCHERS[launcher], tmp_path / "two", scenes, batch_size=2)
    assert "global batch 4 = 2 × 2 processes × 1 accumulated" in said
    assert said.count("finished at step 30") == 1  # one of them speaks
    assert_same_training(alone, tmp_path / "two", tolerance=1e-5)


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
    # Adam blows up the rounding of sums where a gradient is zero but for rounding: in few weights.
    assert_same_training(alone, tmp_path / "two", tolerance=2e-3)
    one, two = (torch.load(where / "model000030.pt", weights_only=True) for where in (alone, tmp_path / "two"))
    moved = torch.cat([(one[key] - two[key]).abs().flatten() for key in one])
    assert (moved > 1e-5).float().mean() < 1e-3


# -- failures ---------------------------------------------------------------------------------------------------------


class Run:
    """A training of two ranks that goes on until something happens, below a launcher or started by hand.

    :param per_rank: flags of each rank, where they are started by hand.
    """

    def __init__(self, scenes, folder, launcher=None, per_rank=({}, {}), **changes):
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
        flags = {"data_dir": scenes, "checkpoint_dir": folder, **FLAGS, "total_steps": 10**6, **changes}
        self.processes, self.log = [], folder.parent / "log"
        for rank in range(1 if launcher else 2):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            environment = ENVIRONMENT | ({} if launcher else {name: str(value) for name, value in place.items()})
            command = [*(launcher or [sys.executable]), SCRIPT, *as_arguments(flags | per_rank[rank])]
            with open(self.log, "a") as log:
                self.processes.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment))

    def wait_for(self, path):
        deadline = time.monotonic() + 120
        while not path.exists() and time.monotonic() < deadline and all(p.poll() is None for p in self.processes):
            time.sleep(0.05)
        assert path.exists(), self.said()

    def ranks(self):
        """Return the process ids of the training processes, whatever started them."""
        listed = subprocess.run(["pgrep", "-f", f"image_train.py .*{self.log.parent}"], capture_output=True, text=True)
        own = {process.pid for process in self.processes}
        found = [int(pid) for pid in listed.stdout.split()]
        return found if len(self.processes) == 2 else [pid for pid in found if pid not in own and is_rank(pid)]

    def codes(self, seconds=60):
        """Return the exit codes of all that was started, which must end by itself within this time."""
        return [process.wait(timeout=seconds) for process in self.processes]

    def said(self):
        return self.log.read_text()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for pid in {*self.ranks(), *(process.pid for process in self.processes if process.poll() is None)}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in self.processes:
            process.wait()


def is_rank(pid):
    """Whether a process is Python running the script itself, not the launcher or a proxy of it."""
    words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    return b"python" in words[0] and b"torch.distributed.run" not in words


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("killed", [0, 1])
def test_killed_rank_ends_the_job(scenes, tmp_path, launcher, killed):
    with Run(scenes, tmp_path / "run", LAUNCHERS[launcher], save_interval=2) as run:
        run.wait_for(tmp_path / "run" / "model000002.pt")
        os.kill(run.ranks()[killed], signal.SIGKILL)
        assert run.codes()[0] != 0
    assert re.search(r"error: rank \d ends because it lost another one|signal 9", run.said())  # mpiexec may be first


@pytest.mark.parametrize("bad", [0, 1])
def test_rank_without_data_ends_both_with_the_reason(scenes, tmp_path, bad):
    per_rank = [{}, {}]
    per_rank[bad] = {"data_dir": tmp_path / "nowhere"}
    with Run(scenes, tmp_path / "run", per_rank=per_rank) as run:
        codes = run.codes()
    assert codes[bad] == 2 and codes[1 - bad] == 1
    assert re.search(rf"error: rank {bad}: --data_dir .*{tmp_path / 'nowhere'}", run.said())
    assert f"error: rank {1 - bad} ends because it lost another one" in run.said() and "Traceback" not in run.said()


def test_ranks_with_other_flags_end_with_the_reason(scenes, tmp_path):
    with Run(scenes, tmp_path / "run", per_rank=({}, {"seed": 7})) as run:
        assert 2 in run.codes() and 0 not in run.codes()
    assert "rank 1 and rank 0 have other values of --seed" in run.said() and "Traceback" not in run.said()


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_rank_that_loses_its_data_ends_the_job_with_the_reason(scenes, tmp_path, launcher):
    shutil.copytree(scenes, tmp_path / "scenes")
    with Run(tmp_path / "scenes", tmp_path / "run", LAUNCHERS[launcher], save_interval=2) as run:
        run.wait_for(tmp_path / "run" / "model000002.pt")
        shutil.rmtree(tmp_path / "scenes")
        assert run.codes()[0] != 0
    assert re.search(r"error: rank \d: .*toytown_\S+.*", run.said())


def test_stopped_rank_ends_the_job_after_dist_timeout(scenes, tmp_path):
    with Run(scenes, tmp_path / "run", TORCHRUN, save_interval=2, dist_timeout=20) as run:
        run.wait_for(tmp_path / "run" / "model000002.pt")
        started = time.monotonic()
        os.kill(run.ranks()[1], signal.SIGSTOP)
        assert run.codes(90)[0] != 0
        assert time.monotonic() - started > 15
    assert "ends because it lost another one" in run.said()


def test_signal_to_one_rank_saves_and_ends_both(scenes, tmp_path):
    with Run(scenes, tmp_path / "run", save_interval=10**6) as run:
        run.wait_for(tmp_path / "run" / "tensorboard")
        time.sleep(2)
        run.processes[1].send_signal(signal.SIGUSR1)
        assert run.codes() == [75, 0], run.said()
    (manifest,) = (tmp_path / "run").glob("manifest*.json")
    step = int(manifest.stem[8:])
    assert step > 0 and f"step {step} is saved" in run.said()
    assert not list((tmp_path / "run").glob("*.tmp"))


SLOW_SAVE = """
import sys, time
from guided_diffusion import build
from guided_diffusion.training import checkpoint
from guided_diffusion.console import run_script
save = checkpoint.save_checkpoint
checkpoint.save_checkpoint = lambda *arguments: (time.sleep(9), save(*arguments))
import image_train
run_script(image_train.main)
"""


def test_save_longer_than_dist_timeout_ends_nothing(scenes, tmp_path):
    (tmp_path / "image_train_slowly.py").write_text(SLOW_SAVE)
    flags = {"data_dir": scenes, "checkpoint_dir": tmp_path / "run", **FLAGS, "total_steps": 2, "dist_timeout": 4}
    command = [*TORCHRUN, str(tmp_path / "image_train_slowly.py"), *as_arguments(flags)]
    environment = ENVIRONMENT | {"PYTHONPATH": str(Path(SCRIPT).parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "finished at step 2" in done.stderr, done.stderr
