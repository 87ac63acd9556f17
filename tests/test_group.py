"""What processes agree on and how they end. Real processes are in test_processes."""

import signal
import threading

import pytest
import torch
import torch.distributed as dist

from guided_diffusion.console import InputError, Interrupted
from guided_diffusion.training import group as module
from guided_diffusion.training.group import FAILED, Group, LostPeer, _Watch, is_connection_error


def test_alone_a_problem_is_an_error():
    with pytest.raises(InputError, match=r"^no GPU$"):
        Group(problem="no GPU")


def test_alone_everything_agrees():
    group, tensor = Group(), torch.arange(3.0)
    assert (group.rank, group.world_size, group.main) == (0, 1, True)
    assert group.gather("x") == ["x"] and group.largest(7) == 7
    assert group.mean(tensor) is tensor and group.joined(tensor) is tensor
    with group.main_first():
        group.barrier()


@pytest.mark.parametrize("error", [InputError("bad flag"), OSError("disk"), RuntimeError("gloo"), KeyboardInterrupt()])
def test_alone_errors_are_left_as_they_are(error):
    with pytest.raises(type(error)) as found, Group().guarded():
        raise error
    assert found.value is error


@pytest.mark.parametrize(
    "error, lost",
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:545] Connection closed by peer"), True),
        (RuntimeError("NCCL error: remote process exited"), True),
        (dist.DistNetworkError("Broken pipe"), True),
        (RuntimeError("shape mismatch"), False),
        (InputError("gloo"), False),
    ],
)
def test_errors_that_only_come_of_a_lost_peer(error, lost):
    assert is_connection_error(error) == lost


# -- the watch, two ranks over one store --------------------------------------------------------------------------------


@pytest.fixture
def watches(monkeypatch):
    """Function rank -> a running `_Watch` of two ranks; `ended` lists (rank, reason) instead of ending the process."""
    monkeypatch.setattr(module, "BEAT_S", 0.1)
    ended, found, store = [], [], dist.HashStore()
    told = threading.Event()

    def note(watch, reason):
        ended.append((watch.rank, reason))
        watch._stopped.set()
        told.set()

    monkeypatch.setattr(_Watch, "_end", note)

    def make(rank):
        found.append(_Watch(store, rank, 2))
        return found[-1]

    make.ended, make.told, make.store = ended, told, store
    yield make
    for watch in found:
        watch.stop()


def test_ranks_that_live_are_left_alone(watches):
    watches(0), watches(1)
    assert not watches.told.wait(3)  # thirty looks


@pytest.mark.parametrize("silent", [0, 1])
def test_a_rank_without_a_sign_of_life_ends_the_other(watches, silent):
    pair = watches(0), watches(1)
    pair[silent].stop()
    assert watches.told.wait(20)
    ((rank, reason),) = watches.ended
    assert rank == 1 - silent and f"rank {silent} has given no sign of life" in reason


def test_a_failure_is_told_to_all_and_the_first_reason_stays(watches):
    pair = watches(0), watches(1)
    pair[1].announce("rank 1 failed: no data")
    pair[0].announce("rank 0 failed: rank 1 is gone")
    assert watches.told.wait(20) and watches.ended[0][1] == "rank 1 failed: no data"
    assert pair[0].reason(1) == "rank 1 failed: no data" and watches.store.get(FAILED) == b"rank 1 failed: no data"


def test_a_store_that_is_gone_is_noticed(watches, monkeypatch):
    watch = watches(1)

    class Gone:
        def __getattr__(self, name):
            raise RuntimeError("Connection reset")

    watch.store = Gone()
    assert watches.told.wait(20) and watches.ended == [(1, "rank 0 is gone; was it killed?")]
    assert watch.reason(0.2) == ""


def test_a_store_that_never_answers_is_noticed(watches):
    class Hanging:
        def __getattr__(self, name):
            return lambda *_: threading.Event().wait()

    watch = watches(1)
    watch.store = Hanging()
    assert watches.told.wait(20) and watches.ended == [(1, "rank 0 has not answered for 2 s; was it killed?")]
    assert watch.reason(0.2) == ""  # nor does asking for the reason, or announcing one, wait for ever
    watch.announce("rank 1 failed")


def test_a_save_is_not_broken_off(monkeypatch, capsys):
    monkeypatch.setattr(module, "BEAT_S", 0.02)
    ended = []
    monkeypatch.setattr(module.os, "_exit", ended.append)
    watch = _Watch(dist.HashStore(), 1, 2)
    watch.holding.set()
    ending = threading.Thread(target=watch._end, args=("rank 0 is gone",), daemon=True)
    ending.start()
    ending.join(0.5)
    assert ending.is_alive() and not ended
    watch.holding.clear()
    ending.join(20)
    assert ended and "rank 1 ends because rank 0 is gone" in capsys.readouterr().err
    watch.stop()


FACTS = {"device": "cuda", "batch_size": 4}


@pytest.mark.parametrize(
    "found, words",
    [
        ([(FACTS, "a 1", ""), (FACTS, "a 2", ""), (FACTS, "b 1", "")], ""),
        ([({"device": "cpu"}, None, ""), ({"device": "cpu"}, None, "")], ""),
        ([(FACTS, "a 1", ""), (FACTS | {"batch_size": 8}, "a 2", "")], "--batch_size is 8 in rank 1 and 4 in rank 0"),
        (
            [(FACTS, "a 1", ""), (FACTS | {"device": "cpu"}, None, "")],
            "--device is 'cpu' in rank 1 and 'cuda' in rank 0",
        ),
        ([(FACTS, "a 1", ""), (FACTS, "b 1", ""), (FACTS, "a 1", "")], "ranks 0 and 2 have the same GPU (a 1)"),
        ([(FACTS, "a 1", ""), (FACTS | {"device": "cpu"}, None, "no GPU")], "rank 1: no GPU"),
    ],
)
def test_what_keeps_processes_from_training_together(found, words):
    assert module.difference(found).startswith(words) and bool(module.difference(found)) == bool(words)


# -- how a rank ends ----------------------------------------------------------------------------------------------------


class Watched:
    """Stands in for a `_Watch`."""

    def __init__(self, reason=""):
        self.found, self.announced, self.stopped = reason, [], False

    def reason(self, seconds):
        return self.found

    def announce(self, text):
        self.announced.append(text)

    def stop(self):
        self.stopped = True


def second_of_two(watch):
    group = Group()
    group.rank, group.world_size, group.main, group._watch = 1, 2, False, watch
    return group


@pytest.mark.parametrize(
    ("error", "kind"), [(InputError("no data"), InputError), (FileNotFoundError("no data"), OSError)]
)
def test_an_error_is_announced_and_named_after_its_rank(error, kind):
    watch = Watched()
    with pytest.raises(kind, match=r"^rank 1: no data$"), second_of_two(watch).guarded():
        raise error
    assert watch.announced == ["rank 1 failed: no data"] and watch.stopped


@pytest.mark.parametrize("reason", ["rank 0 failed: no data", ""])
def test_being_told_to_end_after_another_failed_is_no_success(reason):
    # torchrun ends the others by a signal when one has failed.
    with pytest.raises(LostPeer if reason else SystemExit) as found, second_of_two(Watched(reason)).guarded():
        raise Interrupted(signal.SIGTERM)
    assert reason in str(found.value) if reason else found.value.code == 75


def test_a_bug_keeps_its_traceback():
    watch, bug = Watched(), ZeroDivisionError("division")
    with pytest.raises(ZeroDivisionError) as found, second_of_two(watch).guarded():
        raise bug
    assert found.value is bug and watch.announced == ["rank 1 failed: division"]


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("rank 0 failed: no data", "rank 1 ends because rank 0 failed: no data"),
        ("", "it lost the connection to another: was one killed. .gloo"),
    ],
)
def test_a_lost_peer_is_said_with_its_reason(reason, words):
    watch = Watched(reason)
    with pytest.raises(LostPeer, match=words), second_of_two(watch).guarded():
        raise RuntimeError("gloo: Connection closed by peer")
    assert not watch.announced and watch.stopped
