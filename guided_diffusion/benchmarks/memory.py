"""Peak memory of a step, each in a process of its own."""

import torch

from ..training.devices import for_sampling, peak_memory, release_memory, reset_peak_memory
from .sampling import fast_step as fast_reverse_step
from .sampling import plain_step as plain_reverse_step
from .setup import inputs, plain_network
from .timing import Contender, forget_peak, in_fresh_process, resident, seconds
from .training import BATCHES, PlainTraining, fast_step, first, pass_sizes, training_loop


def peaks(setup):
    """Peak memory of a reverse step and of training steps: host memory on a CPU, the device's elsewhere."""
    rows, notes = [], []
    paths = [None, setup.precisions[0]] if setup.quick else [None, *setup.precisions]
    jobs = [("reverse step", reverse_step_peak, (1,))]
    if not setup.quick:
        jobs.append(("training step", training_step_peak, BATCHES))
    for what, measure, batches in jobs:
        for n in batches:
            for precision in paths:
                setup.tell(f"{what}, batch {n}, {precision or 'plain'}")
                row = {
                    "what": what,
                    "path": "fast" if precision else "plain",
                    "precision": precision or "fp32",
                    "batch": n,
                }
                try:
                    found = in_fresh_process(measure, setup.silent(), precision, n)
                except torch.OutOfMemoryError:
                    notes.append(f"{what}, batch {n}, {precision or 'plain'}: out of memory")
                else:
                    rows.append(row | {name: value / 2**20 for name, value in found.items()})
    where = "tensors on the device"
    if setup.device.type == "cpu":
        where = "the process's resident memory" + ("" if forget_peak() else " (this system's peaks include building)")
    notes.append(
        f"MiB of {where}, each from a fresh process; before: with the network (and optimizer) there, ready to run"
    )
    return {"rows": rows, "notes": notes}


def reverse_step_peak(setup, precision, n=1):
    """Return the memory in bytes before and at the peak of reverse steps. No precision: the plain path."""
    model, diffusion, given = plain_network(setup), setup.diffusion(), inputs(setup, n)
    if precision is not None:
        model = for_sampling(model, setup.device, precision, setup.flags.compile, setup.tell)  # no copy beside it
    before = _begin(setup)
    if precision is None:
        contender = plain_reverse_step(setup, model, diffusion, given)
    else:
        contender = fast_reverse_step(setup, model, diffusion, given, precision)
    return _finish(setup, contender, before)


def training_step_peak(setup, precision, n):
    """Return the memory in bytes before and at the peak of training steps. No precision: the plain loop."""
    loop = training_loop(setup, n)
    batch = first(next(iter(loop.loader(0))), n)
    if precision is None:
        plain = PlainTraining(loop, setup)
        del loop
        contender = Contender(lambda: plain.train_step(batch))
    else:
        contender = fast_step(loop, batch, next(iter(pass_sizes(setup, n))), precision)
    return _finish(setup, contender, _begin(setup))


def _begin(setup):
    release_memory(setup.device)
    reset_peak_memory(setup.device)
    held = peak_memory(setup.device)  # just after the reset: what is held now
    if held is not None:
        return held
    forget_peak()
    return resident()


def _finish(setup, contender, before):
    for _ in range(2):
        seconds(contender, setup.device)
    peak = peak_memory(setup.device)
    return {"before_mib": before, "peak_mib": resident(peak=True) if peak is None else peak}
