"""The training loop: noise-restricted forward diffusion (Diff-GOn, algorithm for training), AdamW, EMA, over many processes."""

import time
from collections import deque
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from ..console import InputError, Interrupted, Interrupts
from ..data.pictures import save_picture
from ..random_streams import stream_seed
from . import run_state
from .checkpoint import sweep_temporary_files
from .distributed import autocast, grad_scaler, to_device
from .early_stopping import EarlyStopping
from .group import Group
from .logger import RunLogger, SilentLogger
from .sharding import local, syncing, wrap
from .window import Window

CHECK_EVERY = 50  # steps between looks at whether gradients are finite; looking makes an accelerator wait
# Consecutive steps without a finite gradient after which a run cannot be expected to recover; a scaler, which halves its
# scale at each, needs that many to get from 2^16 to where nothing overflows.
MAX_SKIPPED, MAX_SKIPPED_SCALED = 5, 40


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """What the loop needs of the flags of the same names; `ema_rates` are kept as texts, for the file names."""

    checkpoint_dir: str
    batch_size: int  # per rank
    microbatch: int
    lr: float
    weight_decay: float
    lr_warmup_steps: int
    lr_anneal_steps: int
    total_steps: int
    ema_rates: tuple
    log_interval: int
    save_interval: int
    keep_checkpoints: int
    save_failures: int
    export_legacy: bool
    eval_interval: int
    eval_items: int
    patience: int
    min_delta: float
    preview_items: int
    fsdp: bool
    precision: str
    seed: int
    config: dict  # all flags, to be noted beside each checkpoint

    @property
    def last_step(self):
        """Where the run ends, or None."""
        ends = [end for end in (self.total_steps, self.lr_anneal_steps) if end]
        return min(ends) if ends else None


class TrainLoop:
    """Trains a model; everything it saves, and the files' names, are in `checkpoint` and `run_state`.

    :param model: the network, on its device.
    :param diffusion: the training process.
    :param sampler: timestep sampler (`diffusion.resample`), on the same device.
    :param rules: `TrainingInputs`, from loaded batches to training samples.
    :param loader: function (start position) -> endless iterator of this rank's batches.
    :param validation: a `Validation`, or None.
    :param settings: `LoopSettings`.
    :param group: the `Group` of processes that train together; None: this one alone.
    :param device: where to train, if the model is not there yet (it is to be sharded); None: where it is.
    """

    def __init__(self, model, diffusion, sampler, rules, loader, validation, settings, group=None, device=None):
        self.model, self.diffusion, self.sampler, self.rules = model, diffusion, sampler, rules
        self.loader, self.validation, self.settings, self.group = loader, validation, settings, group or Group()
        self.device = device or next(model.parameters()).device
        self.network = wrap(model, self.group, self.device, settings.fsdp)
        self.batch_size = settings.batch_size * self.group.world_size  # of all ranks
        self.step, self.position = 0, 0  # steps taken, and samples seen by all ranks: the place in the data order
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay, fused=True
        )
        self.scaler = grad_scaler(self.device, settings.precision)
        self.emas = {
            rate: {k: v.detach().clone() for k, v in model.state_dict().items()} for rate in settings.ema_rates
        }
        self.early_stopping = EarlyStopping(settings.patience, settings.min_delta)
        self.newest_score = None
        self.skipped = torch.zeros((), dtype=torch.int64, device=self.device)
        self.skipped_now = torch.zeros((), dtype=torch.int64, device=self.device)  # in a row, up to the last step
        self.max_skipped = MAX_SKIPPED_SCALED if self.scaler.is_enabled() else MAX_SKIPPED
        self.recent = deque(maxlen=self.max_skipped)  # paths of the last steps
        self.bad_files = {}  # path -> why it was left out
        self.saved, self.failed_saves = 0, 0  # the last whole checkpoint; saves that failed since

    def resume(self, directory, step, partial=False):
        """Take over checkpoint `step` of a folder. Returns the names of missing parts (`partial` only)."""
        missing = run_state.resume(self, directory, step, partial)
        self.saved = step if Path(directory).resolve() == Path(self.settings.checkpoint_dir).resolve() else 0
        return missing

    # -- one step -----------------------------------------------------------------------------------------------------

    def train_step(self, batch):
        """One optimizer step on a loaded batch; returns the mean of each loss, and the gradient norm, on the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        # Dropout alone draws from it.
        torch.manual_seed(stream_seed(self.settings.seed, "dropout", self.step, self.group.rank))
        terms = self._backward(*self.rules(batch))
        self.scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        terms["grad_norm"] = norm.full_tensor() if self.settings.fsdp else norm
        finite = torch.isfinite(terms["grad_norm"])  # the same on all ranks, as the gradients are
        if not self.scaler.is_enabled():  # a scaler sees to it itself
            # The fused optimizer leaves the weights alone where this is not 0, without asking the host.
            self.optimizer.found_inf = (~finite).float()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.skipped += ~finite
        self.skipped_now = torch.where(finite, 0, self.skipped_now + 1)
        self.recent.append(batch["path"])
        self.bad_files.update(batch.get("skipped", ()))
        self.step += 1
        self.position += self.batch_size
        self._update_emas()
        return terms

    def _backward(self, x_start, y, noise, u):
        x_start, y, noise, u = (to_device(v, self.device) for v in (x_start, y, noise, u))
        t, weights = self.sampler.sample(u)
        size, sums, seen = self.settings.microbatch, {}, []
        for i in range(0, len(x_start), size):
            part = slice(i, i + size)
            with syncing(self.network, last=i + size >= len(x_start)):
                with autocast(self.device, self.settings.precision):
                    losses = self.diffusion.training_losses(
                        self.network, x_start[part], t[part], y=y[part], noise=noise[part]
                    )
                self.scaler.scale((losses["loss"] * weights[part]).sum() / len(x_start)).backward()
            seen.append(losses["loss"].detach())
            for name, value in losses.items():
                sums[name] = sums.get(name, 0) + (value.detach() * weights[part]).sum() / len(x_start)
        if any(True for _ in self.sampler.buffers()):  # it learns, and from all ranks alike
            self.sampler.update(self.group.joined(t), self.group.joined(torch.cat(seen)))
        return sums

    def learning_rate(self):
        """Learning rate of the coming step: linear warm-up, then constant or linear to 0."""
        s = self.settings
        rate = s.lr * min(1.0, (self.step + 1) / s.lr_warmup_steps) if s.lr_warmup_steps else s.lr
        return rate * (1 - self.step / s.lr_anneal_steps) if s.lr_anneal_steps else rate

    def _update_emas(self):
        own = [local(value) for value in self.model.state_dict().values()]
        for rate, ema in self.emas.items():
            # A young average would still be mostly the initial weights.
            decay = min(float(rate), (1 + self.step) / (10 + self.step))
            torch._foreach_lerp_([local(value) for value in ema.values()], own, 1 - decay)

    # -- the run ------------------------------------------------------------------------------------------------------

    def run(self, interrupts=None):
        """Train to the last step, or until stopped; return the last step. All ranks return, or fail, together.

        SIGINT, SIGTERM and SIGUSR1 in any rank end the run after the step at work, with a checkpoint, by `Interrupted`.

        :param interrupts: the `Interrupts` that has been noting signals since the process began; None: from now on.
        """
        s = self.settings
        if interrupts:
            interrupts.at_once = False  # from now on there may be something to save
        if self.group.main:
            sweep_temporary_files(s.checkpoint_dir)
        logger = RunLogger(s.checkpoint_dir, self.step, s.last_step) if self.group.main else SilentLogger()
        try:
            with nullcontext(interrupts) if interrupts else Interrupts() as interrupts:
                self._say_idle(logger)
                told = self._train(logger, interrupts)
            if told:
                what = f"stopped: step {self.saved} is saved" if self.saved else "stopped before the first step"
                logger.log(f"{what} in {s.checkpoint_dir}; go on with --resume_checkpoint auto")
            elif self.early_stopping.exhausted:
                logger.log(
                    f"early stopping: best score {self.early_stopping.best:.6g} at step"
                    f" {self.early_stopping.best_step}, none better for {s.patience} evaluations"
                )
            self._list_bad_files(logger)
        finally:
            logger.close()
        if told:
            self.group.barrier()
            raise Interrupted(told, agreed=True)
        return self.step

    @property
    def _done(self):
        last = self.settings.last_step
        return self.early_stopping.exhausted or (last is not None and self.step >= last)

    def _say_idle(self, logger):
        if self._done:
            why = "--patience" if self.early_stopping.exhausted else f"the last step {self.settings.last_step}"
            logger.log(f"nothing to do: step {self.step} already met {why}")

    def _train(self, logger, interrupts):
        """Take the steps; return the number of the signal that ended them, or 0."""
        s, told, batches = self.settings, 0, None
        window, started = Window(self.group), time.monotonic()
        while not self._done:
            told = self.group.largest(interrupts.seen)
            if told:
                if self.step > self.saved:
                    self._check_finite()
                    self._save(logger, must=True)
                    if window.steps:
                        logger.row(self._row(window, time.monotonic() - started))
                break
            batches = batches or iter(self.loader(self.position))
            window.add(self.train_step(next(batches)))
            logger.bar.update()
            if self.step == s.last_step or self.step % min(s.log_interval, CHECK_EVERY) == 0:
                self._check_finite()
            with window.paused():
                extra = self._score()
                if self._done or self.step % s.save_interval == 0:
                    self._save(logger, must=self._done)
                    extra |= self._preview(logger)
            if extra or self._done or self.step % s.log_interval == 0:
                logger.row(self._row(window, time.monotonic() - started) | extra)
        return told

    def _save(self, logger, must):
        """Write a checkpoint of the current step; where that fails, say so and go on, unless it `must` or fails too often."""
        s, parts, failed = self.settings, run_state.parts_of(self), 0
        if self.group.main:
            try:
                with self.group.held():
                    removed = run_state.save(self, parts)
                logger.log(f"saved step {self.step} in {s.checkpoint_dir}{removed}")
            except OSError as error:
                self.failed_saves += 1
                if must or self.failed_saves >= s.save_failures:
                    raise OSError(
                        f"{error}; saves that failed in a row: {self.failed_saves}; the last checkpoint is of step"
                        f" {self.saved}, go on from it with --resume_checkpoint auto"
                    ) from None
                failed = 1
                logger.log(
                    f"warning: step {self.step} could not be saved ({error}); the last checkpoint is of step"
                    f" {self.saved}; going on ({self.failed_saves} of {s.save_failures} failures in a row)"
                )
        if not self.group.largest(failed):
            self.saved, self.failed_saves = self.step, 0

    def _averages(self):
        return self.emas[max(self.settings.ema_rates, key=float)]

    def _score(self):
        """Score the averaged weights when it is time; return the score's column. Early stopping notes it."""
        s = self.settings
        if self.validation is None or not s.eval_interval or self.step % s.eval_interval:
            return {}
        score = self.validation.score(self.model, self._averages(), s.eval_items, self.group)
        self.newest_score = self.group.gather(score)[0]  # on unlike GPUs the last bit might differ, and so the decision
        self.early_stopping.update(self.newest_score, self.step)
        return {"val_score": self.newest_score}

    def _preview(self, logger):
        """Regenerate the preview pictures; return the column of their colour error."""
        s = self.settings
        if self.validation is None or not s.preview_items:
            return {}
        if not self.group.main and not s.fsdp:
            return {"colour_error": None}  # a column all the same: writing a row takes all ranks
        panel, error = self.validation.preview(self.model, self._averages(), s.preview_items)
        path = Path(s.checkpoint_dir) / "previews" / f"{self.step:06d}.png"
        where = f"preview in {path}"
        if self.group.main:
            try:
                save_picture(panel, path)
            except OSError as disk:
                where = f"its preview could not be written ({disk})"
        logger.picture("preview", panel, self.step)
        logger.log(f"step {self.step}: mean colour error {error:.3f}; {where}")
        return {"colour_error": error}

    def _row(self, window, seconds):
        means, rate = window.close(self.batch_size)
        return {
            "step": self.step,
            "images": self.step * self.batch_size,
            **means,
            "lr": self.optimizer.param_groups[0]["lr"],
            "images_per_second": rate,
            "seconds": seconds,
            "skipped_steps": int(self.skipped),
        }

    def _check_finite(self):
        """Stop where the last steps had no finite gradient; those steps have left the weights as they were."""
        if int(self.skipped_now) < self.max_skipped:
            return
        names = sorted({path for paths in self.group.gather(list(self.recent)) for step in paths for path in step})
        shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        raise InputError(
            f"the last {int(self.skipped_now)} steps before step {self.step} had no finite loss or gradient; pictures: {shown};"
            " the weights are unharmed in the last checkpoint; lower --lr or check the pictures"
        )

    def _list_bad_files(self, logger):
        found = {path: why for files in self.group.gather(self.bad_files) for path, why in files.items()}
        if found:
            logger.log(f"warning: {len(found)} unreadable file{'s were' if len(found) > 1 else ' was'} skipped:")
            for why in sorted(found.values()):  # which names the file
                logger.log(f"  {why}")
