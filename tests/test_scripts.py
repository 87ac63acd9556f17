"""The two scripts as users run them: whole runs, bad input in one line, kills, the SLURM wrappers under bash."""

import json
import os
import pickle
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, TRAIN, as_arguments
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
SEED_TRAIN = shlex.split(
    "--dataset_mode cityscapes --lr 1e-4 --batch_size 1 --attention_resolutions 32,16,8 --diffusion_steps 1000"
    " --image_size 256 --learn_sigma True --noise_schedule linear --num_channels 256 --num_head_channels 64"
    " --num_res_blocks 2 --resblock_updown True --use_fp16 True --use_scale_shift_norm True --use_checkpoint True"
    " --save_interval 1000 --num_classes 35 --class_cond True --no_instance False --one_hot_label True"
)
SEED_SAMPLE = shlex.split(
    "--dataset_mode cityscapes --attention_resolutions 32,16,8 --diffusion_steps 1000 --image_size 256"
    " --learn_sigma True --noise_schedule linear --num_channels 256 --num_head_channels 64 --num_res_blocks 2"
    " --resblock_updown True --use_fp16 True --use_scale_shift_norm True --num_classes 35 --class_cond True"
    " --no_instance False --batch_size 1 --num_samples 100 --model_path ./checkpoints/ema_0.9999_100000.pt"
    " --results_path ./results/results_100000 --s 2 --one_hot_label True --snr 100 --pool None --unet_model unet"
)


@pytest.fixture
def run(monkeypatch, capfd, tmp_path):
    """Function that runs a script's main in this process; returns (exit code, standard output, standard error)."""
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.chdir(tmp_path)

    def script(name, *arguments):
        from guided_diffusion.console import run_script

        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        module = __import__(name)
        code = 0
        try:
            run_script(module.main)
        except SystemExit as stop:
            code = stop.code
        return code, *capfd.readouterr()

    return script


def train_flags(scenes, folder, **changes):
    return as_arguments({"data_dir": scenes, "checkpoint_dir": folder, **TINY, **TRAIN, "total_steps": 2, **changes})


def sample_flags(scenes, weights, folder, **changes):
    flags = {"data_dir": scenes, "model_path": weights, "results_path": folder}
    return as_arguments({**flags, "use_ddim": True, "timestep_respacing": 2, **changes})


@pytest.mark.slow
def test_scripts_train_then_sample(run, scenes, tmp_path):
    code, _, said = run("image_train", *train_flags(scenes, "ckpt", add_noise=True, drop_rate=0.1, preview_items=1))
    assert code == 0 and "finished at step 2" in said and "ckpt" in said
    assert json.loads((tmp_path / "ckpt" / "config.json").read_text())["num_channels"] == 32
    # The architecture comes from config.json: no network flag is given here.
    code, _, said = run("image_sample", *sample_flags(scenes, "ckpt", "out", snr=10, pool="max", s=1.5))
    assert code == 0 and "3 pictures" in said
    assert (tmp_path / "out" / "panel.png").exists() and len(list((tmp_path / "out" / "samples").iterdir())) == 3


def test_scripts_accept_the_familys_commands(run, scenes, monkeypatch):
    monkeypatch.setattr("guided_diffusion.dry_run.device_memory", lambda device: 0)  # a step would take minutes
    code, out, said = run("image_train", "--data_dir", scenes, *SEED_TRAIN, "--dry_run", "True")
    assert code == 0, said
    assert "parameters: 653,984,518" in out and "6 pictures of 256x512" in out
    command = "--data_dir", scenes, *SEED_SAMPLE, "--dry_run", "True"
    assert run("image_sample", *command)[0] == 2
    code, out, said = run("image_sample", *command, "--allow_missing_weights", "True")
    assert code == 0, said
    assert "ema_0.9999_100000.pt does not exist" in out
    assert not Path("checkpoints").exists() and not Path("results").exists()


def break_label(scenes, folder, change):
    """Copy the scenes and change the first training label with `change(path)`; return the folder."""
    shutil.copytree(scenes, folder)
    change(sorted(folder.glob("gtFine/train/*/*_labelIds.png"))[0])
    return folder


def set_id(value):
    def change(path):
        ids = np.asarray(Image.open(path)).copy()
        ids[5, 5] = value
        Image.fromarray(ids).save(path)

    return change


BAD_TRAINING = {
    "unknown flag": ({"colour": 1}, "--colour"),
    "width": ({"num_channels": 40}, "multiple of 32"),
    "heads": ({"num_head_channels": 33}, "--num_head_channels 33"),
    "size": ({"image_size": 15}, "15x30"),
    "device": ({"device": "cuda:99"}, "--device cuda:99"),
    "no data": ({"data_dir": "nowhere"}, "nowhere"),
    "no folder": ({"data_dir": ""}, "--data_dir is empty: name the data set's folder, or begin with --preset toy"),
    "resume name": ({"resume_checkpoint": "weights.pt"}, "weights.pt"),
    "resume file": ({"resume_checkpoint": "ckpt/model000009.pt"}, "model000009.pt"),
    "classes": ({"num_classes": 20}, "--num_classes is 20"),
    "folder": ({"checkpoint_dir": "file"}, "--checkpoint_dir file"),
    "memory": ({"num_channels": 3200000}, "out of memory?"),
}


@pytest.mark.parametrize("case", BAD_TRAINING)
def test_image_train_answers_bad_input_in_one_line(run, scenes, tmp_path, case):
    changes, words = BAD_TRAINING[case]
    (tmp_path / "file").write_text("not a folder")
    code, _, said = run("image_train", *train_flags(scenes, "ckpt", **changes))
    lines = [line for line in said.splitlines() if line and not line.startswith("warning")]
    assert code == (1 if case == "memory" else 2)
    assert words in lines[-1] and lines[-1].startswith("image_train.py: error: ")
    assert "Traceback" not in said
    assert not (tmp_path / "ckpt").exists() or not any((tmp_path / "ckpt").glob("*.pt"))


@pytest.mark.parametrize(
    "change, words",
    [
        (set_id(40), "has id 40, --num_classes is 35"),
        (lambda path: Image.new("RGB", (64, 32)).save(path), "RGB"),
        (lambda path: path.write_bytes(path.read_bytes()[:60]), "_labelIds.png"),
        (lambda path: Image.new("L", (32, 32)).save(path), r"(32, 32)"),
    ],
    ids=["id", "RGB", "truncated", "size"],
)
def test_image_train_answers_bad_labels_in_one_line(run, scenes, tmp_path, change, words):
    folder = break_label(scenes, tmp_path / "broken", change)
    for extra in ({"total_steps": 4}, {"dry_run": True}):
        code, _, said = run("image_train", *train_flags(folder, "ckpt", **extra))
        shutil.rmtree(tmp_path / "ckpt", ignore_errors=True)
        last = said.strip().splitlines()[-1]
        assert code == 2 and words in last and "toytown_" in last and "Traceback" not in said, said


def test_image_train_on_a_full_disk_spares_the_last_checkpoint(run, scenes, tmp_path, monkeypatch):
    save, calls = torch.save, []

    def filling(contents, f):
        calls.append(1)
        if len(calls) > 5:
            raise OSError(28, "No space left on device")
        save(contents, f)

    monkeypatch.setattr(torch, "save", filling)
    code, _, said = run("image_train", *train_flags(scenes, "ckpt", total_steps=4, save_interval=1))
    last = said.strip().splitlines()[-1]
    assert code == 1 and "No space left on device" in last and "Traceback" not in said
    assert {path.name for path in (tmp_path / "ckpt").glob("*.pt")} >= {"state000001.pt", "model000001.pt"}
    assert not list((tmp_path / "ckpt").glob("*.tmp"))


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"model_path": "none.pt"}, "none.pt"),
        ({"model_path": "garbage.pt"}, "garbage.pt"),
        ({"model_path": "evil.pt"}, "evil.pt"),
        ({"model_path": "empty"}, "no ema_"),
        ({"results_path": ""}, "--results_path"),
        ({"num_channels": 64}, "--num_channels 64 contradicts the checkpoint, trained with 32"),
        ({"noise_index": 99}, "--noise_index 99"),
        ({"timestep_respacing": "x"}, "--timestep_respacing x"),
    ],
)
def test_image_sample_answers_bad_input_in_one_line(run, scenes, trained, tmp_path, changes, words):
    (tmp_path / "empty").mkdir()
    (tmp_path / "garbage.pt").write_bytes(b"\x80garbage")
    with open(tmp_path / "evil.pt", "wb") as f:
        pickle.dump({"out.2.weight": Evil()}, f)
    code, _, said = run("image_sample", *sample_flags(scenes, trained, "out", **changes))
    lines = said.strip().splitlines()
    assert code == 2 and words in lines[-1] and "Traceback" not in said
    assert not (tmp_path / "out").exists() and not (tmp_path / "executed").exists()


def test_image_sample_warns_of_guidance_without_drop_rate_and_of_weights_without_config(run, scenes, tmp_path):
    run("image_train", *train_flags(scenes, "ckpt"))
    _, _, said = run("image_sample", *sample_flags(scenes, "ckpt", "out", s=2, num_samples=1))
    assert "warning: --s 2" in said
    shutil.copy(tmp_path / "ckpt" / "ema_0.9_000002.pt", tmp_path / "ema.pt")
    flags = {name: value for name, value in TINY.items() if name != "num_workers"}
    _, _, said = run("image_sample", *sample_flags(scenes, "ema.pt", "other", num_samples=1, **flags))
    assert "no config.json beside ema.pt" in said and "--preset gesco sets it" in said


@pytest.mark.parametrize(
    "changes, words",
    [({"resume_checkpoint": "nope/model000005.pt"}, "nope/model000005.pt"), ({"data_dir": "typo"}, "typo")],
)
def test_dry_run_finds_what_the_run_would_trip_over(run, scenes, tmp_path, changes, words):
    code, out, said = run("image_train", *train_flags(scenes, "ckpt", dry_run=True, **changes))
    assert code == 2 and words in said.splitlines()[-1] and "accepted" not in out
    code, out, said = run("image_train", "--preset", "toy", "--data_dir", "typo", "--dry_run", "True")
    assert code == 2 and "typo" in said and not (tmp_path / "typo").exists()


def test_dry_run_of_training_needs_validation_pictures_as_the_run_does(run, scenes, tmp_path):
    shutil.copytree(scenes, tmp_path / "half")
    shutil.rmtree(tmp_path / "half" / "leftImg8bit" / "val")
    shutil.rmtree(tmp_path / "half" / "gtFine" / "val")
    for extra in ({"dry_run": True}, {}):
        code, _, said = run("image_train", *train_flags(tmp_path / "half", "ckpt", preview_items=1, **extra))
        assert code == 2 and "val; " in said.splitlines()[-1] and "; --preview_items 0" in said.splitlines()[-1]


@pytest.mark.slow
def test_image_train_killed_resumes_to_the_same_weights(run, scenes, tmp_path):
    flags = {"total_steps": 12, "save_interval": 1, "add_noise": True}
    command = [sys.executable, str(ROOT / "image_train.py"), *train_flags(scenes, tmp_path / "killed", **flags)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    saved = tmp_path / "killed" / "model000002.pt"
    while not saved.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    assert not (tmp_path / "killed" / "state000012.pt").exists()
    code, _, said = run("image_train", *train_flags(scenes, "killed", resume_checkpoint="auto", **flags))
    assert code == 0 and "resumed from step" in said
    code, _, _ = run("image_train", *train_flags(scenes, "straight", **flags))
    assert code == 0
    for name in ("model000012.pt", "ema_0.9_000012.pt"):
        resumed, straight = (torch.load(tmp_path / d / name, weights_only=True) for d in ("killed", "straight"))
        assert all(torch.equal(resumed[key], straight[key]) for key in straight)


@pytest.mark.slow
def test_wrappers_run_under_bash(scenes, tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment |= {"DATA_DIR": str(scenes), "RESULTS_PATH": str(tmp_path / "out")}
    environment |= dict.fromkeys(("CHECKPOINT_DIR", "MODEL_PATH"), str(tmp_path / "ckpt"))
    off = {"precision": "fp32", "learn_sigma": False, "eval_interval": 0, "total_steps": 1, "use_checkpoint": False}
    for script, flags in (
        ("train.sh", {**TINY, **TRAIN, **off}),
        ("sample.sh", {"timestep_respacing": 2, "num_samples": 1}),
    ):
        command = ["bash", str(ROOT / script), *as_arguments(flags)]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "ckpt" / "model000001.pt").exists() and (tmp_path / "out" / "panel.png").exists()


@pytest.mark.parametrize(("script", "resume"), [("train", "--resume_checkpoint auto "), ("sample", "")])
def test_wrappers_leave_the_paths_to_the_preset_unless_they_are_named(script, resume):
    for folder, word in (({}, ""), ({"DATA_DIR": "a b"}, "--data_dir a b ")):
        command, environment = ["bash", ROOT / f"{script}.sh", "--preset", "toy"], {"PATH": os.environ["PATH"]}
        done = subprocess.run(command, env=environment | folder | {"PYTHON": "echo"}, capture_output=True, text=True)
        assert done.stdout == f"image_{script}.py --preset cityscapes {word}{resume}--preset toy\n", done.stderr


@pytest.mark.parametrize("script, memory", [("train.sh", "64G"), ("sample.sh", "32G")])
def test_wrappers_carry_their_sbatch_lines(script, memory):
    lines = (ROOT / script).read_text().splitlines()
    assert lines[0] == "#!/bin/bash"
    options = {line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")}
    expected = "partition=partitions-gpu gres=gpu:1 ntasks-per-node=1 cpus-per-task=5 time=72:00:00 mail-type=END,FAIL"
    assert {*expected.split(), f"mem={memory}", "mail-user=user@email.com"} <= options


@pytest.mark.parametrize("mode", ["coco", "ade20k"])
def test_scripts_train_and_sample_the_other_data_sets(run, tmp_path, mode):
    names = {
        "coco": ("images/{s}2017/{k}.jpg", "labels/{s}2017/{k}.png", "images/{s}_inst/{k}.png"),
        "ade20k": ("{t}/{k}.jpg", "{t}/{k}_seg.png"),
    }[mode]
    draw = np.random.default_rng(0)
    for split, long in (("train", "training"), ("val", "validation")):
        for k in range(2):
            paths = [tmp_path / "data" / name.format(s=split, t=long, k=f"{k:06d}") for name in names]
            for path, high in zip(paths, (256, 182 if mode == "coco" else 151, 3), strict=False):
                path.parent.mkdir(parents=True, exist_ok=True)
                shape = (30, 40, 3) if path.suffix == ".jpg" else (30, 40)
                Image.fromarray(draw.integers(high, size=shape, dtype=np.uint8)).save(path)
    classes = {"coco": 183, "ade20k": 151}[mode]
    extra = {"dataset_mode": mode, "num_classes": classes, "no_instance": mode == "ade20k"}
    code, _, said = run("image_train", *train_flags(tmp_path / "data", "ckpt", **extra))
    assert code == 0, said
    code, _, said = run(
        "image_sample", *sample_flags(tmp_path / "data", "ckpt", "out", dataset_mode=mode, batch_size=2)
    )
    assert code == 0 and "2 pictures" in said, said
