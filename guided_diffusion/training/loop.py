"""The training loop: noise-restricted forward diffusion (Diff-GOn, algorithm for training), AdamW, EMA."""

import time
from collections import deque
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from ..console import InputError, Interrupted, Interrupts
from ..data.pictures import save_picture
from ..random_streams import stream_seed
from . import checkpoint
from .devices import autocast, grad_scaler, to_device
from .distributed import Group
from .early_stopping import EarlyStopping
from .logger import RunLogger, RunningMeans

CHECK_EVERY = 50  # steps between looks at whether gradients are finite; looking makes an accelerator wait
# Steps in a row without finite gradient after which a run will not recover; a scaler halves its scale of 2^16 at each.
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
    export_legacy: bool
    eval_interval: int
    eval_items: int
    patience: int
    min_delta: float
    preview_items: int
    precision: str
    seed: int

    @property
    def last_step(self):
        """Where the run ends, or None."""
        return min((end for end in (self.total_steps, self.lr_anneal_steps) if end), default=None)


class TrainLoop:
    """Trains a model. What it saves is registered by name in `parts`.

    :param model, diffusion, sampler: the network, the training process and its timestep sampler, on their device.
    :param inputs: the `TrainingInputs` that prepare the loader's batches.
    :param loader: function (start position) -> endless iterator of this rank's prepared batches.
    :param validation, settings: a `Validation`, or None; the `LoopSettings`.
    :param group: the `Group` of processes that train together; None: this one alone.
    """

    def __init__(self, model, diffusion, sampler, inputs, loader, validation, settings, group=None):
        self.model, self.diffusion, self.sampler, self.inputs = model, diffusion, sampler, inputs
        self.loader, self.validation, self.settings, self.group = loader, validation, settings, group or Group()
        self.device = next(model.parameters()).device
        self.network = self.group.wrap(model)
        self.batch_size = settings.batch_size * self.group.world_size  # of all ranks
        self.step = 0  # steps taken; times batch_size: the place in the data order
        options = {"lr": settings.lr, "weight_decay": settings.weight_decay, "fused": True}
        self.optimizer = torch.optim.AdamW(model.parameters(), **options)
        self.scaler = grad_scaler(self.device, settings.precision)
        own = model.state_dict()
        self.emas = {rate: {k: v.detach().clone() for k, v in own.items()} for rate in settings.ema_rates}
        self.slowest = self.emas[max(settings.ema_rates, key=float)]  # the average that is looked at
        self.early_stopping, self.newest_score = EarlyStopping(settings.patience, settings.min_delta), None
        self.skipped = torch.zeros((), dtype=torch.int64, device=self.device)
        self.skipped_now = torch.zeros_like(self.skipped)  # in a row, up to the last step
        self.max_skipped = MAX_SKIPPED_SCALED if self.scaler.is_enabled() else MAX_SKIPPED
        self.recent = deque(maxlen=self.max_skipped)  # paths of the last steps
        self.means = RunningMeans(self.group)
        self.saved = 0  # the step of the last whole checkpoint
        saved = {"model": own, **{f"ema_{rate}_": ema for rate, ema in self.emas.items()}}
        self.parts = {kind: _Weights(model, values, settings.export_legacy) for kind, values in saved.items()}
        self.parts |= {"opt": _Moments(self.optimizer), "state": self}

    # -- one step -----------------------------------------------------------------------------------------------------

    def train_step(self, batch):
        """One optimizer step on a prepared batch; returns means of the losses and the gradient norm, on the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        torch.manual_seed(stream_seed(self.settings.seed, "dropout", self.step, self.group.rank))  # for nothing else
        terms = self._backward(batch)
        self.scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        terms["grad_norm"] = torch.nn.utils.get_total_norm(gradients)
        finite = torch.isfinite(terms["grad_norm"])  # the same on all ranks, as the gradients are
        if not self.scaler.is_enabled():  # a scaler sees to it itself
            # The fused optimizer leaves the weights alone where this is not 0, without asking the host.
            self.optimizer.found_inf = (~finite).float()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.skipped += ~finite
        self.skipped_now = torch.where(finite, 0, self.skipped_now + 1)
        self.means.add(terms, finite)
        self.recent.append(batch["path"])
        self.step += 1
        self._update_emas()
        return terms

    def _backward(self, batch):
        batch = {key: to_device(value, self.device) for key, value in batch.items() if torch.is_tensor(value)}
        x_start, noise, y = batch["image"], batch["noise"], self.inputs.conditioning(batch)
        t, weights = self.sampler.sample(batch["u"])
        size, sums, seen = self.settings.microbatch, {}, []
        for i in range(0, len(x_start), size):
            part, last = slice(i, i + size), i + size >= len(x_start)
            with nullcontext() if last or self.network is self.model else self.network.no_sync():
                with autocast(self.device, self.settings.precision):
                    rest = {"y": y[part], "noise": noise[part]}
                    losses = self.diffusion.training_losses(self.network, x_start[part], t[part], **rest)
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
        own = _floats(self.model.state_dict())
        for rate, ema in self.emas.items():
            # A young average would still be mostly the initial weights.
            decay = min(float(rate), (1 + self.step) / (10 + self.step))
            torch._foreach_lerp_(_floats(ema), own, 1 - decay)

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
            checkpoint.remove_temporary_files(s.checkpoint_dir)
        logger = RunLogger(self.group.main and s.checkpoint_dir, self.step, s.last_step)
        try:
            with nullcontext(interrupts) if interrupts else Interrupts() as interrupts:
                if self._done:
                    logger.log(f"nothing to do: step {self.step} already met --patience or the last step {s.last_step}")
                number = self._train(logger, interrupts)
            if number:
                what = f"stopped: step {self.saved} is saved" if self.saved else "stopped before the first step"
                logger.log(f"{what}; go on with --resume_checkpoint auto")
            elif self.early_stopping.exhausted:
                best = f"{self.early_stopping.best:.6g} at step {self.early_stopping.best_step}"
                logger.log(f"early stopping: best score {best}, none better for {s.patience} evaluations")
        finally:
            logger.close()
        if number:
            raise Interrupted(number, agreed=True)
        return self.step

    @property
    def _done(self):
        last = self.settings.last_step
        return self.early_stopping.exhausted or (last is not None and self.step >= last)

    def _train(self, logger, interrupts):
        """Take the steps; return the number of the signal that ended them, or 0."""
        s, batches, started = self.settings, None, time.monotonic()
        self.means.reset()
        while not self._done:
            number = self.group.largest(interrupts.seen)
            if number:
                if self.step > self.saved:
                    self._check_finite()
                    self._save(logger, must=True)
                    if self.means.steps:
                        logger.row(self._row(started))
                return number
            batches = batches or iter(self.loader(self.step * self.batch_size))
            self.train_step(next(batches))
            logger.bar.update()
            if self.step == s.last_step or self.step % min(s.log_interval, CHECK_EVERY) == 0:
                self._check_finite()
            with self.means.paused():
                extra = self._score()
                if self._done or self.step % s.save_interval == 0:
                    self._save(logger, must=self._done)
                    if s.preview_items:  # the other ranks get None, but a column: writing a row takes all
                        extra["colour_error"] = self.group.run_on_main(lambda: self._preview(logger))
            if extra or self._done or self.step % s.log_interval == 0:
                logger.row(self._row(started) | extra)
        return 0

    def _score(self):
        """Score the averaged weights when it is time; return the score's column. Early stopping notes it."""
        s = self.settings
        if not s.eval_interval or self.step % s.eval_interval:
            return {}
        score = self.validation.score(self.model, self.slowest, s.eval_items, self.group)
        self.newest_score = self.group.gather(score)[0]  # on unlike GPUs the last bit might differ, and so the decision
        self.early_stopping.update(self.newest_score, self.step)
        return {"val_score": self.newest_score}

    def _preview(self, logger):
        """Regenerate the preview pictures, in rank 0; return their mean colour error."""
        picture, error = self.validation.preview(self.model, self.slowest, self.settings.preview_items)
        path = Path(self.settings.checkpoint_dir) / "previews" / f"{self.step:06d}.png"
        logger.log(f"step {self.step}: mean colour error {error:.3f}; preview in {path}")
        logger.show("add_image", "preview", picture, self.step, dataformats="HWC")
        try:
            save_picture(picture, path)
        except OSError as disk:
            logger.log(f"warning: the preview could not be written ({disk})")
        return error

    def _row(self, started):
        means, rate = self.means.close(self.batch_size)
        row = {"step": self.step, "images": self.step * self.batch_size, "lr": self.optimizer.param_groups[0]["lr"]}
        row |= {"images_per_second": rate, "seconds": time.monotonic() - started, "skipped_steps": int(self.skipped)}
        return row | means

    def _check_finite(self):
        """Stop where the last steps had no finite gradient; those steps have left the weights as they were."""
        if int(self.skipped_now) < self.max_skipped:
            return
        names = sorted({path for steps in self.group.gather(list(self.recent)) for paths in steps for path in paths})
        found = f"the last {int(self.skipped_now)} steps before step {self.step} had no finite loss or gradient"
        hint = "lower --lr or check the pictures; the last checkpoint is unharmed"
        raise InputError(f"{found}; {hint}: {', '.join(names[:8])}{' and more' if len(names) > 8 else ''}")

    # -- saving and resuming ------------------------------------------------------------------------------------------

    def _save(self, logger, must):
        """Write a checkpoint of the current step; where that fails, warn and go on, unless it `must` be."""
        problem = self.group.gather(self.group.run_on_main(self.save))[0]
        last = f"the last whole checkpoint is of step {self.saved}"
        if problem and must:
            raise OSError(f"{problem}; {last}, go on from it with --resume_checkpoint auto")
        if problem:
            logger.log(f"warning: step {self.step} could not be saved ({problem}); {last}; going on")
        else:
            self.saved = self.step
            logger.log(f"saved step {self.step} in {self.settings.checkpoint_dir}")

    def save(self):
        """Save the current step, and remove older ones beyond --keep_checkpoints; return why that failed, or ""."""
        s = self.settings
        try:
            checkpoint.save_checkpoint(s.checkpoint_dir, self.step, self.parts, self.newest_score)
        except OSError as error:
            return str(error)
        with suppress(OSError):  # the new one is safe, and the next save tries again
            checkpoint.prune_checkpoints(s.checkpoint_dir, s.keep_checkpoints)
        return ""

    def resume(self, directory, step, partial=False):
        """Take over checkpoint `step` of a folder. Returns the names of missing parts (`partial` only)."""
        self.step = step
        missing = checkpoint.restore_checkpoint(directory, step, self.parts, partial)
        for kind in missing:
            if kind.startswith("ema_"):
                self.parts[kind].load_state_dict(self.model.state_dict())
        self.saved = step if Path(directory).resolve() == Path(self.settings.checkpoint_dir).resolve() else 0
        return missing

    def state_dict(self):
        """Return all that the next step depends on, besides its number, weights and moments."""
        state = {name: getattr(self, name).state_dict() for name in ("sampler", "scaler", "early_stopping")}
        state |= {"batch_size": self.batch_size, "seed": self.settings.seed, "newest_score": self.newest_score}
        return state | {"skipped": int(self.skipped), "skipped_now": int(self.skipped_now)}

    def load_state_dict(self, state):
        """Take over a state. Raises InputError where --seed or --batch_size would change the data order."""
        for name, own in (("seed", self.settings.seed), ("batch_size", self.batch_size)):
            if state[name] != own:
                raise InputError(f"--{name} {own} (all processes) contradicts the checkpoint, made with {state[name]}")
        self.sampler.load_state_dict(state["sampler"])
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.early_stopping.load_state_dict(state["early_stopping"])
        self.newest_score = state["newest_score"]
        self.skipped.fill_(state["skipped"])
        self.skipped_now.fill_(state["skipped_now"])


def _floats(weights):
    return [value for value in weights.values() if value.is_floating_point()]  # integers do not change


class _Weights:
    """The weights of a model, or an average of them: a dict of tensors that is saved, and loaded in place."""

    def __init__(self, model, values, legacy):
        self.model, self.values, self.legacy = model, values, legacy

    def state_dict(self):
        return checkpoint.with_legacy_keys(self.values, self.model) if self.legacy else self.values

    def load_state_dict(self, weights):
        for key, value in checkpoint.check_weights(self.model, weights).items():
            self.values[key].copy_(value)


class _Moments:
    """AdamW's moments; learning rate and weight decay follow from the flags."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def state_dict(self):
        return self.optimizer.state_dict()

    def load_state_dict(self, saved):
        parameters, groups = self.optimizer.param_groups[0]["params"], self.optimizer.state_dict()["param_groups"]
        if len(saved["param_groups"][0]["params"]) != len(parameters):
            raise ValueError("it is of another optimizer; leave it out with --resume_partial True")
        for k, values in saved["state"].items():
            for name in ("exp_avg", "exp_avg_sq"):
                if values[name].shape != parameters[k].shape:
                    raise ValueError(f"{name} of parameter {k} has shape {tuple(values[name].shape)}")
                # In the parameter's own memory layout, which the fused optimizer relies on without a look.
                values[name] = torch.empty_like(parameters[k]).copy_(values[name])
        self.optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})
