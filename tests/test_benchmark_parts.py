"""What the benchmark measures with: clocks, rates, peaks, the plain training step, the loader, start-up."""

import contextlib
import dataclasses
import mmap
import os
import pickle
import subprocess
import weakref
from pathlib import Path

import pytest
import torch
from conftest import TINY

from guided_diffusion.benchmarks import memory, sampling, services, training
from guided_diffusion.benchmarks import setup as setups
from guided_diffusion.benchmarks.hardware import _commit, hardware, versions
from guided_diffusion.benchmarks.setup import Setup, inputs, parameter_count, plain_network
from guided_diffusion.benchmarks.timing import (
    Contender,
    MatmulRate,
    alternate,
    forget_peak,
    in_fresh_process,
    quantile,
    resident,
    summary,
)
from guided_diffusion.config import TrainConfig, parse_config
from guided_diffusion.training.distributed import products_as_convolutions, release_memory

CPU = torch.device("cpu")


@pytest.fixture
def setup(scenes):
    """A `Setup` of the tiny network."""
    flags, _ = parse_config(TrainConfig, "", [word for name, value in TINY.items() for word in (f"--{name}", value)])
    return Setup(flags=flags, device=CPU, precisions=("fp32",), scenes=str(scenes), rounds=1, quick=True, side=16)


# -- clocks -----------------------------------------------------------------------------------------------------------


def test_contenders_take_turns_in_their_context_after_a_warm_up():
    calls = []

    @contextlib.contextmanager
    def inside():
        calls.append("(")
        yield
        calls.append(")")

    times = alternate(
        {"a": Contender(lambda: calls.append("a"), inside), "b": Contender(lambda: calls.append("b"))}, 2, CPU
    )
    assert "".join(calls) == "(a)b" * 3
    assert len(times["a"]) == len(times["b"]) == 2


def test_what_finds_no_memory_is_left_out_and_named():
    lacking, calls = [], []

    def large():
        calls.append("large")
        raise torch.OutOfMemoryError("2 GiB are missing")

    contenders = {"large": Contender(large), "small": Contender(lambda: calls.append("small"))}
    times = alternate(contenders, 2, CPU, too_large=lacking.append)
    assert (lacking, list(times), calls) == (["large"], ["small"], ["large", "small", "small", "small"])
    assert len(times["small"]) == 2 and summary(times, "small", "large")["times_faster"] is None
    with pytest.raises(torch.OutOfMemoryError):
        alternate(contenders, 2, CPU)


def test_summary_is_of_medians_and_paired_ratios():
    times = {"plain": [1.0, 4.0, 2.0], "fast": [0.5, 1.0, 1.0]}
    assert summary(times, "fast", "plain") == {"ms": 1000, "p10_ms": 600, "p90_ms": 1000, "times_faster": 2}
    assert quantile([3, 1, 2], 0.5) == 2 and quantile([0, 10], 0.25) == 2.5 and quantile([7], 0.9) == 7


def test_a_share_is_of_the_median_rate(setup):
    rates = MatmulRate(setup)
    rates.measure()
    assert len(rates.best["fp32"]) == 2 and min(rates.best["fp32"]) > 0
    rates.best["fp32"] = [1e9, 3e9]
    assert rates.share(1e9, 1000, "fp32") == 50


@pytest.mark.parametrize("one, count", [(2.0, 1), (2e-4, 250)])
def test_a_timing_of_products_is_long_enough_for_the_clock(setup, monkeypatch, one, count):
    counts = []
    monkeypatch.setattr(MatmulRate, "_seconds", lambda self, a, b, n: counts.append(n) or one * n)
    assert MatmulRate(setup).best["fp32"] == [pytest.approx(2 * 16**3 / one)]
    assert counts == [1, 1, count]  # warm-up, calibration, timing


def test_a_timing_of_products_is_of_all_of_them(setup):
    products = []
    counting = type("Matrix", (), {"__matmul__": lambda self, other: products.append(other)})()
    assert MatmulRate(setup)._seconds(counting, 1, 7) > 0
    assert products == [1] * 7


def test_fp32_products_are_judged_as_convolutions_round(setup, monkeypatch):
    gpu, products = torch.device("cuda"), torch.backends.cuda.matmul
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert not products.allow_tf32  # torch's default
    with products_as_convolutions(CPU):
        assert not products.allow_tf32
    with products_as_convolutions(gpu):
        assert products.allow_tf32
    assert not products.allow_tf32
    rates = MatmulRate(setup)
    assert len(rates.notes()) == 1
    rates.device = gpu
    assert rates.notes()[1].startswith("fp32: TF32 is on for the network's convolutions and off for its products")


# -- memory -----------------------------------------------------------------------------------------------------------


SIZE, SLACK = 2**28, 2**24  # 256 MiB; the system's counters lag a little


def large_block():
    """Take memory and give it back to the system, which freeing a tensor may not do; return what was held then."""
    with mmap.mmap(-1, SIZE) as block:
        block[:: mmap.PAGESIZE] = bytes(SIZE // mmap.PAGESIZE)
        return resident()


def test_a_peak_outlives_what_made_it_until_it_is_forgotten():
    held = large_block()
    assert resident() < held - SIZE + SLACK and resident(peak=True) > held - SLACK
    if forget_peak():
        assert resident(peak=True) < held - SIZE + SLACK


def test_a_fresh_process_does_not_inherit_the_peak():
    block = torch.ones(2**28)  # 1 GiB
    assert in_fresh_process(os.getpid) != os.getpid()
    assert in_fresh_process(resident, True) < resident(peak=True)
    del block


def test_a_setup_travels_to_other_processes(setup):
    told = dataclasses.replace(setup, tell=lambda what: None)
    assert pickle.loads(pickle.dumps(told.silent())) == setup


@pytest.mark.skipif(not forget_peak(), reason="this system does not let a peak be forgotten")
@pytest.mark.parametrize("measure, n", [(memory.reverse_step_peak, 1), (memory.training_step_peak, 2)])
def test_a_peak_is_of_the_steps_alone(setup, monkeypatch, measure, n):
    large_block()
    for precision in (None, "bf16"):
        found = measure(setup, precision, n)
        assert found["peak_mib"] - found["before_mib"] < SIZE / 2
    monkeypatch.setattr(memory, "seconds", lambda contender, device: large_block())
    found = measure(setup, None, n)
    assert found["peak_mib"] - found["before_mib"] > SIZE - SLACK


def test_memory_is_released_of_what_refers_to_itself():
    gone, itself = [], []
    itself.append(itself)
    weakref.finalize(tensor := torch.ones(1), gone.append, 1)
    itself.append(tensor)
    del itself, tensor
    assert not gone
    release_memory(CPU)
    assert gone


# -- network and training ---------------------------------------------------------------------------------------------


def test_random_weights_leave_no_layer_at_zero_and_the_global_stream_alone(setup):
    state = torch.random.get_rng_state()
    model = plain_network(setup)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(parameter.any() for parameter in model.parameters())
    assert parameter_count(setup) == sum(parameter.numel() for parameter in model.parameters())
    given = inputs(setup, n=3, size=(8, 24))
    assert given.x.shape == given.z.shape == (3, 3, 8, 24) and given.y.shape == (1, 36, 8, 24)


def test_the_plain_path_keeps_freed_memory_as_the_fast_one_does(setup, monkeypatch):
    kept = []
    monkeypatch.setattr(setups, "keep_freed_memory", lambda: kept.append(1))
    plain_network(setup)
    assert kept


def test_a_reverse_step_is_in_the_middle_of_its_own_process(setup):
    assert inputs(setup, 2).t.tolist() == [500, 500]
    short = dataclasses.replace(setup, flags=dataclasses.replace(setup.flags, diffusion_steps=4))
    assert inputs(short).t.tolist() == [2] and inputs(short, step=1).t.tolist() == [1] and short.chain == 4


def test_label_map_work_is_not_scaled_with_the_steps(setup, monkeypatch):
    monkeypatch.setattr(sampling, "_sampled", lambda *arguments: (3.0 + 5 * 0.5, 5))
    row = sampling._stopped(setup, None, None, "fp32", 100.0, once=3.0)
    assert row["ms_per_step"] == 1e3 * (3.0 + 50 * 0.5) / 50


def test_the_plain_step_is_the_products(setup):
    flags = dataclasses.replace(setup.flags, lr=1e-3, weight_decay=10.0, ema_rate="0.99,0.2")  # so that rules show soon
    setup = dataclasses.replace(setup, flags=flags)
    loop = training.training_loop(setup, batch_size=2)
    plain, batch = training.PlainTraining(loop, setup), next(iter(loop.loader(0)))
    first = flat(loop.model.state_dict())
    for _ in range(4):
        expected = plain.train_step(batch)
        torch.testing.assert_close(loop.train_step(batch)["loss"], expected, atol=1e-5, rtol=1e-3)
    assert list(plain.emas) == ["0.99", "0.2"]
    pairs = [
        (loop.model.state_dict(), plain.model.state_dict()),
        *((loop.emas[rate], plain.emas[rate]) for rate in loop.emas),
    ]
    for ours, theirs in pairs:
        apart, moved = flat(ours) - flat(theirs), flat(theirs) - first
        assert apart.norm() < 0.01 * moved.norm()  # rounding alone: 0.0015


def flat(weights):
    return torch.cat([weights[name].flatten() for name in sorted(weights)])


def test_a_batch_keeps_the_rows_that_found_memory(setup, monkeypatch):
    broken = []

    class Large(training.PlainTraining):
        def train_step(self, batch):
            broken.append(next(self.model.parameters()))
            broken[0].grad = torch.ones_like(broken[0])
            raise torch.OutOfMemoryError("2 GiB are missing")

    monkeypatch.setattr(training, "PlainTraining", Large)
    found = training.steps(setup)
    assert [(row["path"], row["times_faster"]) for row in found["rows"]] == [("fast", None)]
    assert found["notes"][0] == "batch 1, plain fp32 in passes of 1: out of memory"
    assert len(broken) == 1 and broken[0].grad is None


def test_a_step_that_broke_off_leaves_nothing_behind():
    whole, half = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = torch.optim.AdamW([whole, half])
    for parameter in (whole, half):
        parameter.grad = torch.ones(2)
    optimizer.step()
    del optimizer.state[half]["exp_avg_sq"]
    training._recover(optimizer)
    assert list(optimizer.state) == [whole] and whole.grad is None and half.grad is None


def test_passes_are_the_products_and_the_whole_batch(setup):
    assert list(training.pass_sizes(setup, 8)) == [2, 8] and list(training.pass_sizes(setup, 1)) == [1]
    loop = training.training_loop(setup)
    part = training.first(next(iter(loop.loader(0))), 4)
    training.fast_step(loop, part, 4, "bf16").run()
    assert len(part["path"]) == len(part["image"]) == 4
    assert (loop.settings.batch_size, loop.settings.microbatch, loop.settings.precision) == (4, 4, "bf16")


# -- services ---------------------------------------------------------------------------------------------------------


def test_the_loader_reads_the_same_from_its_cache(setup, monkeypatch):
    monkeypatch.setattr(services, "SOURCES", (64, 128))
    found = services.loader(setup)
    assert [row["from"] for row in found["rows"]] == ["files", "cache"]
    assert "arrays identical" in found["notes"][0] and "4 pictures" in found["notes"][0]


def test_a_cache_is_made_of_the_timed_pictures_alone(setup, tmp_path):
    whole, part = (services._dataset(setup, setup.scenes, str(tmp_path / str(count)), count) for count in (6, 2))
    assert (len(whole), len(part)) == (6, 2)
    sizes = [sum(path.stat().st_size for path in (tmp_path / str(count)).glob("*.cache")) for count in (6, 2)]
    assert 0 < sizes[1] < sizes[0] / 2
    assert services._same(part.item(1, 1), whole.item(1, 1))


def test_the_bank_is_not_in_memory():
    found = services.bank_costs((3, 64, 128), 1000)
    assert found["pass_s"] > 0 and found["entry_ms"] > 0
    assert found["grown_mib"] < 50 < 4 * 1000 * 3 * 64 * 128 / 2**20


def test_the_script_is_followed_to_its_first_step(tmp_path):
    flags = services._small_checkpoints(tmp_path)
    root = Path(services.__file__).parents[2]
    words = ["-c", services._TO_FIRST_STEP, *flags, *services._run_flags(tmp_path, "small")]
    found = services._timed_run("sampling", words, root)
    assert 0 <= found["bank_s"] < found["s"] and found["peak_mib"] > 100
    assert not list(tmp_path.rglob("results.csv"))


def test_a_run_that_fails_says_why(tmp_path):
    with pytest.raises(RuntimeError, match=r"broken: .*division by zero"):
        services._timed_run("broken", ["-c", "1/0"], tmp_path)


def test_hardware_and_versions():
    facts = hardware(CPU)
    assert facts["cpu"] and facts["cores"] >= 1 and facts["threads"] == torch.get_num_threads() and facts["gpu"] is None
    assert versions()["torch"] == torch.__version__


def test_the_commit_is_this_packages_own(tmp_path):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "first"], check=True)
    (tmp_path / "inside").mkdir()
    assert _commit(tmp_path) and _commit(tmp_path / "inside") is None
