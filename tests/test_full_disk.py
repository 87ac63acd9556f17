"""Training on a disk that is full for a while: a small tmpfs, where this user may mount one."""

import subprocess

import pytest
import torch

from guided_diffusion.console import InputError
from guided_diffusion.training.manifest import problem_of


def mount(*options):
    """Run mount; return whether it worked."""
    try:
        return subprocess.run(["mount", *options], capture_output=True).returncode == 0
    except OSError:
        return False


@pytest.fixture
def small_disk(tmp_path):
    """A folder of 64 MiB, room for one checkpoint of the tiny network and not for two."""
    folder = tmp_path / "run"
    folder.mkdir()
    if not mount("-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)):
        pytest.skip("mounting a tmpfs needs root")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_training_survives_until_there_is_room_again(make_loop, small_disk, capsys):
    straight = make_loop("straight", total_steps=7)
    straight.run()
    loop = make_loop("run", total_steps=7, save_interval=1, save_failures=10, keep_checkpoints=1)
    train_step, whole = loop.train_step, []

    def step(batch):
        whole.append(problem_of(small_disk, 1) if loop.step else "")
        if loop.step == 4:
            assert mount("-o", "remount,size=160m", str(small_disk))
        return train_step(batch)

    loop.train_step = step
    assert loop.run() == 7
    said = capsys.readouterr().err
    assert all(f"step {k} could not be saved" in said for k in (2, 3, 4)) and "No space left" in said
    assert "(3 of 10 failures in a row)" in said and "saved step 5" in said
    assert whole[:5] == [""] * 5  # the checkpoint of step 1, all the while
    assert problem_of(small_disk, 7) == "" and [path.name for path in small_disk.glob("model*")] == ["model000007.pt"]
    saved = torch.load(small_disk / "model000007.pt", weights_only=True)
    assert all(torch.equal(saved[key], value) for key, value in straight.model.state_dict().items())


def test_a_disk_that_stays_full_ends_the_run_and_keeps_the_last_checkpoint(make_loop, small_disk):
    loop = make_loop("run", total_steps=9, save_interval=1, save_failures=3)
    with pytest.raises(OSError, match="No space left"):
        loop.run()
    assert loop.step == 4 and problem_of(small_disk, 1) == ""
    assert not list(small_disk.glob("*.tmp"))
    try:
        resumed = make_loop("run", resume_checkpoint="auto")
    except InputError as error:
        pytest.fail(str(error))
    assert resumed.step == 1
