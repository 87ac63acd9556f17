import math
import multiprocessing
import pickle
import signal
import subprocess
import warnings
from itertools import islice

import numpy as np
import pytest
import torch
from test_image_datasets import equal, load, make_cityscapes, make_coco, refuse, rows, save

from guided_diffusion.console import InputError
from guided_diffusion.data.datasets import SceneDataset
from guided_diffusion.data.loading import MOST_SKIPPED, Positions, SceneBatches, Skipped, order
from guided_diffusion.random_streams import uniform


@pytest.fixture(scope="module")
def city(tmp_path_factory):
    return make_cityscapes(tmp_path_factory.mktemp("city"))


# ---- order


@pytest.mark.parametrize("n", [1, 2, 7])
def test_every_epoch_visits_every_scene_once(n):
    epochs = [[order(5, e * n + k, n) for k in range(n)] for e in range(6)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert n < 7 or len({tuple(epoch) for epoch in epochs}) > 4
    assert n < 7 or epochs[0] != [order(6, k, n) for k in range(n)]


@pytest.mark.parametrize("other", [{"batch_size": 1}, {"batch_size": 5}, {"num_workers": 2}])
def test_batch_size_and_workers_change_nothing(city, other):
    plain = rows(islice(load(city, seed=4), 6))
    again = rows(islice(load(city, seed=4, **other), math.ceil(12 / other.get("batch_size", 2))))
    assert all(equal(plain[position], again[position]) for position in range(12))
    assert not all(equal(plain[p], row) for p, row in rows(islice(load(city, seed=5), 6)).items())


def test_two_ranks_hold_the_batches_of_one(city):
    one = rows(islice(load(city, batch_size=4, start=3), 3))
    ranks = [list(islice(load(city, batch_size=2, start=3, rank=r, world_size=2), 3)) for r in (0, 1)]
    assert ranks[1][1]["position"].tolist() == [3 + 4 + 2, 3 + 4 + 3]  # start + b·world·N + rank·N + j
    both = rows(ranks[0] + ranks[1])
    assert both.keys() == one.keys() == set(range(3, 15))
    assert all(equal(one[position], both[position]) for position in one)


def test_resuming_at_k_equals_skipping_k(city):
    whole = rows(islice(load(city, seed=2), 6))
    resumed = rows(islice(load(city, seed=2, start=5), 3))
    assert list(resumed) == list(range(5, 11)) and all(equal(whole[p], resumed[p]) for p in resumed)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize(("start", "stop"), [(0, None), (2, None), (1, 4), (0, 99), (5, None)])
def test_one_pass_covers_every_scene_once(city, world_size, start, stop):
    found = []
    for rank in range(world_size):
        batches = load(city, deterministic=True, start=start, stop=stop, rank=rank, world_size=world_size)
        mine = list(batches)
        assert len(mine) == len(batches)
        found += [row for batch in mine for row in zip(batch["position"].tolist(), batch["path"], strict=True)]
    paths = [pair.image for pair in batches.dataset.pairs]
    assert sorted(found) == list(enumerate(paths))[start : min(stop or 5, 5)]


def test_one_pass_can_be_repeated_and_ends_with_a_smaller_batch(city):
    for workers in (0, 2):
        batches = load(city, deterministic=True, num_workers=workers)
        assert next(batches)["position"].tolist() == [0, 1]  # abandoned
        for _ in range(2):
            assert [len(batch["path"]) for batch in batches] == [2, 2, 1]


def test_training_is_endless_unless_stopped(city):
    batches = load(city, image_size=4)
    assert len(list(islice(batches, 20))) == 20
    with pytest.raises(TypeError, match="endless"):
        len(batches)
    assert [len(batch["path"]) for batch in load(city, start=6, stop=9)] == [2, 1]


def test_global_random_state_is_left_alone(city):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(islice(load(city, num_workers=1), 2))
    assert torch.equal(before, torch.get_rng_state())


def test_everything_pickles_for_spawned_workers(city):
    batches = load(city)
    again = pickle.loads(pickle.dumps(batches.dataset))
    assert equal(again.item(0, 7), batches.dataset.item(0, 7))


def test_pin_memory_without_accelerator_is_silent(city):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        next(load(city, pin_memory=True))


# ---- bad files


class Scenes:
    """Scenes in memory, of which `bad` cannot be read; `reads` notes every attempt."""

    seed, crops = 3, False

    def __init__(self, count, bad=()):
        self.count, self.bad, self.reads = count, bad, []

    def __len__(self):
        return self.count

    def path(self, index):
        return f"{index}.png"

    def item(self, index, position):
        self.reads.append(index)
        if index in self.bad:
            raise InputError(f"{index}.png cannot be read")
        return {"label": torch.full((1, 1, 1), index), "path": self.path(index), "position": position}


def batches_of(scenes, size=2, stop=None, shuffled=False, workers=0, rank=0, world_size=1):
    positions = Positions(0, stop or len(scenes), size, rank, world_size)
    return SceneBatches(scenes, positions, shuffled, skips=True, num_workers=workers, pin_memory=False)


def spoil(root, *numbers):
    """Cut off the label files of these scenes; return the images' paths."""
    pairs = SceneDataset("cityscapes", root, 8).pairs
    for number in numbers:
        with open(pairs[number].label, "r+b") as f:
            f.truncate(100)
    return [pairs[number].image for number in numbers]


def test_the_next_good_scene_stands_in_for_a_bad_one():
    found = list(batches_of(Scenes(6, bad=(1, 2, 5))))
    assert [label for batch in found for label in batch["label"].flatten().tolist()] == [0, 3, 3, 3, 4, 0]
    assert [position for batch in found for position in batch["position"].tolist()] == list(range(6))
    reasons = {k: Skipped(f"{k}.png", f"{k}.png cannot be read") for k in (1, 2, 5)}
    assert [batch["skipped"] for batch in found] == [[reasons[1], reasons[2]], [reasons[2]], [reasons[5]]]


def test_a_scene_is_listed_once_per_batch():
    (batch,) = batches_of(Scenes(4, bad=(1, 2)), size=4)
    assert [path for path, _ in batch["skipped"]] == ["1.png", "2.png"]


def test_good_scenes_are_untouched_and_a_position_keeps_its_flip(tmp_path):
    make_cityscapes(tmp_path, count=6)
    plain = rows(islice(load(tmp_path, seed=4), 24))
    bad = spoil(tmp_path, 2)[0]
    batches = load(tmp_path, seed=4, on_bad_image="skip")
    found = rows(islice(batches, 24))
    for position, row in plain.items():
        if row["path"] == bad:
            row = batches.dataset.item(3, position) | {"position": torch.tensor(position)}
        assert equal(found[position], row)
    flips = {uniform(4, "flip", position) < 0.5 for position, row in plain.items() if row["path"] == bad}
    assert flips == {True, False}


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_workers_and_ranks_skip_alike(tmp_path, workers, ranks):
    make_cityscapes(tmp_path, count=7)
    spoil(tmp_path, 0, 3, 4)
    one = {"on_bad_image": "skip", "seed": 1, "stop": 24}
    plain = list(load(tmp_path, batch_size=6, **one))
    split = [
        list(load(tmp_path, batch_size=6 // ranks, num_workers=workers, rank=rank, world_size=ranks, **one))
        for rank in range(ranks)
    ]
    for k, batch in enumerate(plain):
        parts = [mine[k] for mine in split]
        for key in ("image", "label", "instance", "position"):
            assert torch.equal(batch[key], torch.cat([part[key] for part in parts]))
        assert set(batch["skipped"]) == {bad for part in parts for bad in part["skipped"]} and batch["skipped"]
    assert all(type(bad) is Skipped for mine in split for batch in mine for bad in batch["skipped"])


def test_a_bad_file_is_read_once_per_process():
    scenes = Scenes(4, bad=(1, 2))
    found = list(batches_of(scenes, stop=40, shuffled=True))
    assert scenes.reads.count(1) == scenes.reads.count(2) == 1
    assert sum(len(batch["skipped"]) for batch in found) > 10  # but it is named whenever it is skipped


def test_crops_are_judged_one_by_one(tmp_path):
    make_coco(tmp_path, count=2, size=(64, 32))
    for k, ids in enumerate((7, 182)):
        label = np.full((32, 64), 7, np.uint8)
        label[:, :16] = ids  # an id too large on the left of the second scene
        save(tmp_path / f"labels/train2017/{k}.png", label)
    whole = load(tmp_path, "coco", batch_size=1, image_size=8, num_classes=183, stop=40)
    holds = [bool((batch["label"] == 182).any()) for batch in whole]
    seconds = [holds[p] for p in range(40) if order(0, p, 2) == 1]
    assert {True, False} <= set(seconds[seconds.index(True) :])  # a good crop comes after a bad one
    batches = load(tmp_path, "coco", batch_size=1, image_size=8, num_classes=182, stop=40, on_bad_image="skip")
    assert [bool(batch["skipped"]) for batch in batches] == holds


def test_where_nothing_good_is_left_the_first_error_is_raised():
    batches = batches_of(Scenes(3, bad=(0, 1, 2)), shuffled=True)
    first = order(Scenes.seed, 0, 3)
    refuse(lambda: next(batches), f"{first}.png cannot be read (skipping gives up: the 2 scenes after it are bad too)")
    many = Scenes(3 * MOST_SKIPPED, bad=range(2 * MOST_SKIPPED))
    refuse(lambda: next(batches_of(many, size=1)), "0.png cannot be read", f"the {MOST_SKIPPED - 1} scenes after it")
    assert many.reads == list(range(MOST_SKIPPED))
    assert next(batches_of(Scenes(300, bad=range(MOST_SKIPPED - 1)), size=1))["label"] == MOST_SKIPPED - 1


# ---- signals


def sent_by_another(pid, *numbers):
    subprocess.run(["sh", "-c", "; ".join(f"kill -{int(number)} {pid}" for number in numbers)], check=True)


def test_workers_leave_the_signals_of_a_job_to_the_main_process(city):
    batches = load(city, num_workers=2, batch_size=1)
    next(batches), next(batches)  # one of each worker: both have started
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for worker in workers:
        sent_by_another(worker.pid, signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    assert [len(batch["path"]) for batch in islice(batches, 20)] == [1] * 20
    assert all(worker.is_alive() for worker in workers)
    for worker in workers:
        worker.terminate()  # the main process itself
        worker.join(10)
        assert not worker.is_alive()
