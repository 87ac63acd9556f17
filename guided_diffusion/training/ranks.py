"""Which process of a job this is: from torchrun, an srun step or an MPI launcher; else the only one. Standard library only."""

import os
import socket
import subprocess
from typing import NamedTuple

from ..console import InputError

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
SRUN = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")  # Open MPI; MPICH, Intel MPI and their kin
FIRST_SPECIAL_STEP = 2**32 - 6  # SLURM numbers the batch shell, an interactive salloc shell and the like from the top


class Ranks(NamedTuple):
    """A process's place: `rank` of `world_size`, `local_rank` on its node; where they meet, if there are several."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    address: str = ""
    port: int = 0
    launcher: str = ""


class Share(NamedTuple):
    """The `index`-th of `count` equal shares of a work, with index in 0..count-1."""

    index: int = 0
    count: int = 1


def find_ranks(environment=os.environ):
    """Return this process's `Ranks`.

    Asked in this order: torchrun's variables; those of an srun step (the batch shell, which has most of them too, is none);
    an MPI launcher's, through mpi4py; else it is a single process.

    :raises InputError: a variable is missing or no number, hosts cannot be named, or the launcher's MPI is not mpi4py's.
    """
    if any(name in environment for name in TORCHRUN[:3]):
        return _from_torchrun(environment)
    mpi = max((_number(environment, name) for name in MPI_SIZES if name in environment), default=1)
    # mpiexec starts its own helpers by srun, one per node; the processes below them are more.
    if _in_step(environment) and mpi in (1, _number(environment, "SLURM_NTASKS")):
        return _from_srun(environment)
    return _from_mpi(mpi) if mpi > 1 else Ranks()


def _number(environment, name, why="the launcher should set it"):
    text = environment.get(name, "")
    if not text.isdecimal():
        found = f"is {text!r}, no number" if name in environment else "is not set"
        raise InputError(
            f"environment variable {name} {found}: {why}; unset the launcher's other variables to run alone"
        )
    return int(text)


def _placed(rank, world_size, names):
    if rank >= world_size:
        raise InputError(
            f"environment variable {names[0]} is {rank}, but {names[1]} is {world_size}; correct the launcher"
        )


def _from_torchrun(environment):
    there = [name for name in TORCHRUN if name in environment]
    why = (
        f"{', '.join(there)} {'are' if len(there) > 1 else 'is'} there, and torchrun sets all of {', '.join(TORCHRUN)}"
    )
    rank, world_size, local_rank = (_number(environment, name, why) for name in TORCHRUN[:3])
    _placed(rank, world_size, TORCHRUN)
    if world_size == 1:
        return Ranks(launcher="torchrun")
    port = _number(environment, "MASTER_PORT", why)
    if not environment.get("MASTER_ADDR"):
        raise InputError(f"environment variable MASTER_ADDR is not set: {why}")
    return Ranks(rank, world_size, local_rank, environment["MASTER_ADDR"], port, "torchrun")


def _in_step(environment):
    step = environment.get("SLURM_STEP_ID", environment.get("SLURM_STEPID", ""))
    return step.isdecimal() and int(step) < FIRST_SPECIAL_STEP


def _from_srun(environment):
    rank, world_size, local_rank = (_number(environment, name, "srun should set it") for name in SRUN)
    _placed(rank, world_size, SRUN)
    if world_size == 1:
        return Ranks(launcher="srun")
    address = environment.get("MASTER_ADDR") or _first_host(environment)
    if "MASTER_PORT" in environment:
        port = _number(environment, "MASTER_PORT")
    else:  # the same on all nodes, and another for each step of each job
        job, step = (int(environment.get(name, "0")) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
        port = 20000 + (job * 7 + step) % 10000
    return Ranks(rank, world_size, local_rank, address, port, "srun")


def _first_host(environment):
    hosts = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
    if not hosts:
        raise InputError("environment variable SLURM_JOB_NODELIST is not set: srun should set it; or set MASTER_ADDR")
    if not any(mark in hosts for mark in "[,"):
        return hosts
    try:
        done = subprocess.run(
            ["scontrol", "show", "hostnames", hosts], capture_output=True, text=True, timeout=60, check=True
        )
        return done.stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        raise InputError(
            f"scontrol show hostnames {hosts} failed ({error}); set MASTER_ADDR to the first host"
        ) from None


def _from_mpi(size):
    """Ask mpi4py, and let all agree on where to meet; MPI is not used after that."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        reason = str(error).split("\n")[0]
        raise InputError(
            f"started by an MPI launcher, but mpi4py finds no MPI library ({reason}); load your site's MPI module,"
            " pip install mpich, or use torchrun"
        ) from None
    world = MPI.COMM_WORLD
    if world.size != size:
        raise InputError(
            f"the MPI launcher started {size} processes, but mpi4py's MPI sees {world.size}: they are of different"
            " MPI libraries; use the mpiexec that belongs to mpi4py, or torchrun"
        )
    node = world.Split_type(MPI.COMM_TYPE_SHARED)
    address = "127.0.0.1" if node.size == world.size else socket.gethostname()
    with socket.socket() as probe:
        probe.bind(("", 0))
        address, port = world.bcast((address, probe.getsockname()[1]))
    ranks = Ranks(world.rank, world.size, node.rank, address, port, "MPI")
    MPI.Finalize()  # else a process that fails would wait for the others on its way out
    return ranks


def find_share(ranks, arrays=True, environment=os.environ):
    """Return this process's `Share` of independent items: its rank, within its task of a SLURM array if it is in one.

    :param arrays: False where each task of an array does all of a work of its own.

    :raises InputError: the array's tasks are not evenly numbered, so that no task knows its place among them.
    """
    if not arrays or not environment.get("SLURM_ARRAY_TASK_ID"):
        return Share(ranks.rank, ranks.world_size)
    task, least, most, count = (
        _number(environment, f"SLURM_ARRAY_TASK_{what}") for what in ("ID", "MIN", "MAX", "COUNT")
    )
    step = max(1, (most - least) // max(1, count - 1))
    if environment.get("SLURM_ARRAY_TASK_STEP"):  # 1 for a list such as 0,1,4
        step = max(1, _number(environment, "SLURM_ARRAY_TASK_STEP"))
    if (task - least) % step or (most - least) != step * (count - 1):
        raise InputError(
            f"--array: its {count} tasks from {least} to {most} are not evenly numbered, so that task {task}"
            f" cannot know its place; use --array=0-{count - 1}"
        )
    return Share((task - least) // step * ranks.world_size + ranks.rank, count * ranks.world_size)
