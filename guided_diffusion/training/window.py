"""Means of the losses between two rows of the table, kept on the device until they are asked for."""

import time
from contextlib import contextmanager

import torch


class Window:
    """Means of the losses since the last row, over the ranks of a `Group`."""

    def __init__(self, group):
        self.group = group
        self._reset()

    def _reset(self):
        self.sums, self.steps, self.since = {}, 0, time.monotonic()

    def add(self, terms):
        """Add one step's losses, scalars on the device."""
        for name, value in terms.items():
            self.sums[name] = self.sums.get(name, 0) + value
        self.steps += 1

    @contextmanager
    def paused(self):
        """Leave the time of the block out of the rate."""
        start = time.monotonic()
        yield
        self.since += time.monotonic() - start

    def close(self, batch_size):
        """Return the means as floats and the images per second, and start anew. All ranks must call it.

        :param batch_size: of all ranks together.
        """
        names = list(self.sums)
        means = self.group.mean(torch.stack([self.sums[name] for name in names]) / self.steps)
        values = means.tolist()  # waits for the device
        rate = self.steps * batch_size / (time.monotonic() - self.since)
        self._reset()
        return dict(zip(names, values, strict=True)), rate
