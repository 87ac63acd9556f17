"""Means between two rows of the table."""

import time

import torch

from guided_diffusion.training.group import Group
from guided_diffusion.training.window import Window


def test_means_since_the_last_row():
    window = Window(Group())
    for value in (1.0, 2.0, 6.0):
        window.add({"loss": torch.tensor(value), "mse": torch.tensor(2 * value)})
    means, rate = window.close(batch_size=4)
    assert means == {"loss": 3.0, "mse": 6.0} and rate > 0
    window.add({"loss": torch.tensor(7.0)})
    assert window.close(4)[0] == {"loss": 7.0}


def test_ranks_are_averaged():
    class Two:
        def mean(self, tensor):
            return (tensor + torch.tensor([3.0, 30.0])) / 2  # the other rank's means

    window = Window(Two())
    window.add({"loss": torch.tensor(1.0), "mse": torch.tensor(10.0)})
    assert window.close(1)[0] == {"loss": 2.0, "mse": 20.0}


def test_a_pause_is_left_out_of_the_rate():
    window = Window(Group())
    window.add({"loss": torch.tensor(1.0)})
    with window.paused():
        time.sleep(0.3)
    assert window.close(1)[1] > 1 / 0.3  # one picture took less than the pause
