"""The processes of a job: their places (torchrun, srun, mpiexec), what they agree on, and how they end together."""

import json
import os
import re
import socket
import sys
import time
from concurrent.futures import Future, wait
from contextlib import contextmanager
from datetime import timedelta
from threading import Thread
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from ..console import InputError
from .devices import backend_for

TORCHRUN = {"RANK": int, "WORLD_SIZE": int, "LOCAL_RANK": int, "MASTER_ADDR": str, "MASTER_PORT": int}
FIRST_SPECIAL_STEP = 2**32 - 6  # SLURM numbers the batch shell, an interactive salloc shell and the like from the top
MEETING_TIME = timedelta(minutes=5)  # for all processes to have started


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


def find_ranks(environment=os.environ):
    """Return this process's `Ranks`: by torchrun, by an srun step (the batch shell is none), by MPI; else it is alone.

    :raises InputError: naming a variable that is missing or no number, or what MPI lacks.
    """
    if any(name in environment for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")):
        return Ranks(*(_read(environment, name, kind) for name, kind in TORCHRUN.items()))
    mpi_size = max(int(environment.get(name, 1)) for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"))
    in_step = int(environment.get("SLURM_STEP_ID", FIRST_SPECIAL_STEP)) < FIRST_SPECIAL_STEP
    # mpiexec starts its own helpers by srun, one per node; the processes below them are more.
    if in_step and mpi_size in (1, _read(environment, "SLURM_NTASKS")):
        return _from_srun(environment)
    return _from_mpi(mpi_size) if mpi_size > 1 else Ranks()


def _read(environment, name, kind=int):
    try:
        return kind(environment[name])
    except (KeyError, ValueError):
        found = environment.get(name) or "not set"
        raise InputError(f"environment variable {name} is {found}: set it, or unset its launcher's others") from None


def _from_srun(environment):
    rank, size, local_rank = (_read(environment, name) for name in ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"))
    hosts = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    first = re.match(r"(\[[^\]]*\]|[^,\[])*", hosts)[0]  # gpu[03-04,07] of gpu[03-04,07],cpu1
    address = environment.get("MASTER_ADDR") or re.sub(r"\[(\d+)[^\]]*\]", r"\1", first)
    job, step = (int(environment.get(name, 0)) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    port = environment.get("MASTER_PORT", 20000 + (job * 7 + step) % 10000)  # alike on all nodes, another for each step
    return Ranks(rank, size, local_rank, address, int(port))


def _from_mpi(size):
    """Ask mpi4py, and let all agree on where to meet; MPI is not used after that."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        hint = "load your site's MPI module, pip install mpich, or use torchrun"
        raise InputError(f"mpiexec started this, but mpi4py finds no MPI library ({error}): {hint}") from None
    world = MPI.COMM_WORLD
    if world.size != size:
        raise InputError(f"mpiexec started {size} processes, mpi4py sees {world.size}: use the mpiexec of mpi4py's MPI")
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
    if not arrays or "SLURM_ARRAY_TASK_ID" not in environment:
        return Share(ranks.rank, ranks.world_size)
    task, least, most, count = (int(environment[f"SLURM_ARRAY_TASK_{what}"]) for what in ("ID", "MIN", "MAX", "COUNT"))
    step = int(environment.get("SLURM_ARRAY_TASK_STEP", 1))  # 1 for a list such as 0,1,4
    if most - least != step * (count - 1):
        raise InputError(f"--array: {count} tasks from {least} to {most} have gaps; use --array=0-{count - 1}")
    return Share((task - least) // step * ranks.world_size + ranks.rank, count * ranks.world_size)


class LostPeer(OSError):
    """Another process of the run failed or vanished."""


class Group:
    """The processes of one run. A single one needs no process group: everything here then costs nothing.

    :param ranks, device: this process's `Ranks` and torch device.
    :param timeout: seconds after which a process that waits for another one gives up.
    :param flags: dict of what must be the same in all processes.
    :raises LostPeer: the processes did not meet. InputError: their flags differ.
    """

    def __init__(self, ranks=None, device=None, timeout=600.0, flags=None):
        ranks = ranks or Ranks()
        self.rank, self.world_size, self.main = ranks.rank, ranks.world_size, ranks.rank == 0
        self.beat = min(5.0, timeout / 4)  # seconds between the collectives that wait for rank 0's work
        if self.world_size == 1:
            return
        os.environ |= {"MASTER_ADDR": ranks.address, "MASTER_PORT": str(ranks.port)}
        place = {"rank": self.rank, "world_size": self.world_size}
        try:
            store, _, _ = next(dist.rendezvous("env://", **place, timeout=MEETING_TIME))
            store.set(f"flags {self.rank}", json.dumps(flags))
            everyone = [json.loads(store.get(f"flags {rank}")) for rank in range(self.world_size)]
            for rank, other in enumerate(everyone):
                if other != everyone[0]:
                    names = ", ".join(f"--{name}" for name in other if other[name] != everyone[0].get(name))
                    raise InputError(f"rank {rank} and rank 0 have other values of {names}: give all the same")
            timeout = timedelta(seconds=timeout)
            dist.init_process_group(backend_for(device), store=store, timeout=timeout, **place)
        except (RuntimeError, OSError) as error:
            meeting = f"{ranks.address}:{ranks.port} (MASTER_ADDR, MASTER_PORT)"
            raise LostPeer(f"rank {self.rank}: processes did not meet at {meeting}: {str(error)[:200]}") from None

    def wrap(self, model):
        """Return what to call for the forward pass so that gradients become the mean over the ranks."""
        return model if self.world_size == 1 else DistributedDataParallel(model, gradient_as_bucket_view=True)

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
        """Run a function in rank 0 alone; return its result there, None in the others, when it is done."""
        if self.world_size == 1:
            return work()
        future = Future()
        if self.main:
            Thread(target=_fulfil, args=(future, work), daemon=True).start()
        else:
            future.set_result(None)
        try:
            while self.largest(int(not future.done())):  # meeting now and then, it may take longer than the timeout
                wait([future], self.beat)
        except RuntimeError:  # a rank is lost: what is being saved shall be whole all the same
            wait([future])
            raise
        return future.result()

    def main_first(self, work):
        """Run a function in rank 0 before it runs in the others; return its result in each."""
        found = self.run_on_main(work)
        return found if self.main else work()

    @contextmanager
    def guarded(self):
        """Leave together; an error names its rank, and a lost connection becomes `LostPeer`."""
        if self.world_size == 1:
            yield
            return
        try:
            yield
        except KeyboardInterrupt as stop:
            if getattr(stop, "agreed", False):
                self._close()
                if not self.main:
                    sys.exit(0)  # rank 0 alone says why, and gives the job its code,
                time.sleep(2)  # last of all: srun kills the others at the first code that is not 0
            raise
        except RuntimeError as error:
            words = "(?i)gloo|nccl|connection (closed|reset)"
            if not isinstance(error, dist.DistError) and not re.search(words, str(error)):
                raise
            reason = f"was it killed? ({str(error)[-300:]})"  # NCCL says last what happened
            raise LostPeer(f"rank {self.rank} ends because it lost another one: {reason}") from None
        except (InputError, OSError) as error:
            kind = InputError if isinstance(error, InputError) else OSError
            raise kind(f"rank {self.rank}: {error}") from None
        else:
            self._close()
        finally:
            time.sleep(0.5)  # a gloo thread that lets go of its last tensor while Python ends would abort the process

    def _close(self):
        self.largest(0)
        dist.destroy_process_group()


def _fulfil(future, work):
    try:
        future.set_result(work())
    except BaseException as error:
        future.set_exception(error)
