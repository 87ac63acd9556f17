"""Which process of a job this is, its share of the work, and what processes agree on (see also test_processes)."""

import itertools
import sys
import time

import pytest
import torch
import torch.distributed as dist

from guided_diffusion.console import InputError
from guided_diffusion.training import distributed
from guided_diffusion.training.distributed import Group, LostPeer, Ranks, Share, find_ranks, find_share

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "node7", "MASTER_PORT": "29500"}
STEP = {"STEP_ID": "0", "PROCID": "5", "NTASKS": "8", "LOCALID": "1", "JOB_ID": "1234", "STEP_NODELIST": "node9"}
STEP = {f"SLURM_{name}": value for name, value in STEP.items()}
FIRST = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}


def without(environment, *names):
    return {key: value for key, value in environment.items() if key not in names}


def test_find_ranks_alone_and_of_torchrun():
    assert find_ranks({"PATH": "/bin", "MASTER_ADDR": "node7", "MASTER_PORT": "1"}) == Ranks(0, 1, 0)
    assert find_ranks(TORCHRUN) == Ranks(3, 4, 1, "node7", 29500)


NEEDED = [(TORCHRUN, name) for name in TORCHRUN] + [(STEP, f"SLURM_{name}") for name in ("PROCID", "NTASKS", "LOCALID")]


@pytest.mark.parametrize(("environment", "missing"), NEEDED)
def test_find_ranks_names_the_variable_that_a_launcher_lacks(environment, missing):
    with pytest.raises(InputError, match=f"environment variable {missing} is not set"):
        find_ranks(without(environment, missing))
    if missing != "MASTER_ADDR":
        with pytest.raises(InputError, match=missing):
            find_ranks({**environment, missing: "x"})


def test_find_ranks_of_an_srun_step():
    found = find_ranks(STEP)
    assert found[:4] == (5, 8, 1, "node9") and 20000 <= found.port < 30000
    # Every process of the step finds the same place; another step another one.
    assert find_ranks({**STEP, **FIRST})[3:5] == found[3:5]
    assert find_ranks({**STEP, "SLURM_STEP_ID": "1"}).port != found.port
    assert find_ranks({**STEP, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "7"})[3:5] == ("10.0.0.1", 7)
    assert find_ranks({**STEP, **FIRST, "SLURM_NTASKS": "1"}).world_size == 1


@pytest.mark.parametrize(
    ("hosts", "first"), [("gpu[003-004,9],a1", "gpu003"), ("r[2,4]n[01-10]", "r2n01"), ("a1,b[2-3]", "a1")]
)
def test_find_ranks_takes_the_first_host_of_a_list(hosts, first):
    assert find_ranks({**STEP, "SLURM_STEP_NODELIST": hosts}).address == first
    assert find_ranks({**without(STEP, "SLURM_STEP_NODELIST"), "SLURM_JOB_NODELIST": hosts}).address == first


def test_find_ranks_in_a_batch_or_interactive_shell_is_alone():
    assert find_ranks({**without(STEP, "SLURM_STEP_ID"), **FIRST}) == Ranks()
    assert find_ranks({**STEP, "SLURM_STEP_ID": str(2**32 - 6)}) == Ranks()


def test_find_ranks_of_mpiexec_within_slurm(monkeypatch):
    # mpiexec starts one helper per node by srun; the processes below it inherit that step's variables.
    monkeypatch.setattr(distributed, "_from_mpi", lambda size: Ranks(1, size, 0, "mpi"))
    assert find_ranks({**STEP, **FIRST, "SLURM_NTASKS": "1", "PMI_SIZE": "4"}).address == "mpi"
    assert find_ranks({**STEP, "PMI_SIZE": "8"}).address == "node9"  # srun's own PMI
    assert find_ranks({"OMPI_COMM_WORLD_SIZE": "2"}) == Ranks(1, 2, 0, "mpi")


def test_find_ranks_needs_an_mpi_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(InputError, match="mpi4py finds no MPI library"):
        find_ranks({"PMI_SIZE": "2"})


def share(tasks, task, ranks, step=1):
    values = {"ID": task, "MIN": tasks[0], "MAX": tasks[-1], "COUNT": len(tasks), "STEP": step}
    return find_share(ranks, environment={f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in values.items()})


@pytest.mark.parametrize(("tasks", "ranks"), [(range(4), 1), (range(1, 4), 2), (range(3, 12, 4), 1), (range(5, 6), 3)])
def test_find_share_of_array_tasks_and_ranks_has_no_gaps(tasks, ranks):
    found = [share(tasks, task, Ranks(k, ranks), tasks.step) for task, k in itertools.product(tasks, range(ranks))]
    assert found == [Share(k, len(tasks) * ranks) for k in range(len(tasks) * ranks)]


def test_find_share_of_ranks():
    assert find_share(Ranks(), environment={}) == Share(0, 1)
    assert find_share(Ranks(2, 3), environment={}) == Share(2, 3)
    array = {"SLURM_ARRAY_TASK_ID": "1"}  # whose tasks do all of a work each
    assert find_share(Ranks(2, 3), arrays=False, environment=array) == Share(2, 3)


@pytest.mark.parametrize("task", [0, 1, 4])
def test_find_share_refuses_a_list_of_tasks_with_gaps(task):
    with pytest.raises(InputError, match="use --array=0-2"):
        share([0, 1, 4], task, Ranks())


# -- the group --------------------------------------------------------------------------------------------------------


def test_group_of_one_agrees_with_itself():
    group, tensor = Group(), torch.arange(3.0)
    assert (group.rank, group.world_size, group.main) == (0, 1, True)
    assert group.gather("x") == ["x"] and group.largest(7) == 7 and group.joined(tensor) is tensor
    assert group.run_on_main(lambda: "done") == group.main_first(lambda: "done") == "done"


@pytest.mark.parametrize("error", [InputError("bad flag"), OSError("disk"), RuntimeError("gloo"), KeyboardInterrupt()])
def test_guarded_leaves_errors_of_one_process_alone(error):
    with pytest.raises(type(error)) as found, Group().guarded():
        raise error
    assert found.value is error


def one_of_two(rank):
    """A group of two without the other, which always has 0 to say."""
    group = Group()
    group.rank, group.world_size, group.main, group.beat = rank, 2, rank == 0, 0.05
    group.meetings = []
    group.largest = lambda number: group.meetings.append(number) or number
    return group


def test_run_on_main_meets_while_the_work_goes_on():
    group = one_of_two(0)
    assert group.run_on_main(lambda: time.sleep(0.5) or "saved") == "saved"
    assert 5 <= len(group.meetings) <= 12 and group.meetings == [1] * (len(group.meetings) - 1) + [0]
    with pytest.raises(OSError, match="full"):
        group.run_on_main(lambda: (_ for _ in ()).throw(OSError("full")))
    assert one_of_two(1).run_on_main(lambda: pytest.fail("this is rank 1")) is None


def test_run_on_main_finishes_a_save_although_a_rank_is_lost():
    group, saved = one_of_two(0), []
    group.largest = lambda number: (_ for _ in ()).throw(RuntimeError("gloo: Connection closed by peer"))
    with pytest.raises(RuntimeError, match="gloo"):
        group.run_on_main(lambda: time.sleep(0.3) or saved.append(1))
    assert saved


NAMED, LOST = r"^rank 1: no data$", "rank 1 ends because it lost another one"
CLOSED = "[gloo/transport/tcp/pair.cc:545] Connection closed by peer"
ERRORS = [(InputError("no data"), InputError, NAMED), (FileNotFoundError("no data"), OSError, NAMED)]
ERRORS += [(RuntimeError(CLOSED), LostPeer, LOST), (RuntimeError("NCCL error: remote process exited"), LostPeer, LOST)]
ERRORS += [(dist.DistNetworkError("Broken pipe"), LostPeer, LOST)]


@pytest.mark.parametrize("error, kind, words", ERRORS)
def test_guarded_names_the_rank_of_an_error_or_says_that_another_is_lost(error, kind, words):
    with pytest.raises(kind, match=words), one_of_two(1).guarded():
        raise error
