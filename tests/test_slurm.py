"""The SLURM scripts on a real SLURM: signals, lost tasks, and that several tasks give what one process gives."""

import csv
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY, TRAIN, as_arguments
from slurm_cluster import SlurmCluster

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parent.parent
JOBS = {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
TWO = "--ntasks-per-node=2"
TRAINING = {**TINY, **TRAIN, "device": "cpu", "precision": "fp32"}
# Stands in for image_train.py: runs until a signal, takes its time to save, and has nothing left to do when resumed.
STAND_IN = """
import os, signal, sys, time
told = []
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda number, frame: told.append(number))
print("started", sys.argv[-1], flush=True)
while "SLURM_RESTART_COUNT" not in os.environ and not told:
    time.sleep(0.02)
if told:
    print("saved", flush=True)
    rank = int(os.environ.get("SLURM_PROCID", 0))
    time.sleep(0 if rank else 2)
    sys.exit(0 if rank else int(sys.argv[-1]))
print("resumed", os.environ["OMP_NUM_THREADS"], flush=True)
"""


@pytest.fixture(scope="session")
def cluster():
    """A running SLURM of one node."""
    try:
        started = SlurmCluster().__enter__()
    except (RuntimeError, OSError) as error:  # not installed, or not root; what the daemons do is another matter
        pytest.skip(f"SLURM does not come up here: {error}")
    yield started
    started.__exit__()


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A project folder whose training is a stand-in."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("train.sh", "guided_diffusion/job.sh"):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    (folder / "logs").mkdir()
    (folder / "image_train.py").write_text(STAND_IN)
    return folder


def log_of(facts):
    path = Path(facts["StdOut"])
    return path.read_text() if path.exists() else ""


def test_requeue_outlives_the_signal_that_ends_the_job(tmp_path):
    for name, body in {"squeue": "echo RUNNING", "scontrol": "kill -TERM $$"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "4"}
    command = ["bash", "-c", f"source {ROOT}/guided_diffusion/job.sh; requeue 75"]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=30)
    assert done.stderr == "stopped with code 75; job 4 is back in the queue and will resume\n"


def test_job_by_signals(cluster, project):
    cases = {  # name: (options of sbatch, exit code when told to stop, options of scancel, final state)
        "steps": ([TWO], 75, ["--signal=USR1"], "COMPLETED"),
        "batch": ([TWO], 75, ["--signal=USR1", "--batch"], "COMPLETED"),
        "both": ([TWO], 75, ["--signal=USR1", "--full"], "COMPLETED"),
        "term": ([TWO], 75, ["--signal=TERM"], "COMPLETED"),
        "cancelled": ([TWO], 75, [], "CANCELLED"),
        "failing": ([TWO], 3, ["--signal=USR1"], "FAILED"),
        "single-shot": ([TWO, "--no-requeue"], 75, ["--signal=USR1"], "FAILED"),
        "one": (["--array=0-1"], 75, ["--signal=USR1"], "COMPLETED"),
    }
    jobs, environment = {}, {"PYTHON": sys.executable, "OMP_NUM_THREADS": ""}
    for name, (options, code, _, _) in cases.items():
        options = [f"--job-name={name}", "--cpus-per-task=3", *options]
        jobs[name] = cluster.submit("train.sh", code, options=options, cwd=project, env=environment)
    array, jobs["one"] = jobs["one"], f"{jobs['one']}_1"  # the task that SLURM gives the number of the whole array
    jobs["other"] = f"{array}_0"
    for name, job in jobs.items():
        ready = 1 if name in ("one", "other") else 2
        cluster.await_that(job, lambda facts, ready=ready: log_of(facts).count("started") == ready, "start")
    for name, (_, _, options, _) in cases.items():
        cluster.command("scancel", *options, jobs[name])

    for name, (_, code, _, state) in cases.items():
        facts = cluster.await_end(jobs[name], state)
        log, tasks = log_of(facts), 1 if name == "one" else 2
        assert facts["StdOut"] == f"{project}/logs/{facts['JobName']}-{facts['JobId']}.out"
        assert log.count("saved") == tasks, log
        again = state == "COMPLETED"
        assert facts["Restarts"] == str(int(again)) and log.count("resumed 3") == tasks * again, log
        # 138: USR1 reached srun as it ended, which job.sh takes as it takes 75.
        ends = {"0:0"} if again else {f"{code}:0", "138:0" if code == 75 else ""}
        assert facts["ExitCode"] in ends
        assert ("is back in the queue" in log) == again and ("not requeued" in log) == (name == "cancelled"), log
        assert ("submit it again" in log) == (name == "single-shot"), log
    assert cluster.facts(jobs["other"])["JobState"] == "RUNNING"
    cluster.command("scancel", jobs["other"])
    cluster.await_end(jobs["other"], "CANCELLED")


def weights_in(folder):
    """Return a run's last weights: {(file, key): tensor}."""
    files = {name: torch.load(folder / name, weights_only=True) for name in ("model000030.pt", "ema_0.9_000030.pt")}
    return {(name, key): value for name, weights in files.items() for key, value in weights.items()}


def rows_of(path):
    """Return the rows of a table, none where it is not there yet."""
    return list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []


def places(scenes, folder):
    """Return the environment of a training on `scenes` into `folder`."""
    return {**JOBS, "DATA_DIR": str(scenes), "CHECKPOINT_DIR": str(folder)}


def submit(cluster, scenes, folder, **flags):
    """Train in two tasks into a folder, with the log beside it; return the job."""
    options = [TWO, f"--job-name={folder.name}", f"--output={folder.parent}/%x.out"]
    words, environment = as_arguments({**TRAINING, **flags}), places(scenes, folder)
    return cluster.submit("train.sh", *words, options=options, cwd=ROOT, env=environment)


def test_train_in_two_tasks_equals_one_and_is_requeued(cluster, scenes, tmp_path):
    steps = {"told": 30, "cancelled": 10**6, "straight": 30}
    jobs = {name: submit(cluster, scenes, tmp_path / name, total_steps=count) for name, count in steps.items()}
    for name, options in (("told", ["--signal=USR1"]), ("cancelled", [])):
        cluster.await_that(jobs[name], lambda _, name=name: rows_of(tmp_path / name / "progress.csv"), "take a step")
        cluster.command("scancel", *options, jobs[name])
    command = ["bash", "train.sh", *as_arguments({**TRAINING, "batch_size": 4, "total_steps": 30})]
    environment = {**cluster.environment, **places(scenes, tmp_path / "alone")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    cluster.await_end(jobs["straight"], "COMPLETED")
    two, one = (weights_in(tmp_path / name) for name in ("straight", "alone"))
    torch.testing.assert_close(two, one, rtol=0, atol=1e-5)
    tables = [rows_of(tmp_path / name / "progress.csv") for name in ("straight", "alone")]
    losses = [[float(row["loss"]) for row in table] for table in tables]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)

    facts = cluster.await_end(jobs["told"], "COMPLETED")
    log = log_of(facts)
    assert facts["Restarts"] == "1" and "stopped: step" in log, log
    assert "resumed from step" in log and "finished at step 30" in log, log
    assert [row["step"] for row in rows_of(tmp_path / "told" / "progress.csv")] == [str(k) for k in range(1, 31)]
    resumed = weights_in(tmp_path / "told")
    assert resumed.keys() == two.keys() and all(torch.equal(resumed[key], two[key]) for key in two)

    facts = cluster.await_end(jobs["cancelled"], "CANCELLED")
    assert facts["Restarts"] == "0" and "stopped: step" in log_of(facts) and "not requeued" in log_of(facts)


def test_train_ends_where_a_task_fails_or_is_lost(cluster, scenes, tmp_path):
    """A task without data, and one that is killed: the job fails at once, with the reason in its log."""
    shutil.copytree(scenes, tmp_path / "scenes")
    flags = {"total_steps": 10**6, "save_interval": 10**6}
    jobs = {name: submit(cluster, tmp_path / "scenes", tmp_path / name, **flags) for name in ("lost", "killed")}
    for name, job in jobs.items():
        cluster.await_that(job, lambda _, name=name: rows_of(tmp_path / name / "progress.csv"), "take a step")
    pids = subprocess.run(["pgrep", "-f", f"image_train.py .*{tmp_path}/killed"], capture_output=True, text=True)
    ranks = [pid for pid in map(int, pids.stdout.split()) if Path(f"/proc/{pid}/comm").read_text().startswith("python")]
    os.kill(ranks[-1], signal.SIGKILL)
    facts = cluster.await_end(jobs["killed"], "FAILED", seconds=60)
    assert facts["Restarts"] == "0" and "ends because it lost another one" in log_of(facts)
    shutil.rmtree(tmp_path / "scenes")
    facts = cluster.await_end(jobs["lost"], "FAILED", seconds=60)
    assert facts["Restarts"] == "0" and "toytown_" in log_of(facts) and "error: rank" in log_of(facts)


def test_sample_in_an_array_equals_one_process(cluster, trained, tmp_path):
    from guided_diffusion.data.toy_scenes import write_toy_scenes

    write_toy_scenes(str(tmp_path / "scenes"), train=1, val=6, height=32, width=64, progress=False)
    flags = as_arguments({"use_ddim": True, "timestep_respacing": 2, "batch_size": 1, "device": "cpu"})
    shared = {**JOBS, "DATA_DIR": str(tmp_path / "scenes"), "MODEL_PATH": str(trained)}
    options, environment = ["--array=0-3", f"--output={tmp_path}/%x-%j.out"], {"RESULTS_PATH": str(tmp_path / "many")}
    array = cluster.submit("sample.sh", *flags, options=options, cwd=ROOT, env={**shared, **environment})
    environment = {**cluster.environment, **shared, "RESULTS_PATH": str(tmp_path / "one")}
    done = subprocess.run(["bash", "sample.sh", *flags], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    logs = [log_of(cluster.await_end(f"{array}_{task}", "COMPLETED")) for task in range(4)]

    tables = [rows_of(tmp_path / name / "results.csv") for name in ("many", "one")]
    many, one = ([{key: row[key] for key in row if "seconds" not in key} for row in table] for table in tables)
    assert many == one and len({row["path"] for row in one}) == 6, logs
    names = {path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.png")}
    assert names == {path.relative_to(tmp_path / "many") for path in (tmp_path / "many").rglob("*.png")}
    assert all((tmp_path / "many" / name).read_bytes() == (tmp_path / "one" / name).read_bytes() for name in names)
