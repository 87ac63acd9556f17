"""docs/benchmark.py: its flags, plain steps against the product's, a part that fails, a whole run."""

import json
from pathlib import Path

import benchmark
import pytest
import torch
from conftest import TINY, as_arguments

from guided_diffusion.config import TrainConfig, parse_config
from guided_diffusion.console import InputError


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """What `prepare` makes of a tiny configuration."""
    monkeypatch.setitem(benchmark.CONFIGURATIONS, "S", " ".join(as_arguments({**TINY, "image_size": 32})))
    monkeypatch.setattr(benchmark, "SIDE", 16)
    monkeypatch.setattr(benchmark, "SAMPLERS", (("dpm++", "logsnr3"), ("ddim", "5")))
    bench = benchmark.prepare(["--quick", "--device", "cpu", "--output", str(tmp_path / "b.json")], tmp_path)
    bench.precisions, bench.cases = ["fp32"], [("plain", "fp32"), ("fast", "fp32")]
    return bench


@pytest.mark.parametrize("words", ["--only steps", "--output {file}/b.json", "--device tpu"])
def test_prepare_refuses_bad_flags(words, tmp_path):
    (tmp_path / "a.json").write_text("")
    with pytest.raises(InputError, match=words.split()[0]):
        benchmark.prepare(words.format(file=tmp_path / "a.json").split(), tmp_path)


def test_prepare_keeps_precisions_that_the_device_can_do(tmp_path):
    bench = benchmark.prepare(["--configuration", "readme", "--device", "cpu", "--compile"], tmp_path)
    assert bench.precisions == ["fp32", "bf16"] and bench.cases[0] == ("plain", "fp32")
    assert (bench.config.image_size, bench.config.use_checkpoint, bench.config.compile) == (256, True, True)


def test_reverse_step_is_the_same_plain_and_fast(bench):
    results = []
    for path in ("plain", "fast"):
        torch.manual_seed(0)
        results.append(benchmark.reverse_step(bench, path, "fp32")())
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-4)


def test_step_rows_are_of_medians_and_rates(bench):
    bench.rates["fp32"] = 1e9
    a = torch.randn(64, 64)
    cases = {("plain", "fp32"): lambda: [a @ a, a @ a], ("fast", "fp32"): lambda: a @ a}
    plain, fast = (dict(zip(benchmark.STEP, row, strict=True)) for row in benchmark.step_rows(bench, cases, 1))
    assert (plain["times faster"], fast["path"], fast["host waits"]) == (1, "fast", "")
    assert fast["GFLOP/s"] == pytest.approx(2 * 64**3 / fast["ms"] / 1e6)
    assert fast["% of product rate"] == pytest.approx(100 * fast["GFLOP/s"])


def test_host_waits_are_counted():
    x = torch.ones(2)
    assert benchmark.host_waits(lambda: (x.sum().item(), x.max().item())) == "aten::item 2"
    assert benchmark.host_waits(lambda: x + x) == "none"


def test_plain_training_takes_the_products_steps(make_loop):
    loop = make_loop(batch_size=2, lr=1e-3, weight_decay=10.0, ema_rate="0.99,0.2")
    plain = benchmark.PlainTraining(loop, parse_config(TrainConfig, "", as_arguments(TINY))[0])
    first, batches = flat(loop.model.state_dict()), iter(loop.loader(0))
    for _ in range(3):
        batch = next(batches)
        expected = loop.train_step(batch)["loss"]
        torch.testing.assert_close(plain.train_step(batch), expected, rtol=1e-3, atol=1e-5)
    pairs = [(loop.emas[rate], plain.emas[rate]) for rate in ("0.99", "0.2")]
    for ours, theirs in [(loop.model.state_dict(), plain.model.state_dict()), *pairs]:
        assert (flat(ours) - flat(theirs)).norm() < 0.01 * (flat(theirs) - first).norm()


def flat(weights):
    return torch.cat([weights[name].flatten() for name in sorted(weights)])


def test_measure_notes_a_failure_and_keeps_rows(bench):
    def part(bench):
        """A part"""
        yield "first", 12345.678
        raise RuntimeError("out of\nmemory")

    found = benchmark.measure(bench, part, ("what", "ms"))
    table = ["| what | ms |", "| --- | --- |", "| first | 1.23e+04 |"]
    assert benchmark.section(found) == ["", "### A part", "", *table, "failed: out of memory"]


def test_main_writes_what_it_prints(bench, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "prepare", lambda arguments, folder: bench)
    bench.only = "step"
    benchmark.main()
    printed, results = capsys.readouterr().out, json.loads(Path(bench.output).read_text())
    assert list(results["parts"]) == ["products", "step"] and results["about"]["torch"] == torch.__version__
    for found in results["parts"].values():
        assert found["rows"] and "\n".join(benchmark.section(found)) in printed


@pytest.mark.slow
@pytest.mark.parametrize("name, count", [("picture", 1), ("training", 2), ("memory", 2), ("loader", 2)])
def test_part_has_a_row_for_each_case(bench, name, count):
    bench.rates["fp32"] = 1e9
    found = benchmark.measure(bench, *benchmark.PARTS[name])
    assert not found["failed"] and [len(row) for row in found["rows"]] == [len(found["columns"])] * count
