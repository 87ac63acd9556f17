"""Training steps: a plain loop against the product's."""

from dataclasses import replace
from pathlib import Path

import torch

from .. import build
from ..training.devices import grad_scaler, release_memory, to_device
from .timing import Contender, MatmulRate, alternate, flops, summary

BATCHES = (1, 4, 8)
LARGEST = max(BATCHES)


class PlainTraining:
    """The steps of a `TrainLoop` written down simply: whole batches, fp32, contiguous, one parameter after the other.

    The learning rate is constant.

    :param loop: a `TrainLoop`, whose weights, rules and settings it takes over.
    """

    def __init__(self, loop, setup):
        self.rules, self.sampler, self.diffusion, self.device = loop.rules, loop.sampler, loop.diffusion, setup.device
        self.settings, self.step = loop.settings, 0
        self.model = build.model_from(setup.flags)
        self.model.load_state_dict(loop.model.state_dict())
        self.model.to(setup.device)
        s = self.settings
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=s.lr, weight_decay=s.weight_decay, foreach=False, fused=False
        )
        self.emas = {
            rate: {name: value.detach().clone() for name, value in self.model.state_dict().items()}
            for rate in s.ema_rates
        }

    def train_step(self, batch):
        """One optimizer step; returns the mean loss."""
        x_start, y, noise, u = (to_device(value, self.device) for value in self.rules(batch))
        t, weights = self.sampler.sample(u)
        losses = self.diffusion.training_losses(self.model, x_start, t, y=y, noise=noise)
        loss = (losses["loss"] * weights).mean()
        loss.backward()
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter.grad.norm()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        for rate, ema in self.emas.items():
            decay = min(float(rate), (1 + self.step) / (10 + self.step))
            for name, value in self.model.state_dict().items():
                ema[name].lerp_(value, 1 - decay)
        return loss.detach()


def training_loop(setup, batch_size=LARGEST, precision="fp32"):
    """Build the product's loop on the toy scenes. It saves nothing."""
    flags = replace(
        setup.flags,
        data_dir=setup.scenes,
        dataset_mode="cityscapes",
        batch_size=batch_size,
        num_workers=0,
        precision=precision,
        device=str(setup.device),
        preview_items=0,
        eval_interval=0,
        checkpoint_dir=str(Path(setup.scenes).parent / "checkpoints"),
    )
    return build.training_loop(flags, set(), lambda line: None, device=setup.device)


def first(batch, n):
    """Return the first n samples of a loaded batch."""
    return {name: value[:n] for name, value in batch.items()}


def pass_sizes(setup, batch_size):
    """Return how many pictures a pass may take: as the product decides, and the whole batch."""
    product = build.pass_size(replace(setup.flags, batch_size=batch_size, microbatch=-1), setup.device)
    return dict.fromkeys([product, batch_size])


def fast_step(loop, batch, size, precision):
    """Return a contender: one step of the loop with passes of `size` in one precision."""
    settings = replace(loop.settings, batch_size=len(batch["path"]), microbatch=size, precision=precision)
    scaler = grad_scaler(loop.device, precision)

    def run():
        loop.settings, loop.scaler = settings, scaler
        loop.train_step(batch)

    return Contender(run)


def steps(setup):
    """Training steps of 1, 4 and 8 pictures."""
    loop = training_loop(setup)
    plain, batch = PlainTraining(loop, setup), next(iter(loop.loader(0)))
    rates = MatmulRate(setup)
    rows, notes = [], []
    for n in BATCHES[:1] if setup.quick else BATCHES:
        part = first(batch, n)
        contenders = {("plain", "fp32", n): Contender(lambda part=part: plain.train_step(part))}
        for precision in setup.precisions:
            for size in pass_sizes(setup, n):
                contenders["fast", precision, size] = fast_step(loop, part, size, precision)
        rows += _measured(setup, contenders, n, (plain, loop), notes)
        release_memory(setup.device)
    rates.measure()
    for row in rows:
        row["share_of_matmul_rate_%"] = rates.share(1e9 * row["gflop"], row["ms"], row["precision"])
    notes.append(
        f"medians of {_rounds(setup)} alternations; a pass is what one forward and backward pass takes; operations"
        " that activation checkpointing repeats are counted"
    )
    return {"rows": rows, "notes": notes + rates.notes()}


def _rounds(setup):
    return max(1, setup.rounds // 2)


def _measured(setup, contenders, n, trainers, notes):
    """Return a row for each contender that has memory enough, and note the others."""

    def tell(text):
        setup.tell(f"batch {n}: {text}")

    def too_large(name):
        path, precision, size = name
        notes.append(f"batch {n}, {path} {precision} in passes of {size}: out of memory")
        for trainer in trainers:
            _recover(trainer.optimizer)
        release_memory(setup.device)

    rows, counts, reference = [], {}, next(iter(contenders))
    times = alternate(contenders, _rounds(setup), setup.device, tell, too_large)
    for name in times:
        if name[0] not in counts:
            counts[name[0]] = flops(contenders[name].run)
        path, precision, size = name
        timed = summary(times, name, reference)
        rows.append(
            {
                "path": path,
                "precision": precision,
                "batch": n,
                "pass": size,
                **timed,
                "images/s": 1e3 * n / timed["ms"],
                "gflop": counts[path] / 1e9,
            }
        )
    return rows


def _recover(optimizer):
    """Free what a step that broke off has left: gradients, and moments that came into being in part."""
    optimizer.zero_grad(set_to_none=True)
    for parameter in [p for p, state in optimizer.state.items() if "exp_avg_sq" not in state]:
        del optimizer.state[parameter]
