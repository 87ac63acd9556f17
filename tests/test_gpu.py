"""Both scripts on a GPU: precisions, checkpointing, compiling, resuming, samplers, a link; pictures as on the CPU.

`python -m pytest -m slow tests/test_gpu.py`, skipped without CUDA. GPU_TEST_DEVICE=cpu runs the same on the CPU.
"""

import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, TRAIN, VISIBLE_DEVICES, as_arguments
from PIL import Image

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parent.parent
DEVICE = os.environ.get("GPU_TEST_DEVICE", "cuda")
ONE_PROCESS = [sys.executable]
# torchrun would take --s for one of its own flags; "--" ends these.
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1", "--"]
LAUNCHERS = pytest.mark.parametrize("launcher", [ONE_PROCESS, TORCHRUN], ids=["one process", "torchrun"])


def start(*command):
    """Run a command where the GPUs are visible again, and return what it did."""
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    if VISIBLE_DEVICES is not None:
        environment["CUDA_VISIBLE_DEVICES"] = VISIBLE_DEVICES
    return subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, timeout=600)


def script(launcher, name, **flags):
    done = start(*launcher, ROOT / name, *as_arguments(flags))
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module", autouse=True)
def gpu():
    if DEVICE != "cpu" and start(sys.executable, "-c", "import torch; assert torch.cuda.is_available()").returncode:
        pytest.skip("no CUDA device")


def train(launcher, scenes, folder, device=DEVICE, steps=3, **flags):
    shared = {**TINY, **TRAIN, "data_dir": scenes, "drop_rate": 0.1, "learn_sigma": True, "num_workers": 2}
    shared |= {"checkpoint_dir": folder, "device": device, "total_steps": steps}
    script(launcher, "image_train.py", **shared | flags)


def losses(folder):
    return [float(row["loss"]) for row in csv.DictReader((folder / "progress.csv").read_text().splitlines())]


@pytest.fixture(scope="module")
def weights(gpu, scenes, tmp_path_factory):
    """A checkpoint folder of the reference: twelve steps on the CPU."""
    folder = tmp_path_factory.mktemp("reference")
    train(ONE_PROCESS, scenes, folder, device="cpu", steps=12, precision="fp32")
    return folder


def sample(launcher, folder, device=DEVICE, **flags):
    """Run image_sample.py; return its pictures by file name, each (H, W, 3) int, and the rows of results.csv."""
    shared = {"results_path": folder, "device": device, "precision": "fp32", "batch_size": 3}
    script(launcher, "image_sample.py", **{**shared, **flags})
    pictures = {path.name: np.asarray(Image.open(path)).astype(int) for path in sorted(folder.glob("samples/*.png"))}
    return pictures, list(csv.DictReader((folder / "results.csv").read_text().splitlines()))


def assert_near(found, expected):
    assert found.keys() == expected.keys() and len(found) == 3
    assert all(np.abs(found[name] - picture).max() <= 2 for name, picture in expected.items())


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("use_checkpoint", [False, True])
@pytest.mark.parametrize("compiles", [False, True])
def test_gpu_trains_and_resumes(scenes, weights, tmp_path, precision, use_checkpoint, compiles, launcher=ONE_PROCESS):
    flags = {"precision": precision, "use_checkpoint": use_checkpoint, "compile": compiles}
    train(launcher, scenes, tmp_path, **flags)
    train(launcher, scenes, tmp_path, steps=6, resume_checkpoint="auto", **flags)
    assert (tmp_path / "model000006.pt").exists() and (tmp_path / "ema_0.9_000006.pt").exists()
    assert losses(tmp_path) == pytest.approx(losses(weights)[:6], rel=0.01 if precision == "fp32" else 0.1)


def test_gpu_trains_and_resumes_under_torchrun(scenes, weights, tmp_path):
    test_gpu_trains_and_resumes(scenes, weights, tmp_path, "fp32", False, False, TORCHRUN)


@LAUNCHERS
@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++"])
def test_gpu_pictures_are_those_of_the_cpu(scenes, weights, tmp_path, launcher, sampler):
    flags = {"data_dir": scenes, "model_path": weights, "sampler": sampler, "timestep_respacing": 8, "s": 1.5}
    expected, _ = sample(ONE_PROCESS, tmp_path / "cpu", "cpu", **flags)
    assert_near(sample(launcher, tmp_path / "gpu", **flags)[0], expected)


@pytest.mark.parametrize("label_memory", [0, 4])
def test_gpu_early_stopping_is_that_of_the_cpu(scenes, weights, tmp_path, label_memory):
    flags = {"data_dir": scenes, "model_path": weights, "use_ddim": True, "timestep_respacing": 12, "s": 1.5}
    flags |= {"stop_tol": 0.1, "stop_patience": 2, "label_memory": label_memory}
    expected, cpu_rows = sample(ONE_PROCESS, tmp_path / "cpu", "cpu", **flags)
    found, rows = sample(ONE_PROCESS, tmp_path / "gpu", **flags)
    assert all(int(row["steps"]) < 12 for row in cpu_rows)
    same = [name for name, one, two in zip(expected, rows, cpu_rows, strict=True) if one["steps"] == two["steps"]]
    assert len(same) >= 2  # a change that lies at the tolerance may count on one device alone
    assert all(np.abs(found[name] - expected[name]).max() <= 2 for name in same)


def test_gpu_compiled_bf16_sampling_is_close_to_the_cpu(scenes, weights, tmp_path):
    flags = {"data_dir": scenes, "model_path": weights, "use_ddim": True, "timestep_respacing": 4, "s": 1.5}
    expected, _ = sample(ONE_PROCESS, tmp_path / "cpu", "cpu", **flags)
    found, _ = sample(ONE_PROCESS, tmp_path / "gpu", **{**flags, "precision": "bf16", "compile": True})
    assert all(np.abs(found[name] - picture).mean() <= 4 for name, picture in expected.items())


@LAUNCHERS
def test_gpu_transmits_and_receives(scenes, weights, tmp_path, launcher):
    flags = {"data_dir": scenes, "model_path": weights, "use_ddim": True, "timestep_respacing": 4, "s": 1.5}
    flags |= {"role": "transmit", "noise_index": "best", "candidates": 4, "results_path": tmp_path / "sent"}
    script(launcher, "image_sample.py", **flags, device=DEVICE, precision="fp32")
    receive = {"role": "receive", "messages": tmp_path / "sent" / "messages", "model_path": weights}
    expected, _ = sample(ONE_PROCESS, tmp_path / "cpu", "cpu", **receive)
    assert_near(sample(launcher, tmp_path / "gpu", **receive)[0], expected)
