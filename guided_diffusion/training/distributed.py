"""The processes of a job: their places (torchrun, srun, mpiexec), what they agree on, and how they end together."""

import datetime
import json
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from threading import Thread
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from ..console import InputError
from .devices import backend_for, device_identity

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
SRUN = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")  # Open MPI; MPICH, Intel MPI and their kin
FIRST_SPECIAL_STEP = 2**32 - 6  # SLURM numbers the batch shell, an interactive salloc shell and the like from the top
MEETING_S = 300.0  # for all processes to have started


class Ranks(NamedTuple):
    """A process's place: `rank` of `world_size`, `local_rank` on its node; where they meet, if there are several."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    address: str = ""
    port: int = 0


class Share(NamedTuple):
    """The `index`-th of `count` equal shares of a work, with index in 0..count-1."""

    index: int = 0
    count: int = 1


# -- places -----------------------------------------------------------------------------------------------------------


def find_ranks(environment=os.environ):
    """Return this process's `Ranks`: by torchrun, by an srun step (the batch shell is none), by MPI; else it is alone.

    :raises InputError: naming a variable that is missing or no number, or what MPI or the host list lacks.
    """
    if any(name in environment for name in TORCHRUN[:3]):
        numbers = [_number(environment, name) for name in TORCHRUN if name != "MASTER_ADDR"]
        if not environment.get("MASTER_ADDR"):
            raise InputError(f"environment variable MASTER_ADDR is not set: torchrun sets all of {', '.join(TORCHRUN)}")
        return Ranks(*numbers[:3], environment["MASTER_ADDR"], numbers[3])
    mpi = max((_number(environment, name) for name in MPI_SIZES if name in environment), default=1)
    step = environment.get("SLURM_STEP_ID", environment.get("SLURM_STEPID", ""))
    # mpiexec starts its own helpers by srun, one per node; the processes below them are more.
    in_step = step.isdecimal() and int(step) < FIRST_SPECIAL_STEP
    if in_step and mpi in (1, _number(environment, "SLURM_NTASKS")):
        return _from_srun(environment)
    return _from_mpi(mpi) if mpi > 1 else Ranks()


def _number(environment, name):
    text = environment.get(name, "")
    if not text.isdecimal():
        found = f"is {text!r}, no number" if name in environment else "is not set"
        hint = "the launcher should set it; unset its other variables to run alone"
        raise InputError(f"environment variable {name} {found}: {hint}")
    return int(text)


def _from_srun(environment):
    place = [_number(environment, name) for name in SRUN]
    if place[1] == 1:
        return Ranks()
    port = environment.get("MASTER_PORT")
    if port is None:  # the same on all nodes, and another for each step of each job
        job, step = (int(environment.get(name, "0")) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
        port = 20000 + (job * 7 + step) % 10000
    return Ranks(*place, environment.get("MASTER_ADDR") or _first_host(environment), int(port))


def _first_host(environment):
    hosts = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    if hosts and not any(mark in hosts for mark in "[,"):
        return hosts
    command = ["scontrol", "show", "hostnames", hosts]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        raise InputError(f"{' '.join(command)} failed ({error}); set MASTER_ADDR to the first host") from None


def _from_mpi(size):
    """Ask mpi4py, and let all agree on where to meet; MPI is not used after that."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        hint = "load your site's MPI module, pip install mpich, or use torchrun"
        reason = str(error).split("\n")[0]
        raise InputError(f"an MPI launcher started this, but mpi4py finds no MPI library ({reason}); {hint}") from None
    world = MPI.COMM_WORLD
    if world.size != size:
        hint = "use the mpiexec that belongs to mpi4py, or torchrun"
        raise InputError(f"the MPI launcher started {size} processes, but mpi4py's MPI sees {world.size}: {hint}")
    node = world.Split_type(MPI.COMM_TYPE_SHARED)
    address = "127.0.0.1" if node.size == world.size else socket.gethostname()
    with socket.socket() as probe:
        probe.bind(("", 0))
        address, port = world.bcast((address, probe.getsockname()[1]))
    ranks = Ranks(world.rank, world.size, node.rank, address, port)
    MPI.Finalize()  # else a process that fails would wait for the others on its way out
    return ranks


def find_share(ranks, arrays=True, environment=os.environ):
    """Return this process's `Share` of independent items: its rank, within its task of a SLURM array if it is in one.

    :param arrays: False where each task of an array does all of a work of its own.
    :raises InputError: the array's tasks are not evenly numbered, so that no task knows its place among them.
    """
    if not arrays or not environment.get("SLURM_ARRAY_TASK_ID"):
        return Share(ranks.rank, ranks.world_size)
    names = [f"SLURM_ARRAY_TASK_{what}" for what in ("ID", "MIN", "MAX", "COUNT")]
    task, least, most, count = (_number(environment, name) for name in names)
    step = max(1, (most - least) // max(1, count - 1))
    if environment.get("SLURM_ARRAY_TASK_STEP"):  # 1 for a list such as 0,1,4
        step = max(1, _number(environment, "SLURM_ARRAY_TASK_STEP"))
    if (task - least) % step or (most - least) != step * (count - 1):
        found = f"its {count} tasks from {least} to {most} are not evenly numbered"
        raise InputError(f"--array: {found}, so that task {task} cannot know its place; use --array=0-{count - 1}")
    return Share((task - least) // step * ranks.world_size + ranks.rank, count * ranks.world_size)


# -- the group --------------------------------------------------------------------------------------------------------


class LostPeer(OSError):
    """Another process of the run failed or vanished."""


class Group:
    """The processes of one run. A single one needs no process group: everything here then costs nothing.

    :param ranks, device: this process's `Ranks` and torch device.
    :param flags: dict of what must be the same in all of them; JSON must be able to hold it.
    :param problem: why this process cannot take part, so that the others need not wait for it; "" if it can.
    :param timeout: seconds after which a process that waits for another one gives up.
    :raises InputError: see `difference`. LostPeer: they did not meet.
    """

    def __init__(self, ranks=None, device=None, flags=None, problem="", timeout=600.0):
        ranks = ranks or Ranks()
        self.rank, self.world_size, self.main = ranks.rank, ranks.world_size, ranks.rank == 0
        self.beat = min(5.0, timeout / 4)  # seconds between the collectives that wait for rank 0's work
        if self.world_size == 1:
            if problem:
                raise InputError(problem)
            return
        os.environ |= {"MASTER_ADDR": ranks.address, "MASTER_PORT": str(ranks.port)}
        meeting, timeout = (datetime.timedelta(seconds=seconds) for seconds in (MEETING_S, timeout))
        try:
            store, _, _ = next(dist.rendezvous("env://", self.rank, self.world_size, timeout=meeting))
            # By the store, before there is a group: a process with a problem may have another backend.
            facts = [{**(flags or {}), "device": device.type}, device_identity(device), problem]
            self._compare(dist.PrefixStore("facts", store), facts)
            store = dist.PrefixStore("run", store)
            options = {"rank": self.rank, "world_size": self.world_size, "timeout": timeout}
            dist.init_process_group(backend_for(device), store=store, **options)
        except (RuntimeError, OSError) as error:
            reason = str(error).split("\n")[0][:200]
            place = f"{ranks.address}:{ranks.port} (MASTER_ADDR, MASTER_PORT)"
            raise LostPeer(
                f"rank {self.rank}: the processes did not meet at {place}: {reason}; did all start?"
            ) from None

    def _compare(self, store, facts):
        everyone = range(self.world_size)
        store.set(f"facts{self.rank}", json.dumps(facts))
        problem = difference([json.loads(store.get(f"facts{rank}")) for rank in everyone])
        store.set(f"read{self.rank}", "")
        if problem:
            if self.main:  # its process may hold what the others are reading
                with suppress(RuntimeError):
                    store.wait([f"read{rank}" for rank in everyone], datetime.timedelta(seconds=10))
            raise InputError(problem)

    def wrap(self, model, device):
        """Return what to call for the forward pass so that gradients become the mean over the ranks."""
        if self.world_size == 1:
            return model
        own = [device.index] if device.index is not None else None
        return DistributedDataParallel(model, device_ids=own, gradient_as_bucket_view=True)

    # -- agreeing -----------------------------------------------------------------------------------------------------

    def gather(self, value):
        """Return the values (any plain Python object) of all ranks, in their order."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values

    def largest(self, number):
        """Return the largest of the ranks' integers."""
        if self.world_size == 1:
            return number
        found = torch.tensor([number], dtype=torch.int64)  # host memory: no accelerator waits
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return int(found)

    def joined(self, tensor):
        """Return the ranks' tensors of one shape, concatenated in the order of the ranks."""
        if self.world_size == 1:
            return tensor
        found = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(found, tensor.contiguous())
        return torch.cat(found)

    def run_on_main(self, work):
        """Run a function in rank 0 alone; return its result there, None in the others, when it is done.

        Meanwhile all ranks meet every few seconds, so that it may take longer than the timeout.
        """
        if self.world_size == 1:
            return work()
        future = Future()
        if self.main:
            Thread(target=_fulfil, args=(future, work), daemon=True).start()
        else:
            future.set_result(None)
        try:
            while self.largest(int(not future.done())):
                wait([future], self.beat)
        except RuntimeError:  # a rank is lost: what is being saved shall be whole all the same
            wait([future])
            raise
        return future.result()

    def main_first(self, work):
        """Run a function in rank 0 before it runs in the others; return its result in each."""
        found = self.run_on_main(work)
        return found if self.main else work()

    # -- ending -------------------------------------------------------------------------------------------------------

    @contextmanager
    def guarded(self):
        """Leave together; an error names its rank, and a lost connection becomes `LostPeer`."""
        try:
            yield
        except KeyboardInterrupt as stop:
            if self.world_size > 1 and getattr(stop, "agreed", False):
                self._close()
                if not self.main:
                    sys.exit(0)  # rank 0 alone says why, and gives the job its code,
                time.sleep(2)  # last of all: srun kills the others at the first code that is not 0
            raise
        except Exception as error:
            if self.world_size == 1:
                raise
            text = " ".join(str(error).split()) or type(error).__name__
            if _is_connection_error(error):
                raise LostPeer(
                    f"rank {self.rank} ends because it lost another one: was it killed? ({text[:300]})"
                ) from None
            for kind in (InputError, OSError):
                if isinstance(error, kind):
                    raise kind(f"rank {self.rank}: {text}") from None
            raise
        else:
            self._close()

    def _close(self):
        if self.world_size > 1:
            self.largest(0)
            dist.destroy_process_group()
            time.sleep(0.5)  # a gloo thread that lets go of its last tensor while Python ends would abort the process


def _fulfil(future, work):
    try:
        future.set_result(work())
    except BaseException as error:
        future.set_exception(error)


def difference(found):
    """Say what keeps processes from training together, "" if nothing does.

    :param found: for each rank a dict of what must be the same, its `device_identity`, and its own problem or "".
    """
    first, seen = found[0][0], {}
    for rank, (_, _, problem) in enumerate(found):
        if problem:
            return f"rank {rank}: {problem}"
    for rank, (facts, place, _) in enumerate(found):
        for name, value in first.items():
            if facts.get(name) != value:
                values = f"{facts.get(name)!r} in rank {rank} and {value!r} in rank 0"
                return f"--{name} is {values}: give all processes the same flags and the same kind of device"
        if place is not None and seen.setdefault(place, rank) != rank:
            hint = "give each process its own (such as --gres=gpu:4 with --ntasks-per-node=4), or start fewer"
            return f"ranks {seen[place]} and {rank} have the same GPU ({place}): {hint}"
    return ""


def _is_connection_error(error):
    found = any(word in str(error).lower() for word in ("gloo", "nccl", "connection closed", "connection reset"))
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and found)
