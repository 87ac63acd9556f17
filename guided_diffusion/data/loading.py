"""Batches of scenes, in an order that is a function of (seed, position).

A *position* is the place of a sample in the endless data order. Epoch e = position // n visits all n scenes in a
permutation that follows from (seed, e); flip and crop follow from (seed, position). So batch size, workers and ranks
change nothing, and resuming is starting at a position.
"""

import atexit
import multiprocessing
import signal
import sys
import weakref
from functools import lru_cache

import torch
from torch.utils.data import DataLoader, Dataset

from ..console import InputError
from ..random_streams import generator

_unfinished = weakref.WeakSet()  # generators of batches that may have workers


@lru_cache(maxsize=4)
def _permutation(seed, epoch, n):
    return torch.randperm(n, generator=generator(seed, "order", epoch)).tolist()


def order(seed, position, n):
    """Return the index in 0..n-1 of the scene at a position of the endless data order."""
    epoch, place = divmod(position, n)
    return _permutation(seed, epoch, n)[place]


def scene_batches(dataset, *, batch_size, deterministic=False, start=0, rank=0, world_size=1, prepare=None, **reading):
    """Return a generator of the batches of a `SceneDataset`; parameters and errors as in `load_data`."""
    if batch_size < 1 or start < 0:
        raise InputError(f"batch_size {batch_size}, start {start}: they must be at least 1 and 0")
    end = len(dataset) if deterministic else sys.maxsize
    firsts = range(start + rank * batch_size, end, batch_size * world_size)
    loader = DataLoader(
        _Batches(dataset, not deterministic, prepare),
        batch_size=None,  # the dataset makes whole batches
        sampler=(range(first, min(first + batch_size, end)) for first in firsts),  # positions
        worker_init_fn=_init_worker,
        generator=torch.Generator(),  # else the loader draws from torch's global stream
        **reading,
    )
    batches = _checked(loader)
    _unfinished.add(batches)
    return batches


def _checked(loader):
    for batch in loader:
        if isinstance(batch, InputError):
            raise batch
        yield batch


@atexit.register
def _end_workers():
    # Here, because they ignore the SIGTERM with which multiprocessing would end them later in the exit
    for batches in list(_unfinished):
        batches.close()
    for worker in multiprocessing.active_children():  # one that missed torch's goodbye
        worker.kill()


class _Batches(Dataset):
    """Batches by ranges of positions. An InputError is returned, not raised: torch would bury it in a traceback."""

    def __init__(self, dataset, shuffled, prepare):
        self.dataset, self.shuffled, self.prepare = dataset, shuffled, prepare

    def __getitem__(self, positions):
        try:
            batch = collate([self._sample(position) for position in positions])
            return self.prepare(batch) if self.prepare else batch
        except InputError as error:
            return error

    def _sample(self, position):
        index = order(self.dataset.seed, position, len(self.dataset)) if self.shuffled else position
        return self.dataset.item(index, position)


def collate(samples):
    """Stack samples into a batch; InputError where their sizes differ."""
    first = samples[0]
    for sample in samples:
        if sample["label"].shape != first["label"].shape:
            found = f"{first['path']} and {sample['path']} differ in size or aspect"
            raise InputError(f"{found}; use --batch_size 1 or pictures of one aspect")
    batch = {key: torch.stack([each[key] for each in samples]) for key in first if torch.is_tensor(first[key])}
    batch["path"] = [sample["path"] for sample in samples]
    batch["position"] = torch.tensor([sample["position"] for sample in samples])  # (N,)
    return batch


def _init_worker(_):
    torch.set_num_threads(1)
    # What is sent to every process of a job is the main process's to answer; it ends its workers
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
