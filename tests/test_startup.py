"""The time of a start."""

import re
import subprocess
import sys
import time
from pathlib import Path

from guided_diffusion.console import StartUp

ROOT = Path(__file__).resolve().parent.parent


def test_the_line_names_the_parts_that_were_timed():
    start = StartUp()
    start.began -= 12.0
    with start.timing("torch"):
        pass
    start.parts["torch"] += 1.42
    line = start.line(noise_bank=0.93)
    assert re.fullmatch(r"first reverse step after 12\.\d s \(torch 1\.4 s, noise bank 0\.9 s\)", line)
    assert re.fullmatch(r"first reverse step after 0\.\d s", StartUp().line())


def test_a_part_adds_up_and_counts_what_fails(monkeypatch):
    clock = iter([0, 1, 3, 10, 14])  # begun; 1 to 3; 10 to 14
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    start = StartUp()
    with start.timing("work"):
        pass
    try:
        with start.timing("work"):
            raise ValueError
    except ValueError:
        pass
    assert start.parts == {"work": 6}


def test_the_collector_works_again_after_torch_and_leaves_a_torch_that_is_there_alone():
    code = """
import gc
from guided_diffusion.console import import_torch
import_torch()
frozen = gc.get_freeze_count()
import_torch()
print(gc.isenabled(), frozen > 0, gc.get_freeze_count() == frozen)"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("True True True\n", "")
