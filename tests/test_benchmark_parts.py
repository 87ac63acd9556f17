"""What the benchmark measures with: clocks, rates, peaks, the plain training step, the loader, start-up."""

import contextlib
import dataclasses
import os
import pickle
from pathlib import Path

import pytest
import torch
from conftest import TINY

from guided_diffusion.benchmarks import memory, services, training
from guided_diffusion.benchmarks.hardware import hardware, versions
from guided_diffusion.benchmarks.setup import Setup, inputs, parameter_count, plain_network
from guided_diffusion.benchmarks.timing import Contender, MatmulRate, alternate, in_fresh_process, quantile, resident, summary
from guided_diffusion.config import TrainConfig, parse_config

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

    times = alternate({"a": Contender(lambda: calls.append("a"), inside), "b": Contender(lambda: calls.append("b"))}, 2, CPU)
    assert "".join(calls) == "(a)b" * 3
    assert len(times["a"]) == len(times["b"]) == 2


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


# -- memory -----------------------------------------------------------------------------------------------------------


def test_a_peak_outlives_what_made_it():
    block = torch.ones(2**26)  # 256 MiB
    held = resident()
    del block
    slack = 2**24  # the system's counters lag a little
    assert resident() < held - 2**28 + slack and resident(peak=True) > held - slack


def test_a_fresh_process_does_not_inherit_the_peak():
    block = torch.ones(2**28)  # 1 GiB
    assert in_fresh_process(os.getpid) != os.getpid()
    assert in_fresh_process(resident, True) < resident(peak=True)
    del block


def test_a_setup_travels_to_other_processes(setup):
    told = dataclasses.replace(setup, tell=lambda what: None)
    assert pickle.loads(pickle.dumps(told.silent())) == setup


@pytest.mark.parametrize("precision", [None, "bf16"])
def test_peaks_are_above_what_was_there(setup, precision):
    for found in (memory.reverse_step_peak(setup, precision), memory.training_step_peak(setup, precision, 2)):
        assert 0 < found["before_mib"] <= found["peak_mib"]


# -- network and training ---------------------------------------------------------------------------------------------


def test_random_weights_leave_no_layer_at_zero_and_the_global_stream_alone(setup):
    state = torch.random.get_rng_state()
    model = plain_network(setup)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(parameter.any() for parameter in model.parameters())
    assert parameter_count(setup) == sum(parameter.numel() for parameter in model.parameters())
    given = inputs(setup, n=3, size=(8, 24))
    assert given.x.shape == given.z.shape == (3, 3, 8, 24) and given.y.shape == (1, 36, 8, 24)


def test_the_plain_step_is_the_products(setup):
    loop = training.training_loop(setup, batch_size=2)
    plain, batch = training.PlainTraining(loop, setup), next(iter(loop.loader(0)))
    for _ in range(2):
        expected = plain.train_step(batch)
        torch.testing.assert_close(loop.train_step(batch)["loss"], expected, atol=1e-5, rtol=1e-4)


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
