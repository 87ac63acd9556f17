"""The processes of one training run: how they meet, what they agree on, and how they learn that one of them has failed."""

import datetime
import json
import os
import sys
import threading
import time
from contextlib import contextmanager, suppress

import torch
import torch.distributed as dist

from ..console import InputError
from .distributed import backend_for, device_identity
from .ranks import Ranks

MEETING = datetime.timedelta(seconds=300)  # for all processes to have started
COLLECTIVE = datetime.timedelta(
    minutes=60
)  # a save of many GB may take long; that a process died is noticed by `_Watch`
BEAT_S, SILENT_BEATS = 2.0, 15  # a process whose sign of life has not changed for so many looks is taken for dead
HOLD_S = 900.0  # longest time for which a save goes on after another process is lost
FAILED = "failed"


class LostPeer(OSError):
    """Another process of the run failed or vanished."""


class Group:
    """The processes of one run. A single one needs no process group: everything here then costs nothing.

    :param ranks: this process's `Ranks`.
    :param device: its torch device.
    :param flags: dict of what must be the same in all of them; JSON must be able to hold it.
    :param problem: why this process cannot take part, so that the others need not wait for it; "" if it can.
    :raises InputError: one has a problem, flags or kinds of device differ, or two processes have the same GPU.
    :raises LostPeer: they did not meet.
    """

    def __init__(self, ranks=None, device=None, flags=None, problem=""):
        ranks = ranks or Ranks()
        self.rank, self.world_size, self.main = ranks.rank, ranks.world_size, ranks.rank == 0
        self._watch = None
        if self.world_size > 1:
            self._meet(ranks, device, flags or {}, problem)
        elif problem:
            raise InputError(problem)

    def _meet(self, ranks, device, flags, problem):
        values = {
            "RANK": ranks.rank,
            "WORLD_SIZE": ranks.world_size,
            "MASTER_ADDR": ranks.address,
            "MASTER_PORT": ranks.port,
        }
        os.environ.update({name: str(value) for name, value in values.items()})
        where = f"{ranks.address}:{ranks.port}"
        try:
            store, _, _ = next(dist.rendezvous("env://", ranks.rank, ranks.world_size, timeout=MEETING))
            facts = {**flags, "device": device.type}
            self._compare(dist.PrefixStore("facts", store), facts, device_identity(device), problem)
            dist.init_process_group(
                backend_for(device),
                store=dist.PrefixStore("run", store),
                rank=ranks.rank,
                world_size=ranks.world_size,
                timeout=COLLECTIVE,
            )
            # A connection of its own: the main thread may be waiting on the other one.
            own = dist.TCPStore(ranks.address, ranks.port, is_master=False, wait_for_workers=False, timeout=MEETING)
        except (RuntimeError, OSError) as error:
            reason = str(error).split("\n")[0][:200]
            raise LostPeer(
                f"rank {self.rank}: the {self.world_size} processes did not meet at {where} ({reason});"
                " did all start? MASTER_ADDR and MASTER_PORT change the place"
            ) from None
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._watch = _Watch(dist.PrefixStore(f"watch{attempt}", own), self.rank, self.world_size)

    def _compare(self, store, facts, identity, problem):
        store.set(str(self.rank), json.dumps([facts, identity, problem]))
        problem = difference([json.loads(store.get(str(rank))) for rank in range(self.world_size)])
        if problem:
            if self.main:  # its process holds what the others are reading
                time.sleep(2 * BEAT_S)
            raise InputError(problem)

    # -- agreeing -------------------------------------------------------------------------------------------------------

    def gather(self, value):
        """Return the values (any plain Python object) of all ranks, in their order."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def largest(self, number):
        """Return the largest of the ranks' integers."""
        if self.world_size == 1:
            return number
        found = torch.tensor([number], dtype=torch.int64)  # host memory: no accelerator waits
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return int(found)

    def mean(self, tensor):
        """Return the mean of the ranks' tensors of one shape, on this tensor's device."""
        if self.world_size == 1:
            return tensor
        tensor = tensor.clone()
        dist.all_reduce(tensor)
        return tensor / self.world_size

    def joined(self, tensor):
        """Return the ranks' tensors of one shape, concatenated in the order of the ranks."""
        if self.world_size == 1:
            return tensor
        found = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(found, tensor.contiguous())
        return torch.cat(found)

    def barrier(self):
        """Wait until all ranks are here."""
        self.largest(0)

    @contextmanager
    def main_first(self):
        """Run a block in rank 0 before it runs in the others."""
        if not self.main:
            self.barrier()
        yield
        if self.main:
            self.barrier()

    # -- ending ---------------------------------------------------------------------------------------------------------

    @contextmanager
    def guarded(self):
        """Leave together: what fails in one rank ends all of them with its message; a lost peer becomes `LostPeer`."""
        try:
            yield
        except KeyboardInterrupt as stop:
            agreed = self.world_size == 1 or getattr(stop, "agreed", False)
            reason = "" if agreed else self._watch.reason(1)
            if reason:  # torchrun tells the others to end when one has failed
                self._close(together=False)
                raise LostPeer(f"rank {self.rank} ends because {reason}") from None
            self._close(together=getattr(stop, "agreed", False))
            if not self.main:
                sys.exit(getattr(stop, "code", 130))  # without a word: rank 0 speaks
            raise
        except BaseException as error:
            if self.world_size == 1:
                raise
            told = self._told(error)
            self._close(together=False)
            raise told from (None if isinstance(told, InputError | OSError) else error)
        else:
            self._close(together=True)

    def _told(self, error):
        """Tell the other ranks of this one's error; or return theirs, where the error only came of it."""
        text = " ".join(str(error).split()) or type(error).__name__
        if is_connection_error(error):
            reason = (
                self._watch.reason(seconds=10) or f"it lost the connection to another: was one killed? ({text[:300]})"
            )
            return LostPeer(f"rank {self.rank} ends because {reason}")
        self._watch.announce(f"rank {self.rank} failed: {text}")
        if self.main:  # its process holds the announcement
            time.sleep(2 * BEAT_S)
        for kind in (InputError, OSError):
            if isinstance(error, kind):
                return kind(f"rank {self.rank}: {text}")
        return error

    @contextmanager
    def held(self):
        """Let this process finish a block (a save) although another one is lost meanwhile."""
        if self._watch is None:
            yield
            return
        self._watch.holding.set()
        try:
            yield
        finally:
            self._watch.holding.clear()

    def _close(self, together):
        if self.world_size == 1:
            return
        if together:
            self.barrier()
        self._watch.stop()
        if together:
            dist.destroy_process_group()  # after a failure this could wait for those that are gone


def difference(found):
    """Say what keeps processes from training together, "" if nothing does.

    :param found: for each rank, a dict of what must be the same, the text that tells its GPU from others, or None, and the
        problem that it has itself, or "".
    """
    first, seen = found[0][0], {}
    for rank, (_, _, problem) in enumerate(found):
        if problem:
            return f"rank {rank}: {problem}"
    for rank, (facts, place, _) in enumerate(found):
        for name in first:
            if facts.get(name) != first[name]:
                return (
                    f"--{name} is {facts.get(name)!r} in rank {rank} and {first[name]!r} in rank 0: give all processes the"
                    " same flags and the same kind of device"
                )
        if place is not None and seen.setdefault(place, rank) != rank:
            return (
                f"ranks {seen[place]} and {rank} have the same GPU ({place}): give each process of a node its own (such as"
                " --gres=gpu:4 with --ntasks-per-node=4), or start fewer"
            )
    return ""


def is_connection_error(error):
    """Whether an error is torch.distributed's, which mostly only tells that another process is gone."""
    words, text = ("gloo", "nccl", "connection closed", "connection reset"), str(error).lower()
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in text for word in words)
    )


class _Watch(threading.Thread):
    """Gives signs of life, looks for those of the others and for a failure that one announced, and ends the process then.

    A collective cannot be broken off from outside, so a rank that waits for a failed one in it has to be ended this way.
    """

    def __init__(self, store, rank, world_size):
        super().__init__(daemon=True, name="watch")
        self.store, self.rank = store, rank
        # Rank 0 looks at all; the others look at rank 0, and learn of the rest from it.
        self.peers = {
            peer: [None, 0] for peer in (range(1, world_size) if rank == 0 else [0])
        }  # last sign, looks since
        self.holding = threading.Event()  # something must not be broken off
        self._stopped, self._lost, self._found, self._looks = threading.Event(), 0, "", 0
        self.start()
        threading.Thread(target=self._watch_the_watch, daemon=True, name="watch of the watch").start()

    def run(self):
        while not self._stopped.wait(BEAT_S):
            self._looks += 1
            try:
                self.store.set(f"beat{self.rank}", str(self._looks))
                self._look()
                self._lost = 0
            except RuntimeError:  # the store is gone, and with it rank 0 or the launcher
                self._lost += 1
                if self._lost == 5:
                    self._end("rank 0 is gone; was it killed?")

    def _look(self):
        if self.store.check([FAILED]):
            self._found = self.store.get(FAILED).decode()
            self._end(self._found)
        for peer, last in self.peers.items():
            key = f"beat{peer}"
            sign = self.store.get(key) if self.store.check([key]) else None
            last[:] = (sign, 0) if sign != last[0] else (sign, last[1] + 1)
            if last[1] == SILENT_BEATS:
                reason = f"rank {peer} has given no sign of life for {SILENT_BEATS * BEAT_S:.0f} s; was it killed?"
                self.announce(reason)
                self._end(reason)

    def _watch_the_watch(self):
        # A store whose process hangs, or whose node is gone without a word, answers nothing, and asking it waits for ever.
        last, waited = None, 0
        while not self._stopped.wait(BEAT_S):
            last, waited = (self._looks, 0) if self._looks != last else (last, waited + 1)
            if waited == SILENT_BEATS:
                self._end(f"rank 0 has not answered for {SILENT_BEATS * BEAT_S:.0f} s; was it killed?")

    def _end(self, reason):
        for _ in range(int(HOLD_S / BEAT_S)):
            if not self.holding.is_set() or self._stopped.wait(BEAT_S):
                break
        if self._stopped.wait(3 * BEAT_S):  # what the main thread says itself is better
            return
        print(
            f"{os.path.basename(sys.argv[0])}: error: rank {self.rank} ends because {reason}",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)

    def announce(self, reason):
        """Tell all ranks why the run ends; the first reason stays."""
        _within(5, lambda: self.store.compare_set(FAILED, "", reason))

    def reason(self, seconds):
        """Return why another rank failed, waiting for it to say so; "" where none does."""

        def ask():
            while not self._found and not self._stopped.is_set():
                if self.store.check([FAILED]):
                    self._found = self.store.get(FAILED).decode()
                time.sleep(0.2)

        _within(seconds, ask)
        return self._found

    def stop(self):
        """End the watch."""
        self._stopped.set()
        self.join(2 * BEAT_S)  # it may be waiting for a store that does not answer


def _within(seconds, action):
    """Run an action that asks the store, but wait no longer than that for it: a lost store may never answer."""

    def run():
        with suppress(RuntimeError):  # no store, nobody to tell or to ask
            action()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
