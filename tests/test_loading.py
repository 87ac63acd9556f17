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
from guided_diffusion.data.loading import MOST_SKIPPED, Skipped, order, scene_batches


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


def test_load_data_two_ranks_hold_the_batches_of_one(city):
    one = rows(islice(load(city, batch_size=4, start=3), 3))
    ranks = [list(islice(load(city, batch_size=2, start=3, rank=r, world_size=2), 3)) for r in (0, 1)]
    assert ranks[1][1]["position"].tolist() == [3 + 4 + 2, 3 + 4 + 3]  # start + b·world·N + rank·N + j
    both = rows(ranks[0] + ranks[1])
    assert both.keys() == one.keys() == set(range(3, 15))
    assert all(equal(one[position], both[position]) for position in one)


def test_load_data_resuming_at_k_equals_skipping_k(city):
    whole = rows(islice(load(city, seed=2), 6))
    resumed = rows(islice(load(city, seed=2, start=5), 3))
    assert list(resumed) == list(range(5, 11)) and all(equal(whole[p], resumed[p]) for p in resumed)


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


class Scenes:
    """Scenes in memory, of which `bad` cannot be read."""

    seed = 3

    def __init__(self, count, bad=()):
        self.count, self.bad = count, bad

    def __len__(self):
        return self.count

    def path(self, index):
        return f"{index}.png"

    def item(self, index, position):
        if index in self.bad:
            raise InputError(f"{index}.png cannot be read")
        return {"label": torch.full((1, 1, 1), index), "path": self.path(index), "position": position}


def batches_of(scenes, size=2):
    return scene_batches(scenes, batch_size=size, deterministic=True, on_bad_image="skip")


def spoil(root, *numbers):
    """Cut off the label files of these scenes; return the images' paths."""
    pairs = SceneDataset("cityscapes", root, 8).pairs
    for number in numbers:
        with open(pairs[number].label, "r+b") as f:
            f.truncate(100)
    return [pairs[number].image for number in numbers]


def test_skip_the_next_good_scene_stands_in_for_a_bad_one():
    found = list(batches_of(Scenes(6, bad=(1, 2, 5))))
    assert [label for batch in found for label in batch["label"].flatten().tolist()] == [0, 3, 3, 3, 4, 0]
    assert [position for batch in found for position in batch["position"].tolist()] == list(range(6))
    reasons = {k: Skipped(f"{k}.png", f"{k}.png cannot be read") for k in (1, 2, 5)}
    assert [batch["skipped"] for batch in found] == [[reasons[1], reasons[2]], [reasons[2]], [reasons[5]]]
    assert len(next(batches_of(Scenes(4, bad=(1, 2)), size=4))["skipped"]) == 2  # each is listed once


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_skip_workers_and_ranks_alike(tmp_path, workers, ranks):
    make_cityscapes(tmp_path, count=7)
    spoil(tmp_path, 0, 3, 4)
    one = {"on_bad_image": "skip", "seed": 1}
    plain = list(islice(load(tmp_path, batch_size=6, **one), 4))
    one |= {"batch_size": 6 // ranks, "num_workers": workers, "world_size": ranks}
    split = [list(islice(load(tmp_path, rank=rank, **one), 4)) for rank in range(ranks)]
    for k, batch in enumerate(plain):
        parts = [mine[k] for mine in split]
        for key in ("image", "label", "instance", "position"):
            assert torch.equal(batch[key], torch.cat([part[key] for part in parts]))
        assert set(batch["skipped"]) == {bad for part in parts for bad in part["skipped"]} and batch["skipped"]
    assert all(type(bad) is Skipped for mine in split for batch in mine for bad in batch["skipped"])


def test_skip_where_nothing_good_is_left_the_first_error_is_raised():
    batches = batches_of(Scenes(3, bad=(0, 1, 2)))
    refuse(lambda: next(batches), "0.png cannot be read (skipping gives up: the 2 scenes after it are bad too)")
    assert next(batches_of(Scenes(300, bad=range(MOST_SKIPPED - 1)), size=1))["label"] == MOST_SKIPPED - 1


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
    ends = time.monotonic() + 20
    while any(os.path.exists(f"/proc/{worker}") for worker in workers):
        assert time.monotonic() < ends, "a worker is left"
        time.sleep(0.1)
