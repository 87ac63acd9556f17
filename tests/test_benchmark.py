"""python -m guided_diffusion.benchmark: flags, parts, what it prints and what it writes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import as_arguments

from guided_diffusion import benchmark
from guided_diffusion.benchmarks import sampling, scaling, services, tables
from guided_diffusion.console import InputError

NETWORK = {
    "image_size": 16,
    "num_channels": 32,
    "channel_mult": "1,1",
    "num_res_blocks": 1,
    "num_head_channels": 32,
    "attention_resolutions": "8",
    "noise_bank_size": 16,
}
SHORT = {"rounds": 2, "matmul": 16, "device": "cpu"}


def run(tmp_path, *words, **flags):
    """Run a tiny benchmark; return what it wrote."""
    path = tmp_path / "out" / "benchmark.json"
    benchmark.main([*as_arguments({**SHORT, "output": path, **flags}), *words])
    return json.loads(path.read_text())


# -- flags ------------------------------------------------------------------------------------------------------------


def test_configurations_and_flags_over_them():
    _, network, given, names = benchmark.parse([])
    assert (network.image_size, network.num_channels, network.attention_resolutions) == (64, 64, "16,8")
    assert names == list(benchmark.PARTS) and not given
    _, network, given, _ = benchmark.parse(["--configuration", "readme", "--num_channels", "64"])
    assert (network.image_size, network.num_channels, network.prediction, network.use_checkpoint) == (
        256,
        64,
        "v",
        True,
    )
    assert given == {"num_channels"}


@pytest.mark.parametrize("words", [["--quick"], ["--quick", "True"], ["--quick", "--only", "bank,step"]])
def test_quick_stands_alone(words):
    config, _, _, names = benchmark.parse(words)
    assert config.quick is True
    assert names == (["step", "bank"] if "--only" in words else [n for n, p in benchmark.PARTS.items() if p[3]])


@pytest.mark.parametrize(
    "flags, words",
    [
        ({"only": "steps"}, "--only steps: choose from step, picture"),
        ({"precision": "fp32,fp8"}, "--precision fp8: choose from"),
        ({"rounds": -1}, "--rounds -1"),
        ({"s": 0.5}, "--s 0.5: must be at least 1"),
        ({"s": "inf"}, "--s inf: must be at least 1 and finite"),
        ({"label_memory": "inf"}, "--label_memory inf: must be at least 0 and finite"),
        ({"stop_tol": 0}, "--stop_tol 0.0: must be above 0"),
        ({"stop_tol": "nan"}, "--stop_tol nan: must be above 0"),
        ({"timestep_respacing": "25"}, "--timestep_respacing 25: the parts choose"),
        ({"model_path": "x", "configuration": "S"}, "--configuration"),
        ({"output": "."}, "--output .: name a file"),
        ({"class_cond": "False"}, "--class_cond False"),
        ({"channel_mult": "x"}, "--channel_mult x"),
    ],
)
def test_flags_that_cannot_be_meant(flags, words):
    with pytest.raises(InputError, match=words):
        benchmark.parse(as_arguments(flags))


def test_help_loads_no_torch():
    code = (
        "import sys; from guided_diffusion import benchmark\ntry: benchmark.main(['--help'])\nexcept SystemExit: pass\n"
    )
    code += "print([m for m in ('torch', 'numpy', 'PIL') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n") and "--quick" in done.stdout


# -- runs -------------------------------------------------------------------------------------------------------------


def test_a_run_measures_prints_and_writes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scaling, "CANDIDATES", (1, 3))
    found = run(
        tmp_path, "--quick", only="step,picture,training,candidates,sizes,banks", precision="fp32,bf16", **NETWORK
    )
    printed = capsys.readouterr().out
    assert str(tmp_path / "out" / "benchmark.json") in printed
    parts = found["parts"]
    for title, part in parts.items():
        assert part["rows"] and f"### {title}" in printed
    plain, fast, half = parts["Reverse step with guidance"]["rows"]
    assert (plain["times_faster"], fast["precision"], half["precision"]) == (1, "fp32", "bf16")
    assert fast["largest_difference"] < 1e-4 and fast["largest_difference_of_chain"] < 1e-3 < half["relative_rms"] < 0.1
    assert fast["gflop"] < plain["gflop"] / 2
    pictures = parts["One picture"]["rows"]
    assert [row.get("steps") for row in pictures] == [1000, *[None, 1000, 20, None] * 2]
    assert all(row["times_faster"] > 0 for row in pictures if row["sampler"] == "DPM-Solver++ logsnr20")
    assert {(row["path"], row["batch"], row["pass"]) for row in parts["Training step"]["rows"]} == {
        ("plain", 1, 1),
        ("fast", 1, 1),
    }
    assert [row["candidates"] for row in parts["Noise candidates"]["rows"]] == [1, 3] * 2
    assert found["left_out"] and found["configuration"]["parameters"] > 1e5 and found["versions"]["torch"]
    assert found["hardware"]["device"] == "cpu"


def test_a_checkpoint_brings_its_network_and_stops_its_own_chain(tmp_path, trained):
    found = run(tmp_path, model_path=trained, only="picture", precision="fp32", quick=True, stop_tol=10)
    assert found["configuration"]["flags"]["prediction"] == "v" and found["configuration"]["picture"] == "16x32"
    assert found["parts"]["One picture"]["rows"][-1]["seconds"] > 0


def test_a_short_process_has_chains_of_its_own_length(tmp_path, monkeypatch):
    monkeypatch.setattr(scaling, "CANDIDATES", (1,))
    only = "step,picture,candidates"
    found = run(tmp_path, only=only, precision="fp32", rounds=1, diffusion_steps=3, **NETWORK)["parts"]
    assert "after a chain of 3 steps" in found["Reverse step with guidance"]["notes"][1]
    pictures = found["One picture"]["rows"]
    assert [(row["sampler"], row.get("steps")) for row in pictures if row.get("steps")] == [("ancestral", 3)] * 2
    assert pictures[-1]["sampler"] == "DPM-Solver++ 3, stopped at 0.02" and found["Noise candidates"]["rows"]


def test_compiling_without_a_compiler_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(InputError, match=r"--compile True: torch\.compile needs a compiler"):
        run(tmp_path, only="banks", compile=True, **NETWORK)


@pytest.mark.parametrize("kind", [RuntimeError, InputError])
def test_a_part_that_fails_leaves_the_others(tmp_path, monkeypatch, kind):
    def fail(setup):
        raise kind("out of\nmemory")

    monkeypatch.setattr(sampling, "picture", fail)
    with pytest.raises(SystemExit, match="1 of 2 parts failed: picture"):
        run(tmp_path, only="banks,picture", quick=True, **NETWORK)
    parts = json.loads((tmp_path / "out" / "benchmark.json").read_text())["parts"]
    assert parts["One picture"]["notes"] == ["failed: out of memory"]
    assert parts["Cost against the bank's entries"]["rows"]


def test_an_interrupted_run_keeps_what_it_has(tmp_path, monkeypatch):
    def interrupt(setup):
        raise KeyboardInterrupt

    monkeypatch.setattr(services, "bank", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, only="step,bank", quick=True, **NETWORK)
    assert list(json.loads((tmp_path / "out" / "benchmark.json").read_text())["parts"]) == [
        "Reverse step with guidance"
    ]


def test_the_document_of_a_file_is_what_was_printed(tmp_path, capsys):
    run(tmp_path, only="banks", quick=True, **NETWORK)
    printed = capsys.readouterr().out
    root = Path(benchmark.__file__).parents[1]
    script = [sys.executable, "docs/benchmark_tables.py", tmp_path / "out" / "benchmark.json"]
    done = subprocess.run(script, cwd=root, env={"PYTHONPATH": str(root)}, capture_output=True, text=True, check=True)
    lines = [line for line in done.stdout.splitlines() if line]
    assert lines and [line for line in printed.splitlines() if line][: len(lines)] == lines


# -- tables -----------------------------------------------------------------------------------------------------------


def test_a_table_has_a_column_for_each_key():
    rows = [
        {"path": "plain", "ms": 1234.5, "gflop": None},
        {"path": "fast", "ms": 0.5, "gflop": 2e-6, "times_faster": 12},
    ]
    assert tables.table(rows) == [
        "| path  |    ms |   gflop | times faster |",
        "| ----- | ----: | ------: | -----------: |",
        "| plain | 1,234 |         |              |",
        "| fast  |   0.5 | 2.0e-06 |           12 |",
    ]
