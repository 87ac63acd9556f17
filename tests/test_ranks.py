"""Which process of a job this is, and its share of the work."""

import itertools
import subprocess
import sys

import pytest

from guided_diffusion.console import InputError
from guided_diffusion.training import ranks
from guided_diffusion.training.distributed import Ranks, Share, find_ranks, find_share

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "node7", "MASTER_PORT": "29500"}
STEP = {
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_ID": "1234",
    "SLURM_JOB_NODELIST": "node9",
}
BATCH_SHELL = {
    "SLURM_PROCID": "0",
    "SLURM_NTASKS": "2",
    "SLURM_LOCALID": "0",
    "SLURM_JOB_NODELIST": "node9",
    "SLURM_JOB_ID": "1234",
}


def without(environment, name):
    return {key: value for key, value in environment.items() if key != name}


def test_alone():
    assert find_ranks({}) == Ranks(0, 1, 0)
    assert find_ranks({"PATH": "/bin", "MASTER_ADDR": "node7", "MASTER_PORT": "1"}) == Ranks()


def test_torchrun():
    assert find_ranks(TORCHRUN) == Ranks(3, 4, 1, "node7", 29500, "torchrun")


def test_torchrun_comes_before_slurm_and_mpi():
    assert find_ranks({**STEP, "PMI_SIZE": "8", **TORCHRUN}).launcher == "torchrun"


@pytest.mark.parametrize("missing", TORCHRUN)
def test_a_half_set_environment_says_which_variable(missing):
    with pytest.raises(InputError, match=f"environment variable {missing} is not set"):
        find_ranks(without(TORCHRUN, missing))


@pytest.mark.parametrize("missing", ["SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_JOB_NODELIST"])
def test_a_half_set_step_says_which_variable(missing):
    with pytest.raises(InputError, match=f"environment variable {missing} is not set"):
        find_ranks(without(STEP, missing))


@pytest.mark.parametrize(("name", "value"), [("RANK", "x"), ("WORLD_SIZE", ""), ("LOCAL_RANK", "-1"), ("RANK", "4")])
def test_values_that_cannot_be(name, value):
    with pytest.raises(InputError, match=name):
        find_ranks({**TORCHRUN, name: value})


def test_an_srun_step():
    found = find_ranks(STEP)
    assert found[:4] == (5, 8, 1, "node9") and found.launcher == "srun" and 20000 <= found.port < 30000
    # Every process of the step finds the same place; another step another one.
    assert find_ranks({**STEP, "SLURM_PROCID": "0", "SLURM_LOCALID": "0"})[3:5] == found[3:5]
    assert find_ranks({**STEP, "SLURM_STEP_ID": "1"}).port != found.port
    assert find_ranks({**STEP, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "7"})[3:5] == ("10.0.0.1", 7)
    assert find_ranks({**STEP, "SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}).world_size == 1


def test_the_batch_shell_and_an_interactive_shell_are_no_steps():
    assert find_ranks(BATCH_SHELL) == Ranks()
    assert find_ranks({**STEP, "SLURM_STEP_ID": str(2**32 - 6)}) == Ranks()


def test_the_first_host_of_a_list(monkeypatch):
    asked = []

    def scontrol(command, **_):
        asked.append(command)
        return subprocess.CompletedProcess(command, 0, stdout="gpu003\ngpu004\n")

    monkeypatch.setattr(subprocess, "run", scontrol)
    assert find_ranks({**STEP, "SLURM_JOB_NODELIST": "gpu[003-004]"}).address == "gpu003"
    assert asked == [["scontrol", "show", "hostnames", "gpu[003-004]"]]


def test_a_host_list_without_scontrol(monkeypatch):
    def missing(command, **_):
        raise FileNotFoundError("scontrol")

    monkeypatch.setattr(subprocess, "run", missing)
    with pytest.raises(InputError, match="MASTER_ADDR"):
        find_ranks({**STEP, "SLURM_JOB_NODELIST": "gpu[003-004]"})


def test_a_launcher_of_one_process_needs_no_mpi(monkeypatch):
    monkeypatch.setattr(ranks, "_from_mpi", lambda size: pytest.fail("MPI was asked"))
    assert find_ranks({"PMI_SIZE": "1", "PMI_RANK": "0"}) == Ranks()


def test_mpiexec_within_slurm_is_mpi(monkeypatch):
    # mpiexec starts one helper per node by srun; the processes below it inherit that step's variables.
    monkeypatch.setattr(ranks, "_from_mpi", lambda size: Ranks(1, size, launcher="MPI"))
    helper = {**STEP, "SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    assert find_ranks({**helper, "PMI_SIZE": "4"}).launcher == "MPI"
    assert find_ranks({**STEP, "PMI_SIZE": "8"}).launcher == "srun"  # srun's own PMI
    assert find_ranks({"OMPI_COMM_WORLD_SIZE": "2"}) == Ranks(1, 2, launcher="MPI")


def test_mpi_without_a_library_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(InputError, match="mpi4py finds no MPI library"):
        find_ranks({"PMI_SIZE": "2"})


def test_shares_of_ranks():
    assert find_share(Ranks(), environment={}) == Share(0, 1)
    assert find_share(Ranks(2, 3), environment={}) == Share(2, 3)


def array(task, least, most, count):
    return {
        f"SLURM_ARRAY_TASK_{name}": str(value)
        for name, value in (("ID", task), ("MIN", least), ("MAX", most), ("COUNT", count))
    }


@pytest.mark.parametrize(("tasks", "ranks"), [(range(4), 1), (range(1, 4), 2), (range(3, 12, 4), 1), (range(5, 6), 3)])
def test_array_tasks_and_ranks_share_without_gaps(tasks, ranks):
    found = [
        find_share(Ranks(rank, ranks), environment=array(task, tasks[0], tasks[-1], len(tasks)))
        for task, rank in itertools.product(tasks, range(ranks))
    ]
    assert found == [Share(k, len(tasks) * ranks) for k in range(len(tasks) * ranks)]


def test_arrays_may_also_be_works_of_their_own():
    assert find_share(Ranks(1, 2), arrays=False, environment=array(3, 0, 3, 4)) == Share(1, 2)


@pytest.mark.parametrize("task", [0, 1, 4])
def test_every_task_of_a_list_of_tasks_is_refused(task):
    with pytest.raises(InputError, match="use --array=0-2"):
        find_share(Ranks(), environment=array(task, 0, 4, 3) | {"SLURM_ARRAY_TASK_STEP": "1"})


@pytest.mark.parametrize("tasks", [(0, 2, 5), (0, 1, 3)])
def test_uneven_arrays_are_refused(tasks):
    with pytest.raises(InputError, match="use --array=0-2"):
        find_share(Ranks(), environment=array(tasks[1], tasks[0], tasks[-1], len(tasks)))
