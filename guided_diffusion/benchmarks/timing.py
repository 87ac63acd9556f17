"""Clocks, rates and peaks: what all parts measure with."""

import contextlib
import multiprocessing
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..training.devices import half_dtype, products_as_convolutions, synchronize, tf32

TIMED_S = 0.05  # of products in one timing: a GPU takes less for one than its clock can tell


@dataclass(frozen=True)
class Contender:
    """One of several ways to do the same.

    :param run: function without arguments that does it once.
    :param context: function that gives the context to do it in, such as autocast.
    """

    run: Callable
    context: Callable = contextlib.nullcontext


def seconds(contender, device):
    """Return the seconds that one run takes, all of the device's work included."""
    with contender.context():
        synchronize(device)
        start = time.perf_counter()
        contender.run()
        synchronize(device)
        return time.perf_counter() - start


def alternate(contenders, rounds, device, tell=None, too_large=None):
    """Run contenders in turn, so that what slows the machine for a while slows all of them.

    :param contenders: dict from names to `Contender`.
    :param rounds: how often each is timed, after one round that is not.
    :param tell: function of a text.
    :param too_large: function of the name of a contender that ran out of memory; it is left out from then on. None: the
        error is raised.
    :return: dict from names to lists of seconds, round by round.
    """
    times = {name: [] for name in contenders}
    for k in range(rounds + 1):
        for name in list(times):
            if tell:
                words = " ".join(map(str, name)) if isinstance(name, tuple) else name
                tell(f"{words}, {f'{k} of {rounds}' if k else 'warm-up'}")
            try:
                taken = seconds(contenders[name], device)
            except torch.OutOfMemoryError:
                if too_large is None:
                    raise
                taken = None
            if taken is None:  # not in the handler: its traceback holds on to the tensors
                del times[name]
                too_large(name)
            elif k:
                times[name].append(taken)
    return times


def quantile(values, share):
    """Return a quantile of a list, interpolated."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def summary(times, name, reference):
    """Return median and spread of one contender in milliseconds, and by how much it is faster than the reference.

    The factor is the median over rounds of the two times' ratio, None where the reference was left out.
    """
    own, ratio = times[name], None
    if reference in times:
        ratio = statistics.median(base / mine for base, mine in zip(times[reference], own, strict=True))
    return {
        "ms": 1e3 * statistics.median(own),
        "p10_ms": 1e3 * quantile(own, 0.1),
        "p90_ms": 1e3 * quantile(own, 0.9),
        "times_faster": ratio,
    }


# -- arithmetic -------------------------------------------------------------------------------------------------------


def flops(run):
    """Return the floating-point operations of one run: of products and convolutions, as torch's FlopCounterMode counts."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


class MatmulRate:
    """The machine's rate in a product of two square matrices, measured before and after a part, in all precisions.

    :param setup: the `Setup`, which says on which device and how large they are.
    """

    def __init__(self, setup):
        self.device, self.side, self.repeats, self.tell = setup.device, setup.side, 2 if setup.quick else 3, setup.tell
        self.precisions = list(dict.fromkeys(["fp32", *setup.precisions]))
        self.best = {precision: [] for precision in self.precisions}
        self.measure()

    def measure(self):
        """Time the products again, and keep the best of a few timings, each of as many products as TIMED_S takes."""
        stream = torch.Generator().manual_seed(0)
        for precision in self.precisions:
            self.tell(f"matrix product, {precision}")
            dtype = half_dtype(precision) or torch.float32
            a, b = (torch.randn(self.side, self.side, generator=stream).to(self.device, dtype) for _ in range(2))
            with products_as_convolutions(self.device):
                self._seconds(a, b, 1)
                one = self._seconds(a, b, 1)
                count = max(1, round(TIMED_S / one))
                fastest = min(one, *(self._seconds(a, b, count) / count for _ in range(self.repeats - 1)))
            self.best[precision].append(2 * self.side**3 / fastest)

    def _seconds(self, a, b, count):
        def run():
            for _ in range(count):
                a @ b

        return seconds(Contender(run), self.device)

    def rate(self, precision):
        """Median of the measurements, in FLOP/s."""
        return statistics.median(self.best[precision])

    def share(self, count, milliseconds, precision):
        """Share of that rate, in percent, at which `count` operations in `milliseconds` run."""
        return 100 * count / (milliseconds / 1e3) / self.rate(precision)

    def notes(self):
        """One line per precision, and on a GPU one about TF32."""
        lines = [
            f"{precision}: a product of {self.side}² matrices runs at {self.rate(precision) / 1e9:.0f} GFLOP/s ("
            + ", ".join(f"{rate / 1e9:.0f}" for rate in self.best[precision])
            + " before and after)"
            for precision in self.precisions
        ]
        rounding = tf32(self.device)
        if rounding is not None:
            convolutions, products = ("on" if value else "off" for value in rounding)
            lines.append(
                f"fp32: TF32 is {convolutions} for the network's convolutions and {products} for its products; for the"
                f" product of {self.side}² matrices it is {convolutions}"
            )
        return lines


# -- memory -----------------------------------------------------------------------------------------------------------


def in_fresh_process(function, *arguments):
    """Return function(*arguments) from a new Python process, whose memory is its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def resident(peak=False):
    """Return this process's resident memory, or its peak, in bytes."""
    wanted = "VmHWM:" if peak else "VmRSS:"
    try:
        with open("/proc/self/status") as f:
            return next(1024 * int(line.split()[1]) for line in f if line.startswith(wanted))
    except OSError:  # not Linux: the peak alone, which other systems' children do not inherit
        import resource
        import sys

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def forget_peak():
    """Let this process's peak of resident memory begin anew; return whether the system can do that (Linux can)."""
    try:
        with open("/proc/self/clear_refs", "w") as f:
            f.write("5")
    except OSError:
        return False
    return True
