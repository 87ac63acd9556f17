"""Kill a training run again and again, and see that nothing is lost: python tests/kills.py [kills] [--seed N]

Every run is killed by SIGKILL: half of them at a random moment, half while a checkpoint is being written. After each
kill every checkpoint that was reported as saved must be whole; at the end the weights are those of an undisturbed run.
"""

import argparse
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from conftest import TINY, TRAIN, as_arguments
from corruption import equal

from guided_diffusion.data.toy_scenes import write_toy_scenes
from guided_diffusion.training.checkpoint import problem_of

SCRIPT = str(Path(__file__).resolve().parent.parent / "image_train.py")
SAVE_EVERY = 3
KINDS = ("model", "ema_0.9_", "opt", "state")


def command(folder, scenes, steps):
    """Return the command of the run, resuming."""
    flags = {**TINY, **TRAIN, "data_dir": scenes, "checkpoint_dir": folder, "total_steps": steps, "keep_checkpoints": 4}
    flags |= {"save_interval": SAVE_EVERY, "resume_checkpoint": "auto", "eval_interval": 5, "eval_items": 2}
    flags |= {"dropout": 0.1, "add_noise": True, "drop_rate": 0.1, "num_workers": 1}
    flags |= {"schedule_sampler": "loss-second-moment"}
    return [sys.executable, SCRIPT, *as_arguments(flags)]


def saved_steps(log):
    """Return the steps that a log reports as saved."""
    return [int(step) for step in re.findall(r"saved step (\d+)", log.read_text())]


def kill_once(folder, scenes, steps, draw, log):
    """Start the run and kill it; return (its step when it was killed, whether it was in the middle of a save)."""
    with open(log, "w") as f:
        process = subprocess.Popen(command(folder, scenes, steps), stdout=f, stderr=f)
        during_save, saves = draw.random() < 0.5, draw.randrange(3)
        wait = draw.uniform(0, 1.5)
        while process.poll() is None and len(saved_steps(log)) < saves:
            time.sleep(0.01)
        deadline = time.monotonic() + (60 if during_save else wait)
        while process.poll() is None and time.monotonic() < deadline:
            if during_save and list(folder.glob("*.tmp")):
                break
            time.sleep(0.0005)
        process.kill()
        if process.wait() != -signal.SIGKILL:
            sys.exit(f"the run ended by itself with code {process.returncode}:\n{log.read_text()[-2000:]}")
    return saved_steps(log), bool(list(folder.glob("*.tmp")))


def main():
    """Run it; exit with 1 where something was lost."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kills", type=int, nargs="?", default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", default="")
    arguments = parser.parse_args()
    root, draw = Path(arguments.folder or tempfile.mkdtemp()), random.Random(arguments.seed)
    scenes, lost, torn, kills = root / "scenes", 0, 0, 0
    write_toy_scenes(str(scenes), train=6, val=3, height=32, width=64, progress=False)
    steps, started = SAVE_EVERY * 3 * arguments.kills, time.monotonic()
    (root / "killed").mkdir()
    newest = 0
    while kills < arguments.kills:
        reported, in_save = kill_once(root / "killed", scenes, steps, draw, root / "killed.log")
        kills, torn, newest = kills + 1, torn + in_save, max([newest, *reported])
        for step in {newest, *reported[-3:]} - {0}:
            problem = problem_of(root / "killed", step)
            lost += bool(problem)
            print(f"LOST: step {step} had been reported as saved: {problem}\n" if problem else "", end="")
        seconds = time.monotonic() - started
        print(
            f"kill {kills}: {'in a save, ' if in_save else ''}step {newest} is safe; {seconds:.0f} s,"
            f" {seconds / kills * (arguments.kills - kills):.0f} s left",
            flush=True,
        )
    last = newest + 2 * SAVE_EVERY
    for name in ("killed", "straight"):
        (root / name).mkdir(exist_ok=True)
        done = subprocess.run(command(root / name, scenes, last), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    killed, straight = (
        {kind: torch.load(root / name / f"{kind}{last:06d}.pt", weights_only=True) for kind in KINDS}
        for name in ("killed", "straight")
    )
    different = [kind for kind in KINDS if not equal(killed[kind], straight[kind])]
    left = [path.name for path in (root / "killed").glob("*.tmp")]
    print(
        f"{kills} kills, {torn} of them in a save; checkpoints lost: {lost}; parts of step {last} that differ from the"
        f" undisturbed run: {different or 'none'}; temporary files left: {left or 'none'}"
    )
    return 1 if lost or different or left or kills < arguments.kills else 0


if __name__ == "__main__":
    sys.exit(main())
