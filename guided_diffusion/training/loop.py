"""The training loop: noise-restricted forward diffusion (Diff-GOn, algorithm for training), AdamW, EMA, checkpoints."""

import signal
import threading
import time
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import InputError
from ..random_streams import stream_seed
from .checkpoint import check_weights, load_parts, load_weights, save_parts, sweep_temporary_files, with_legacy_keys
from .distributed import autocast, grad_scaler, to_device
from .early_stopping import EarlyStopping
from .logger import RunLogger

CHECK_EVERY = 50  # steps between looks at whether losses are finite; looking makes an accelerator wait
MAX_SKIPPED = 5  # consecutive steps without a finite loss and gradient after which a run cannot be expected to recover


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """What the loop needs of the flags of the same names; `ema_rates` are kept as texts, for the file names."""

    checkpoint_dir: str
    batch_size: int
    microbatch: int
    lr: float
    weight_decay: float
    lr_warmup_steps: int
    lr_anneal_steps: int
    total_steps: int
    ema_rates: tuple
    log_interval: int
    save_interval: int
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
        ends = [end for end in (self.total_steps, self.lr_anneal_steps) if end]
        return min(ends) if ends else None


class TrainLoop:
    """Trains a model; everything it saves, and the files' names, are in `checkpoint`.

    :param model: the network, on its device.
    :param diffusion: the training process.
    :param sampler: timestep sampler (`diffusion.resample`), on the same device.
    :param rules: `SampleRules`, from loaded batches to training samples.
    :param loader: function (start position) -> endless iterator of batches.
    :param validation: a `Validation`, or None.
    :param settings: `LoopSettings`.
    """

    def __init__(self, model, diffusion, sampler, rules, loader, validation, settings):
        self.model, self.diffusion, self.sampler, self.rules = model, diffusion, sampler, rules
        self.loader, self.validation, self.settings = loader, validation, settings
        self.device = next(model.parameters()).device
        self.step, self.position = 0, 0  # steps taken, and samples seen: the place in the data order
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay, fused=True)
        self.scaler = grad_scaler(self.device, settings.precision)
        self.emas = {rate: {k: v.detach().clone() for k, v in model.state_dict().items()} for rate in settings.ema_rates}
        self.early_stopping = EarlyStopping(settings.patience, settings.min_delta)
        self.skipped = torch.zeros((), dtype=torch.int64, device=self.device)
        self.recent = deque(maxlen=MAX_SKIPPED)  # (finite, paths) of the last steps

    # -- saving and resuming ------------------------------------------------------------------------------------------

    def save(self):
        """Write a checkpoint of the current step."""
        weights = self.model.state_dict()
        emas = self.emas
        if self.settings.export_legacy:
            weights = with_legacy_keys(weights, self.model)
            emas = {rate: with_legacy_keys(ema, self.model) for rate, ema in emas.items()}
        parts = {"model": weights, "opt": self.optimizer.state_dict(), "state": self._state()}
        parts.update({f"ema_{rate}_": ema for rate, ema in emas.items()})
        save_parts(self.settings.checkpoint_dir, self.step, parts)

    def _state(self):
        return {
            "step": self.step,
            "position": self.position,
            "batch_size": self.settings.batch_size,
            "seed": self.settings.seed,
            "sampler": self.sampler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "early_stopping": self.early_stopping.state_dict(),
            "skipped": int(self.skipped),
        }

    def resume(self, directory, step, partial=False):
        """Take over checkpoint `step` of a folder. Returns the names of missing parts (`partial` only)."""
        parts, missing = load_parts(directory, step, self.settings.ema_rates, partial)
        name = f"{directory}/model{step:06d}.pt"
        load_weights(self.model, parts["model"])
        self.step, self.position = step, step * self.settings.batch_size
        for rate, ema in self.emas.items():
            kind = f"ema_{rate}_" if f"ema_{rate}_" in parts else "model"
            source = check_weights(self.model, parts[kind], f"{directory}/{kind}{step:06d}.pt")
            for key, value in ema.items():
                value.copy_(source[key])
        try:
            if "opt" in parts:
                self.optimizer.load_state_dict(parts["opt"])
                for group in self.optimizer.param_groups:
                    group["weight_decay"] = self.settings.weight_decay  # flags rule, not the file
            if "state" in parts:
                self._restore(parts["state"], name)
        except (KeyError, RuntimeError, ValueError, AttributeError, TypeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{name}: its opt or state file does not fit this run ({error}); check the flags") from None
        return missing

    def _restore(self, state, name):
        for what in ("batch_size", "seed"):
            if state[what] != getattr(self.settings, what):
                raise InputError(
                    f"--{what} {getattr(self.settings, what)} contradicts the checkpoint {name}, made with {state[what]}:"
                    " the data order would change; use the same value"
                )
        self.position = state["position"]
        self.sampler.load_state_dict(state["sampler"])
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.early_stopping.load_state_dict(state["early_stopping"])
        self.skipped.fill_(state["skipped"])

    # -- one step -----------------------------------------------------------------------------------------------------

    def train_step(self, batch):
        """One optimizer step on a loaded batch; returns the mean of each loss, and the gradient norm, on the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        torch.manual_seed(stream_seed(self.settings.seed, "dropout", self.step))  # dropout alone draws from it
        terms = self._backward(*self.rules(batch))
        self.scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        terms["grad_norm"] = torch.nn.utils.get_total_norm(gradients)
        finite = torch.isfinite(terms["loss"])
        if not self.scaler.is_enabled():  # a scaler looks at the gradients itself, and overflows while it finds its scale
            finite = finite & torch.isfinite(terms["grad_norm"])
            # The fused optimizer leaves the weights alone where this is not 0, without asking the host.
            self.optimizer.found_inf = (~finite).float()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.skipped += ~finite
        self.recent.append((finite, batch["path"]))
        self.step += 1
        self.position += len(batch["path"])
        self._update_emas()
        return terms

    def _backward(self, x_start, y, noise, u):
        x_start, y, noise, u = (to_device(v, self.device) for v in (x_start, y, noise, u))
        t, weights = self.sampler.sample(u)
        size = self.settings.microbatch if self.settings.microbatch > 0 else len(x_start)
        sums = {}
        for i in range(0, len(x_start), size):
            part = slice(i, i + size)
            with autocast(self.device, self.settings.precision):
                losses = self.diffusion.training_losses(self.model, x_start[part], t[part], y=y[part], noise=noise[part])
            self.scaler.scale((losses["loss"] * weights[part]).sum() / len(x_start)).backward()
            self.sampler.update(t[part], losses["loss"])
            for name, value in losses.items():
                sums[name] = sums.get(name, 0) + (value.detach() * weights[part]).sum() / len(x_start)
        return sums

    def learning_rate(self):
        """Learning rate of the coming step: linear warm-up, then constant or linear to 0."""
        s = self.settings
        rate = s.lr * min(1.0, (self.step + 1) / s.lr_warmup_steps) if s.lr_warmup_steps else s.lr
        return rate * (1 - self.step / s.lr_anneal_steps) if s.lr_anneal_steps else rate

    def _update_emas(self):
        own = list(self.model.state_dict().values())
        for rate, ema in self.emas.items():
            # A young average would still be mostly the initial weights.
            decay = min(float(rate), (1 + self.step) / (10 + self.step))
            torch._foreach_lerp_(list(ema.values()), own, 1 - decay)

    # -- the run ------------------------------------------------------------------------------------------------------

    def run(self):
        """Train to the last step, or until stopped; return the last step.

        SIGINT and SIGTERM end the run after the step at work, with a checkpoint, by KeyboardInterrupt; a second one at once.
        """
        s = self.settings
        sweep_temporary_files(s.checkpoint_dir)
        logger, batches, saved = RunLogger(s.checkpoint_dir, self.step, s.last_step), None, self.step
        stop = self.early_stopping.exhausted
        if stop or (s.last_step is not None and self.step >= s.last_step):
            logger.say(
                f"nothing to do: step {self.step} already met " + ("--patience" if stop else f"the last step {s.last_step}")
            )
        try:
            with _Interrupts() as interrupts:
                window, started = _Window(), time.monotonic()
                while not stop and (s.last_step is None or self.step < s.last_step):
                    batches = batches or iter(self.loader(self.position))
                    window.add(self.train_step(next(batches)))
                    logger.bar.update()
                    last = self.step == s.last_step or interrupts.seen
                    if last or self.step % min(s.log_interval, CHECK_EVERY) == 0:
                        self._check_finite()
                    with window.paused():
                        extra, stop = self._score()
                        if last or stop or self.step % s.save_interval == 0:
                            self.save()
                            saved = self.step
                            extra |= self._preview(logger) if not interrupts.seen else {}
                    if extra or stop or last or self.step % s.log_interval == 0:
                        logger.row(self._row(window, time.monotonic() - started) | extra)
                    if interrupts.seen and self.step != s.last_step:
                        logger.say(f"saved step {self.step} in {s.checkpoint_dir}; go on with --resume_checkpoint auto")
                        raise KeyboardInterrupt
            if stop and saved == self.step:
                logger.say(f"early stopping: best score {self.early_stopping.best:.6g} at step"
                           f" {self.early_stopping.best_step}, none better for {s.patience} evaluations")  # fmt: skip
        finally:
            batches = None  # ends the loader's workers now, not when a traceback lets go of them
            logger.close()
        return self.step

    def _averages(self):
        return self.emas[max(self.settings.ema_rates, key=float)]

    def _score(self):
        """Score the averaged weights when it is time; return the score's column, and whether to stop early."""
        s = self.settings
        if self.validation is None or not s.eval_interval or self.step % s.eval_interval:
            return {}, False
        score = self.validation.score(self.model, self._averages(), s.eval_items)
        return {"val_score": score}, self.early_stopping.update(score, self.step)

    def _preview(self, logger):
        """Regenerate the preview pictures; return the column of their colour error."""
        s = self.settings
        if self.validation is None or not s.preview_items:
            return {}
        path = Path(s.checkpoint_dir) / "previews" / f"{self.step:06d}.png"
        panel, error = self.validation.preview(self.model, self._averages(), s.preview_items, path)
        logger.picture("preview", panel, self.step)
        logger.say(f"step {self.step}: mean colour error {error:.3f}; preview in {path}")
        return {"colour_error": error}

    def _row(self, window, seconds):
        means, rate = window.close(self.settings.batch_size)
        return {"step": self.step, "images": self.step * self.settings.batch_size, **means,
                "lr": self.optimizer.param_groups[0]["lr"], "images_per_second": rate, "seconds": seconds,
                "skipped_steps": int(self.skipped)}  # fmt: skip

    def _check_finite(self):
        """Stop where the last steps had no finite loss or gradient; those steps have left the weights as they were."""
        if len(self.recent) < MAX_SKIPPED or torch.stack([finite for finite, _ in self.recent]).any():
            return
        names = sorted({path for _, paths in self.recent for path in paths})
        shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        raise InputError(
            f"the last {MAX_SKIPPED} steps before step {self.step} had no finite loss or gradient; their pictures: {shown};"
            " the weights are unharmed in the last checkpoint; lower --lr or check the pictures"
        )


class _Interrupts:
    """Notes SIGINT and SIGTERM instead of breaking a step in two; a second signal breaks it all the same."""

    def __init__(self):
        self.seen, self._before = False, {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # only there may handlers be set
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number, frame):
        if self.seen:
            raise KeyboardInterrupt
        self.seen = True


class _Window:
    """Means of the losses since the last row, kept on the device until they are asked for."""

    def __init__(self):
        self._reset()

    def _reset(self):
        self.sums, self.steps, self.since = {}, 0, time.monotonic()

    def add(self, terms):
        for name, value in terms.items():
            self.sums[name] = self.sums.get(name, 0) + value
        self.steps += 1

    @contextmanager
    def paused(self):
        """Leave the time of the block out of the rate."""
        start = time.monotonic()
        yield
        self.since += time.monotonic() - start

    def close(self, batch_size):
        """Return the means as floats and the images per second, and start anew."""
        names = list(self.sums)
        values = (torch.stack([self.sums[name] for name in names]) / self.steps).tolist()  # waits for the device
        rate = self.steps * batch_size / (time.monotonic() - self.since)
        self._reset()
        return dict(zip(names, values, strict=True)), rate
