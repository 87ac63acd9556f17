"""The benchmark: its options, its plain training step against the product's, a part that fails, a run."""

import json
import subprocess
import sys

import pytest
import torch

from guided_diffusion import benchmark
from guided_diffusion.console import InputError
from guided_diffusion.training.devices import select_device


@pytest.mark.parametrize("words", ["--only steps", "--precision fp8", "--output {file}/b.json"])
def test_parse_refuses_bad_options(words, tmp_path):
    (tmp_path / "a.json").write_text("")
    with pytest.raises(InputError, match=words.split()[0]):
        benchmark.parse(words.format(file=tmp_path / "a.json").split())


def test_table_shows_three_digits():
    lines = benchmark.table(("what", "ms"), [("a", 12345.678), ("b", 0.012345)])
    assert lines == ["| what | ms |", "| --- | --- |", "| a | 1.23e+04 |", "| b | 0.0123 |"]


def test_plain_training_takes_the_products_steps(make_loop):
    loop = make_loop(batch_size=2, lr=1e-3)
    from guided_diffusion.config import TrainConfig

    plain = benchmark.PlainTraining(loop, TrainConfig(**loop.settings.config))
    batches = iter(loop.loader(0))
    for _ in range(2):
        batch = next(batches)
        expected = loop.train_step(batch)["loss"]
        torch.testing.assert_close(plain.train_step(batch), expected, rtol=1e-4, atol=1e-6)
    own, other = plain.emas["0.9"], loop.emas["0.9"]
    assert all((own[name] - other[name]).abs().max() < 2e-3 for name in other)


def test_failing_part_is_noted_and_keeps_its_rows(monkeypatch):
    def part(bench):
        """A part"""
        yield "first", 1.0
        raise RuntimeError("out of\nmemory")

    monkeypatch.setitem(benchmark.PARTS, "part", (part, ("what", "ms")))
    bench = benchmark.Bench(None, select_device("cpu"), [])
    found = benchmark.measure(bench, "part")
    assert found["rows"] == [("first", 1.0)] and found["failed"] == "out of memory"


@pytest.mark.slow
def test_benchmark_writes_its_tables(tmp_path):
    words = ["--quick", "--only", "loader,startup", "--precision", "fp32", "--output", tmp_path / "out.json"]
    command = [sys.executable, "-m", "guided_diffusion.benchmark", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    parts = json.loads((tmp_path / "out.json").read_text())["parts"]
    assert list(parts) == ["products", "startup", "loader"] and all(part["rows"] for part in parts.values())
    assert "| source files |" in done.stdout and str(tmp_path / "out.json") in done.stdout
