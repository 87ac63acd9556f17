"""Training: steps against naive ones, exact resuming, losses that are not finite, schedules, early stopping."""

import csv
import hashlib
import os
import shutil
import signal
import time

import pytest
import torch
from PIL import Image

from guided_diffusion.console import InputError, Interrupted, Interrupts
from guided_diffusion.training import checkpoint
from guided_diffusion.training.checkpoint import file_name, manifest_text, read_manifest
from guided_diffusion.training.distributed import Group
from guided_diffusion.training.logger import RunningMeans
from guided_diffusion.training.loop import MAX_SKIPPED, MAX_SKIPPED_SCALED


def weights_of(loop):
    return {key: value.clone() for key, value in loop.model.state_dict().items()}


def assert_same(first, second):
    assert first.keys() == second.keys()
    for key in first:
        assert torch.equal(first[key], second[key]), key


def table(loop):
    with open(f"{loop.settings.checkpoint_dir}/progress.csv") as f:
        return list(csv.DictReader(f))


def replace_part(folder, step, kind, contents):
    """Write one part of a checkpoint anew, and its entry in the manifest."""
    path = folder / file_name(kind, step)
    torch.save(contents, path)
    manifest = read_manifest(folder / file_name("manifest", step))
    raw = path.read_bytes()
    manifest["files"][path.name] = {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    (folder / file_name("manifest", step)).write_text(manifest_text(manifest))


def test_run_writes_whole_checkpoints_and_a_table(make_loop, tmp_path):
    flags = {"ema_rate": "0.9,0.99", "preview_items": 2, "preview_steps": 2, "eval_interval": 2}
    loop = make_loop(total_steps=3, save_interval=2, **flags)
    assert loop.run() == 3
    kinds = ("model", "opt", "state", "ema_0.9_", "ema_0.99_")
    names = {path.name for path in (tmp_path / "run").glob("*.pt")}
    assert names == {file_name(kind, step) for kind in kinds for step in (2, 3)}
    assert {path.name for path in (tmp_path / "run" / "previews").iterdir()} == {"000002.png", "000003.png"}
    rows = table(loop)
    assert [row["step"] for row in rows] == ["1", "2", "3"]
    assert all(float(row["loss"]) > 0 and float(row["images_per_second"]) > 0 for row in rows)
    assert rows[1]["val_score"] and not rows[0]["val_score"]
    assert not list((tmp_path / "run").rglob("*.tmp"))


def test_save_with_export_legacy_adds_zero_spade_norms(make_loop, tmp_path):
    make_loop(total_steps=1, export_legacy=True).run()
    saved = torch.load(tmp_path / "run" / "ema_0.9_000001.pt", weights_only=True)
    extras = [key for key in saved if ".spade_norm." in key]
    assert extras and all(key.startswith("input_blocks.") and not saved[key].any() for key in extras)
    resumed = make_loop(total_steps=2, export_legacy=True, resume_checkpoint="auto")
    assert resumed.run() == 2


def test_train_step_is_adamw_on_the_mean_loss(make_loop):
    loop = make_loop(total_steps=1, weight_decay=0.1)
    batch = next(iter(loop.loader(0)))
    before = weights_of(loop)
    t, _ = loop.sampler.sample(batch["u"])
    y, noise = loop.inputs.conditioning(batch), batch["noise"]
    loss = loop.diffusion.training_losses(loop.model, batch["image"], t, y=y, noise=noise)["loss"].mean()
    gradients = torch.autograd.grad(loss, list(loop.model.parameters()), allow_unused=True)
    terms = loop.train_step(batch)
    torch.testing.assert_close(terms["loss"], loss.detach())
    norm = torch.stack([g.norm() for g in gradients if g is not None]).norm()
    torch.testing.assert_close(terms["grad_norm"], norm)
    for (name, parameter), gradient in zip(loop.model.named_parameters(), gradients, strict=True):
        if gradient is None or not gradient.any():
            continue
        # The first Adam step moves by lr times the gradient's sign (and eps), after the decay.
        expected = before[name] * (1 - 1e-3 * 0.1) - 1e-3 * gradient / (gradient.abs() + 1e-8)
        torch.testing.assert_close(parameter.detach(), expected, atol=1e-6, rtol=1e-4)


def test_train_step_in_microbatches_equals_the_whole_batch(make_loop):
    # Losses and gradients, not weights: Adam's first steps blow up rounding where a gradient is nearly zero.
    whole, split = make_loop("a", batch_size=4), make_loop("b", batch_size=4, microbatch=1)
    batch = next(iter(whole.loader(0)))
    sums = [loop._backward(batch) for loop in (whole, split)]
    torch.testing.assert_close(sums[0], sums[1], atol=1e-6, rtol=1e-5)
    for (name, a), b in zip(whole.model.named_parameters(), split.model.parameters(), strict=True):
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, atol=1e-6, rtol=1e-4, msg=name)


def test_ema_follows_its_formula_and_starts_young(make_loop):
    loop = make_loop(ema_rate="0.9,0.5")
    expected = {rate: weights_of(loop) for rate in ("0.9", "0.5")}
    batches = iter(loop.loader(0))
    for step in (1, 2, 3):
        loop.train_step(next(batches))
        for rate, average in expected.items():
            decay = min(float(rate), (1 + step) / (10 + step))
            for key, value in loop.model.state_dict().items():
                average[key] = decay * average[key] + (1 - decay) * value
    for rate, average in expected.items():
        for key, value in average.items():
            torch.testing.assert_close(loop.emas[rate][key], value, atol=1e-6, rtol=1e-5)


CASES = {"plain": {}, "bf16": {"precision": "bf16", "noise_bank_size": 0, "microbatch": 1}}
CASES["random"] = {"dropout": 0.3, "learn_sigma": True, "add_noise": True, "drop_rate": 0.3}
CASES["random"]["schedule_sampler"] = "loss-second-moment"


@pytest.mark.parametrize("flags", CASES.values(), ids=CASES)
def test_resume_is_exact(make_loop, flags):
    straight = make_loop("straight", total_steps=5, **flags)
    straight.run()
    make_loop("broken", total_steps=2, eval_interval=1, **flags).run()
    resumed = make_loop("broken", total_steps=5, resume_checkpoint="auto", num_workers=1, **flags)
    assert resumed.step == 2
    resumed.run()
    assert_same(weights_of(resumed), weights_of(straight))
    assert_same(resumed.emas["0.9"], straight.emas["0.9"])
    assert_same(resumed.sampler.state_dict(), straight.sampler.state_dict())
    for mine, theirs in zip(resumed.optimizer.state.values(), straight.optimizer.state.values(), strict=True):
        assert_same(mine, theirs)
    assert [row["step"] for row in table(resumed)] == ["1", "2", "3", "4", "5"]
    assert [row["loss"] for row in table(resumed)] == [row["loss"] for row in table(straight)]


def test_resume_refuses_another_batch_size_or_seed(make_loop):
    make_loop(total_steps=1).run()
    with pytest.raises(InputError, match=r"state000001\.pt: --batch_size 4 .*contradicts .* made with 2"):
        make_loop(resume_checkpoint="auto", batch_size=4)
    with pytest.raises(InputError, match=r"--seed 5 .*contradicts .* made with 0"):
        make_loop(resume_checkpoint="auto", seed=5)


def test_row_leaves_out_steps_that_are_not_finite(make_loop):
    loop = make_loop(total_steps=7, log_interval=3)
    train_step = loop.train_step

    def breaking(batch):
        if loop.step in (1, 3, 4, 5):
            batch["image"][:] = float("nan")
        return train_step(batch)

    loop.train_step = breaking
    loop.run()
    rows = table(loop)
    assert [row["skipped_steps"] for row in rows] == ["1", "4", "4"]
    assert float(rows[0]["loss"]) > 0 and float(rows[0]["grad_norm"]) > 0  # of the two finite steps
    assert rows[1]["loss"] == rows[1]["grad_norm"] == "" and float(rows[2]["loss"]) > 0


def test_running_means_are_of_finite_steps_since_the_last_row():
    means, true = RunningMeans(Group()), torch.tensor(True)
    for value, finite in ((1.0, true), (float("inf"), ~true), (3.0, true)):
        means.add({"loss": torch.tensor(value), "mse": torch.tensor(2 * value)}, finite)
    assert means.close(batch_size=4)[0] == {"loss": 2.0, "mse": 4.0}
    means.add({"loss": torch.tensor(7.0)}, true)
    with means.paused():
        time.sleep(0.3)
    found, rate = means.close(1)
    assert found == {"loss": 7.0} and rate > 1 / 0.3  # the pause does not count


def with_scaler(loop):
    """Give a loop the loss scale that fp16 has on a GPU."""
    loop.scaler, loop.max_skipped = torch.amp.GradScaler("cpu", init_scale=2.0**10), MAX_SKIPPED_SCALED
    return loop


def test_scaler_changes_nothing_and_its_overflows_are_counted(make_loop):
    plain, scaled = make_loop("plain"), with_scaler(make_loop("scaled"))
    for loop in (plain, scaled):
        batches = iter(loop.loader(0))
        broken, good = next(batches), next(batches)
        broken["image"][0, 0, 0, 0] = float("nan")
        before = weights_of(loop)
        loop.train_step(broken)
        assert_same(weights_of(loop), before)
        assert int(loop.skipped) == int(loop.skipped_now) == 1
        loop.train_step(good)
        assert int(loop.skipped) == 1 and int(loop.skipped_now) == 0 and loop.step == 2
        assert any(not torch.equal(before[key], value) for key, value in weights_of(loop).items())
    assert scaled.scaler.get_scale() == 2.0**9
    assert_same(weights_of(scaled), weights_of(plain))


def test_scaler_resumes_its_scale(make_loop):
    loop = with_scaler(make_loop())
    broken = next(iter(loop.loader(0)))
    broken["image"][:] = float("nan")
    for _ in range(MAX_SKIPPED + 1):
        loop.train_step(broken)
    loop._check_finite()  # more overflows than a run without a scale may have
    loop.save()
    resumed = with_scaler(make_loop("other"))
    resumed.resume(loop.settings.checkpoint_dir, loop.step)
    assert resumed.scaler.get_scale() == loop.scaler.get_scale() == 2.0 ** (10 - MAX_SKIPPED - 1)
    assert int(resumed.skipped) == int(resumed.skipped_now) == MAX_SKIPPED + 1


def test_run_stops_where_losses_stay_broken_and_names_the_pictures(make_loop, tmp_path):
    loop = make_loop(total_steps=50, save_interval=2)
    loader = loop.loader

    def breaking(position):
        for k, batch in enumerate(loader(position)):
            if k >= 3:
                batch["image"][:] = float("nan")
            yield batch

    loop.loader = breaking
    with pytest.raises(InputError, match="no finite loss") as caught:
        loop.run()
    assert "toytown_" in str(caught.value) and "\n" not in str(caught.value)
    assert loop.step == 3 + MAX_SKIPPED
    assert all(torch.isfinite(value).all() for value in weights_of(loop).values())
    saved = torch.load(tmp_path / "run" / "model000002.pt", weights_only=True)
    assert all(torch.isfinite(value).all() for value in saved.values())


def test_learning_rate_warms_up_and_anneals(make_loop):
    loop = make_loop(lr=1.0, lr_warmup_steps=4, lr_anneal_steps=8)
    rates = [loop.learning_rate() for loop.step in range(8)]
    assert rates == pytest.approx([0.25, 0.5 * 7 / 8, 0.75 * 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])
    assert loop.settings.last_step == 8


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGUSR1, 75)])
def test_run_ends_between_steps_with_a_checkpoint_on_a_signal(make_loop, number, code):
    straight = make_loop("straight", total_steps=5)
    straight.run()
    loop = make_loop(total_steps=5)
    train_step = loop.train_step
    before = signal.getsignal(number)  # a background job ignores SIGINT

    def interrupted(batch):
        if loop.step == 2:
            os.kill(os.getpid(), number)
            if number != signal.SIGINT:
                os.kill(os.getpid(), number)  # SLURM and a wrapper may both send it
        return train_step(batch)

    loop.train_step = interrupted
    with pytest.raises(Interrupted) as stop:
        loop.run()
    assert stop.value.code == code
    resumed = make_loop(total_steps=5, resume_checkpoint="auto")
    assert resumed.step == 3  # the step at work was finished first
    resumed.run()
    assert_same(weights_of(resumed), weights_of(straight))
    assert signal.getsignal(number) is before


def test_run_leaves_files_alone_on_a_signal_before_the_first_step(make_loop, tmp_path):
    make_loop(total_steps=2).run()
    files = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run").glob("*0*")}
    with Interrupts() as interrupts:
        os.kill(os.getpid(), signal.SIGUSR1)
        with pytest.raises(Interrupted):
            make_loop(total_steps=4, resume_checkpoint="auto").run(interrupts)
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run").glob("*0*")} == files


# -- saving -----------------------------------------------------------------------------------------------------------


def failing_saves(monkeypatch, steps):
    """Let the saves of some steps fail as on a full disk."""
    save = checkpoint.save_checkpoint

    def full(directory, step, *rest):
        if step in steps:
            raise OSError(28, "No space left on device")
        save(directory, step, *rest)

    monkeypatch.setattr(checkpoint, "save_checkpoint", full)


def test_run_goes_on_when_a_save_fails(make_loop, tmp_path, monkeypatch, capsys):
    straight = make_loop("straight", total_steps=6)
    straight.run()
    failing_saves(monkeypatch, {2, 3, 5})
    loop = make_loop(total_steps=6, save_interval=1)
    assert loop.run() == 6
    assert_same(weights_of(loop), weights_of(straight))
    said = capsys.readouterr().err
    assert said.count("could not be saved") == 3 and "the last whole checkpoint is of step 1; going on" in said
    assert sorted(path.name for path in (tmp_path / "run").glob("model*")) == [f"model00000{k}.pt" for k in (1, 4, 6)]


def test_run_needs_its_last_save(make_loop, monkeypatch):
    failing_saves(monkeypatch, {2})
    with pytest.raises(OSError, match=r"No space left.*the last whole checkpoint is of step 1, go on from it"):
        make_loop(total_steps=2, save_interval=1).run()


# -- stopping and resuming --------------------------------------------------------------------------------------------


def test_resume_after_early_stopping_stays_stopped(make_loop):
    flags = {"total_steps": 50, "eval_interval": 1, "eval_items": 1, "min_delta": 100}
    make_loop(patience=2, **flags).run()
    resumed = make_loop(patience=2, resume_checkpoint="auto", **flags)
    assert resumed.run() == 3
    assert make_loop(patience=4, resume_checkpoint="auto", **flags).run() == 5


def test_resume_takes_weight_decay_from_the_flag(make_loop):
    make_loop(total_steps=1).run()
    loop = make_loop(resume_checkpoint="auto", weight_decay=0.5)
    assert [group["weight_decay"] for group in loop.optimizer.param_groups] == [0.5]


def test_resume_takes_moments_in_another_memory_layout(make_loop, tmp_path):
    # Files of the family, and of sharded runs, have plain layouts; the network's is channels_last.
    straight = make_loop("straight", total_steps=4)
    straight.run()
    make_loop(total_steps=2).run()
    path = tmp_path / "run" / "opt000002.pt"
    saved = torch.load(path, weights_only=True)
    for values in saved["state"].values():
        values |= {name: values[name].contiguous() for name in ("exp_avg", "exp_avg_sq")}
    replace_part(tmp_path / "run", 2, "opt", saved)
    resumed = make_loop(total_steps=4, resume_checkpoint="auto")
    resumed.run()
    assert_same(weights_of(resumed), weights_of(straight))


def test_resume_refuses_an_average_of_another_network(make_loop, tmp_path):
    make_loop(total_steps=1).run()
    replace_part(tmp_path / "run", 1, "ema_0.9_", {"out.2.weight": torch.zeros(1)})
    with pytest.raises(InputError, match=r"ema_0\.9_000001\.pt: missing key"):
        make_loop(resume_checkpoint="auto")


FOREIGN = [("state", []), ("state", {"step": 1}), ("opt", {"step": 1})]
FOREIGN += [("opt", {"state": {}, "param_groups": [{"params": [0, 1]}]})]  # GESCO's, with use_fp16


@pytest.mark.parametrize("kind, contents", FOREIGN)
def test_resume_refuses_foreign_parts_unless_partial(make_loop, tmp_path, kind, contents):
    make_loop(total_steps=1).run()
    replace_part(tmp_path / "run", 1, kind, contents)
    with pytest.raises(InputError, match=rf"{kind}000001\.pt: it does not fit this run"):
        make_loop(resume_checkpoint="auto")
    loop = make_loop(resume_checkpoint="auto", resume_partial=True)
    assert loop.step == 1 and (kind == "state" or not loop.optimizer.state)


def test_resume_with_a_new_ema_rate_needs_partial(make_loop):
    make_loop(total_steps=1).run()
    with pytest.raises(InputError, match=r"ema_0\.5_000001\.pt: .*no readable manifest lists"):
        make_loop(resume_checkpoint="auto", ema_rate="0.9,0.5")
    loop = make_loop(resume_checkpoint="auto", ema_rate="0.9,0.5", resume_partial=True)
    assert_same(loop.emas["0.5"], weights_of(loop))


def test_run_trains_pictures_of_several_sizes_one_at_a_time(make_loop, scenes, tmp_path):
    folder = tmp_path / "mixed"
    shutil.copytree(scenes, folder)
    for path in sorted(folder.rglob("toytown_000001*.png")):
        with Image.open(path) as picture:
            wider = picture.resize((96, 32), Image.NEAREST)
        wider.save(path)
    assert make_loop(data_dir=folder, batch_size=1, total_steps=6).run() == 6


def test_run_learns(make_loop):
    loop = make_loop(total_steps=40, batch_size=4, log_interval=10, learn_sigma=True)
    loop.run()
    losses = [float(row["mse"]) for row in table(loop)]
    assert losses[-1] < 0.6 * losses[0]
    assert all(row["vb"] for row in table(loop))
