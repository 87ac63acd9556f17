"""How long a script takes to get going, and what for. Standard library only."""

import gc
import sys
import time
from contextlib import contextmanager


def import_torch():
    """Import torch while the collector waits: it would look again and again at objects that all stay, a tenth of the time."""
    if "torch" in sys.modules:
        return
    gc.disable()
    try:
        import torch  # noqa: F401
    finally:
        gc.enable()
    gc.freeze()  # nor shall it look at them later


class StartUp:
    """The time from here to a run's first reverse step, and named parts of it, in seconds."""

    def __init__(self):
        self.began, self.parts = time.monotonic(), {}

    @contextmanager
    def timing(self, name):
        """Add the time of the block to the part `name`."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.parts[name] = self.parts.get(name, 0.0) + time.monotonic() - started

    def line(self, **more):
        """Return one line: the seconds until now and, in brackets, those of the parts.

        :param more: further parts that were timed elsewhere, such as noise_bank=0.9.
        """
        parts = ", ".join(f"{name.replace('_', ' ')} {seconds:.1f} s" for name, seconds in {**self.parts, **more}.items())
        return f"first reverse step after {time.monotonic() - self.began:.1f} s" + (f" ({parts})" if parts else "")
