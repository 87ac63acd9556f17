import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from itertools import islice

import pytest
import torch
from test_datasets import equal, load, make_cityscapes, refuse, rows

from guided_diffusion.console import InputError
from guided_diffusion.data.datasets import SceneDataset
from guided_diffusion.data.loading import order


@pytest.fixture(scope="module")
def city(tmp_path_factory):
    return make_cityscapes(tmp_path_factory.mktemp("city"))


@pytest.mark.parametrize("n", [1, 2, 7])
def test_order_every_epoch_visits_every_scene_once(n):
    epochs = [[order(5, e * n + k, n) for k in range(n)] for e in range(6)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert n < 7 or len({tuple(epoch) for epoch in epochs}) > 4
    assert n < 7 or epochs[0] != [order(6, k, n) for k in range(n)]


@pytest.mark.parametrize("other", [{"batch_size": 5}, {"num_workers": 2}])
def test_load_data_batch_size_and_workers_change_nothing(city, other):
    plain = rows(islice(load(city, seed=4), 6))
    again = rows(islice(load(city, seed=4, **other), math.ceil(12 / other.get("batch_size", 2))))
    assert all(equal(plain[position], again[position]) for position in range(12))
    assert not all(equal(plain[p], row) for p, row in rows(islice(load(city, seed=5), 6)).items())


def test_load_data_two_ranks_that_start_at_k_hold_the_batches_of_one_behind_k(city):
    one = rows(islice(load(city, batch_size=4), 4))
    ranks = [list(islice(load(city, batch_size=2, start=3, rank=r, world_size=2), 3)) for r in (0, 1)]
    assert ranks[1][1]["position"].tolist() == [3 + 4 + 2, 3 + 4 + 3]  # start + b·world·N + rank·N + j
    both = rows(ranks[0] + ranks[1])
    assert [*both] == [3, 4, 7, 8, 11, 12, 5, 6, 9, 10, 13, 14]
    assert all(equal(one[position], both[position]) for position in both)


@pytest.mark.parametrize(("world_size", "start"), [(1, 0), (2, 1), (7, 0), (2, 5)])
def test_load_data_one_pass_covers_every_scene_once(city, world_size, start):
    found = []
    for rank in range(world_size):
        mine = load(city, deterministic=True, start=start, rank=rank, world_size=world_size)
        found += [row for batch in mine for row in zip(batch["position"].tolist(), batch["path"], strict=True)]
    paths = [pair.image for pair in SceneDataset("cityscapes", city, 8).pairs]
    assert sorted(found) == list(enumerate(paths))[start:]


def test_load_data_global_random_state_is_left_alone(city):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(islice(load(city, num_workers=1), 2))
    assert torch.equal(before, torch.get_rng_state())


class Halve:
    """A `prepare` that notes the process it runs in; `refuse` makes it raise."""

    def __init__(self, refuse=False):
        self.refuse = refuse

    def __call__(self, batch):
        if self.refuse:
            raise InputError("no batch like this")
        return {"half": batch["image"] / 2, "process": os.getpid(), "position": batch["position"]}


@pytest.mark.parametrize("workers", [0, 2])
def test_prepare_runs_in_the_workers(city, workers):
    plain, halved = (load(city, num_workers=workers, **way) for way in ({}, {"prepare": Halve()}))
    for batch, half in islice(zip(plain, halved, strict=False), 3):
        assert torch.equal(half["half"], batch["image"] / 2) and torch.equal(half["position"], batch["position"])
        assert (half["process"] == os.getpid()) == (workers == 0)
    refuse(lambda: next(load(city, num_workers=workers, prepare=Halve(refuse=True))), "no batch like this")


def test_workers_leave_signals_to_the_main_process_and_end_with_their_batches(city):
    others = multiprocessing.active_children()
    batches = load(city, num_workers=2, batch_size=1)
    next(batches), next(batches)  # one of each worker: both have started
    workers = [child for child in multiprocessing.active_children() if child not in others]
    assert len(workers) == 2
    for worker in workers:
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            os.kill(worker.pid, number)
    assert [len(batch["path"]) for batch in islice(batches, 20)] == [1] * 20
    started = time.monotonic()
    del batches
    assert not any(worker.is_alive() for worker in workers) and time.monotonic() - started < 3


@pytest.mark.slow
@pytest.mark.parametrize("way", ["", "raise ValueError", "os.kill(os.getpid(), 9)"])
def test_workers_end_with_the_main_process(city, way):
    code = f"""
import multiprocessing, os
from guided_diffusion import load_data
batches = load_data(dataset_mode="cityscapes", data_dir={str(city)!r}, batch_size=1, image_size=8, num_workers=2)
next(batches)
print(*[child.pid for child in multiprocessing.active_children()], flush=True)
{way}
"""
    program = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    workers = program.stdout.readline().split()
    assert len(workers) == 2 and program.wait(20) == {"": 0, "raise ValueError": 1}.get(way, -9)
    ends = time.monotonic() + 60  # a busy machine takes its time
    while any(os.path.exists(f"/proc/{worker}") for worker in workers):
        assert time.monotonic() < ends, "a worker is left"
        time.sleep(0.1)
