"""Batches of scenes, in an order that is a function of (seed, position).

A *position* is the place of a sample in the endless data order. Epoch e = position // n visits all n scenes in a
permutation that follows from (seed, e); flip and crop follow from (seed, position). So batch size, workers and ranks
change nothing, and resuming is starting at a position. A bad scene that is skipped keeps its position.
"""

import atexit
import signal
import sys
import weakref
from functools import lru_cache
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset

from ..console import InputError
from ..random_streams import generator

MOST_SKIPPED = 100  # bad scenes in a row that are skipped; more look like a lost folder or a wrong flag


class Skipped(NamedTuple):
    """A bad scene that another one stood in for: the path of its image (else of its label), and why."""

    path: str
    reason: str


@lru_cache(maxsize=4)
def _permutation(seed, epoch, n):
    return torch.randperm(n, generator=generator(seed, "order", epoch)).tolist()


def order(seed, position, n):
    """Return the index in 0..n-1 of the scene at a position of the endless data order."""
    epoch, place = divmod(position, n)
    return _permutation(seed, epoch, n)[place]


def scene_batches(
    dataset,
    *,
    batch_size,
    deterministic=False,
    start=0,
    rank=0,
    world_size=1,
    on_bad_image="error",
    prepare=None,
    num_workers=0,
    pin_memory=False,
):
    """Return a generator of the batches of a `SceneDataset`; parameters and errors as in `load_data`."""
    for flag, value, least in (("batch_size", batch_size, 1), ("start", start, 0), ("num_workers", num_workers, 0)):
        if value < least:
            raise InputError(f"--{flag} is {value}; give {least} or more")
    if on_bad_image not in ("error", "skip"):
        raise InputError(f"--on_bad_image is {on_bad_image!r}; give error or skip")
    end = len(dataset) if deterministic else sys.maxsize
    firsts = range(start + rank * batch_size, end, batch_size * world_size)
    loader = DataLoader(
        _Batches(dataset, not deterministic, on_bad_image == "skip", prepare),
        batch_size=None,  # the dataset makes whole batches
        sampler=(range(first, min(first + batch_size, end)) for first in firsts),  # positions
        num_workers=num_workers,
        collate_fn=_unchanged,
        worker_init_fn=_init_worker,
        pin_memory=pin_memory and torch.accelerator.is_available(),
        generator=torch.Generator(),  # else the loader draws from torch's global stream
    )
    batches = _checked(loader)
    _unfinished.add(batches)
    return batches


def _checked(loader):
    for batch in loader:
        if isinstance(batch, InputError):
            raise batch
        yield batch


_unfinished = weakref.WeakSet()  # generators of batches that may have workers


@atexit.register
def _end_workers():
    # Here, because they ignore the SIGTERM with which multiprocessing would end them later in the exit
    for batches in list(_unfinished):
        batches.close()


class _Batches(Dataset):
    """Batches by ranges of positions. An InputError is returned, not raised: torch would bury it in a traceback."""

    def __init__(self, dataset, shuffled, skips, prepare):
        self.dataset, self.shuffled = dataset, shuffled
        self.most = min(len(dataset), MOST_SKIPPED) if skips else 1  # scenes that are tried for a position
        self.prepare = prepare or _unchanged

    def __getitem__(self, positions):
        skipped = {}  # as an ordered set
        try:
            batch = collate([self._sample(position, skipped) for position in positions])
            return self.prepare(batch | {"skipped": list(skipped)})
        except InputError as error:
            return error

    def _sample(self, position, skipped):
        """Return the sample at a position, or the next good one; add the bad scenes before it to `skipped`."""
        n, bad = len(self.dataset), []
        first = order(self.dataset.seed, position, n) if self.shuffled else position
        for index in range(first, first + self.most):
            try:
                sample = self.dataset.item(index % n, position)
            except InputError as error:
                bad.append(Skipped(self.dataset.path(index % n), str(error)))
            else:
                skipped.update(dict.fromkeys(bad))
                return sample
        more = f" (skipping gives up: the {len(bad) - 1} scenes after it are bad too)" if len(bad) > 1 else ""
        raise InputError(bad[0].reason + more)


def collate(samples):
    """Stack samples into a batch; InputError where their sizes differ."""
    first = samples[0]
    for sample in samples:
        if sample["label"].shape != first["label"].shape:
            sizes = [f"{each['path']} ({each['label'].shape[2]}x{each['label'].shape[1]})" for each in (first, sample)]
            raise InputError(f"{' and '.join(sizes)} differ in size; use --batch_size 1 or pictures of one aspect")
    batch = {key: torch.stack([each[key] for each in samples]) for key in first if torch.is_tensor(first[key])}
    batch["path"] = [sample["path"] for sample in samples]
    batch["position"] = torch.tensor([sample["position"] for sample in samples])  # (N,)
    return batch


def _unchanged(batch):
    return batch


def _init_worker(_):
    torch.set_num_threads(1)
    # What is sent to every process of a job is the main process's to answer; it ends its workers
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
