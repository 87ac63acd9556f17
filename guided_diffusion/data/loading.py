"""Batches of scenes, in an order that is a function of (seed, position).

A *position* is the place of a sample in the endless data order. Epoch e = position // n visits all n scenes in a
permutation that follows from (seed, e); flip and crop follow from (seed, position). So batch size, workers and ranks
change nothing, and resuming is starting at a position. A bad file that is skipped keeps its position: the next good scene
of the list stands in for it.
"""

import math
import os
import signal
import threading
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
    """Return the index in 0..n-1 of the scene at a position of the endless data order.

    Every epoch (n positions) is a permutation of all scenes that follows from (seed, epoch).
    """
    epoch, place = divmod(position, n)
    return _permutation(seed, epoch, n)[place]


def check_loading(*, batch_size, start, num_workers, on_bad_image, rank, world_size):
    """Raise InputError, naming the flag, for what `scene_batches` does not take."""
    for flag, value, least in (("batch_size", batch_size, 1), ("start", start, 0), ("num_workers", num_workers, 0)):
        if value < least:
            raise InputError(f"--{flag} is {value}; give {least} or more")
    if on_bad_image not in ("error", "skip"):
        raise InputError(f"--on_bad_image is {on_bad_image!r}; give error or skip")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is not in 0..{world_size - 1}")


def scene_batches(
    dataset,
    *,
    batch_size,
    deterministic=False,
    start=0,
    stop=None,
    rank=0,
    world_size=1,
    num_workers=0,
    pin_memory=False,
    on_bad_image="error",
):
    """Return the `SceneBatches` of a `SceneDataset` that is open already; parameters and errors as in `load_data`."""
    check_loading(
        batch_size=batch_size,
        start=start,
        num_workers=num_workers,
        on_bad_image=on_bad_image,
        rank=rank,
        world_size=world_size,
    )
    if deterministic:
        stop = len(dataset) if stop is None else min(stop, len(dataset))
    return SceneBatches(
        dataset,
        Positions(start, stop, batch_size, rank, world_size),
        shuffled=not deterministic,
        skips=on_bad_image == "skip",
        num_workers=num_workers,
        pin_memory=pin_memory,
    )


class SceneBatches:
    """An iterable of batches, and what it draws them from: `dataset`, a `SceneDataset`.

    Every `iter()` begins at the start position again, and ends the pass before it: the workers serve one at a time.
    `next()` on the object itself continues a pass of its own.
    `len()` is the number of batches; it is a TypeError for an endless order.

    :param positions: `Positions`.
    :param shuffled: each epoch in its seeded order, else position and index are the same.
    :param skips: put the next good scene in the place of a bad one.
    """

    def __init__(self, dataset, positions, shuffled, skips, num_workers, pin_memory):
        self.dataset = dataset
        self._positions = positions
        self._loader = DataLoader(
            _Ordered(dataset, shuffled, skips),
            batch_sampler=positions,
            collate_fn=_collate_skipped,
            num_workers=num_workers,
            worker_init_fn=_init_worker,
            pin_memory=pin_memory and torch.accelerator.is_available(),
            generator=torch.Generator(),  # else the loader draws from torch's global stream
        )
        self._pass = None

    def __len__(self):
        return len(self._positions)

    def __iter__(self):
        return _checked(self._loader)

    def __next__(self):
        if self._pass is None:
            self._pass = iter(self)
        return next(self._pass)


def _checked(loader):
    # Not a method: a generator that refers to its owner is a cycle, and workers freed by the cycle collector take 10 s
    for batch in loader:
        if isinstance(batch, InputError):
            raise batch
        yield batch


class Positions:
    """Batches of positions for one rank; endless when `stop` is None (see `load_data`)."""

    def __init__(self, start, stop, batch_size, rank, world_size):
        self.first = start + rank * batch_size
        self.stop = stop
        self.batch_size = batch_size
        self.stride = batch_size * world_size

    def __iter__(self):
        first = self.first
        while self.stop is None or first < self.stop:
            last = first + self.batch_size
            yield list(range(first, last if self.stop is None else min(last, self.stop)))
            first += self.stride

    def __len__(self):
        if self.stop is None:
            raise TypeError("an endless data order has no length")
        return max(0, math.ceil((self.stop - self.first) / self.stride))


class _Ordered(Dataset):
    """The dataset by position: (sample, list of `Skipped`).

    Bad files come back as the InputError itself: torch would bury it in a traceback.
    """

    def __init__(self, dataset, shuffled, skips):
        self.dataset, self.shuffled, self.skips = dataset, shuffled, skips
        self.bad = {}  # index -> InputError, for what this process has met and skips

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, position):
        n, skipped = len(self.dataset), []
        first = order(self.dataset.seed, position, n) if self.shuffled else position
        for turn in range(min(n, MOST_SKIPPED) if self.skips else 1):
            index = (first + turn) % n
            sample = self._item(index, position)
            if not isinstance(sample, InputError):
                return sample, skipped
            skipped.append(Skipped(self.dataset.path(index), str(sample)))
        more = f" (skipping gives up: the {len(skipped) - 1} scenes after it are bad too)" if len(skipped) > 1 else ""
        return InputError(skipped[0].reason + more), []

    def _item(self, index, position):
        if index in self.bad:
            return self.bad[index]
        try:
            return self.dataset.item(index, position)
        except InputError as error:
            found = InputError(*error.args)  # without the causes, which need not survive pickling
            if self.skips and not self.dataset.crops:  # one crop may hold the bad id, and the next not
                self.bad[index] = found
            return found


def collate(samples):
    """Stack samples into a batch; return (not raise) the InputError of a bad file or of sizes that differ."""
    for sample in samples:
        if isinstance(sample, InputError):
            return sample
    first = samples[0]
    for sample in samples:
        if sample["label"].shape != first["label"].shape:
            sizes = [f"{each['path']} ({each['label'].shape[2]}x{each['label'].shape[1]})" for each in (first, sample)]
            return InputError(
                f"{' and '.join(sizes)} differ in size and cannot share a batch; use --batch_size 1 or pictures of one aspect"
            )
    batch = {key: torch.stack([each[key] for each in samples]) for key in first if torch.is_tensor(first[key])}
    batch["path"] = [sample["path"] for sample in samples]
    batch["position"] = torch.tensor([sample["position"] for sample in samples])  # (N,)
    return batch


def _collate_skipped(found):
    """Make a batch of what `_Ordered` gives; `skipped` lists every scene once."""
    samples, skipped = zip(*found, strict=True)
    batch = collate(samples)
    if isinstance(batch, InputError):
        return batch
    return batch | {"skipped": list(dict.fromkeys(each for some in skipped for each in some))}


def _init_worker(_):
    torch.set_num_threads(1)
    # Ctrl-C, and what a scheduler sends to every process of a job, are the main process's to answer; it ends its workers
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey_parent, daemon=True).start()


def _obey_parent():
    """End this worker on a SIGTERM of its main process; nobody else's counts."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
