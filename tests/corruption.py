"""Damage checkpoints in many ways, and see that nothing wrong is ever taken for right.

    python tests/corruption.py 200 --seed 0

Each case truncates, changes bytes of, or deletes one file of a folder with three saved steps, then resumes ("auto") and
loads averages. Allowed are a fall-back that is logged, a refusal (InputError), and the contents that were saved.
"""

import argparse
import copy
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch
from conftest import tiny_network

from guided_diffusion.console import InputError
from guided_diffusion.training.checkpoint import (
    file_name,
    find_weights,
    load_weights,
    restore_checkpoint,
    resume_point,
    save_checkpoint,
)

STEPS = (2, 4, 6)
RATE = "0.9999"
KINDS = ("model", f"ema_{RATE}_", "opt", "state", "manifest")
WAYS = ("truncate", "flip", "delete")


def equal(a, b):
    """Whether two nested contents of checkpoint files are the same, bit for bit."""
    if torch.is_tensor(a):
        same = torch.is_tensor(b) and a.dtype == b.dtype and a.shape == b.shape
        return same and a.numpy().tobytes() == b.numpy().tobytes()
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and a == b


class Part:
    """A part of a checkpoint: whatever torch.save takes."""

    def __init__(self, contents=None):
        self.contents = contents

    def state_dict(self):
        return self.contents

    def load_state_dict(self, contents):
        self.contents = contents


def loaded(directory, step):
    """Return the contents of a step's parts."""
    parts = {kind: Part() for kind in KINDS if kind != "manifest"}
    restore_checkpoint(directory, step, parts)
    return {kind: part.contents for kind, part in parts.items()}


class Folder:
    """A checkpoint folder of a tiny network, and the truth about it.

    :param small: only the network's output layer, for speed.
    """

    def __init__(self, path, small=False):
        self.path, self.truth = Path(path), {}
        self.model, _ = tiny_network()
        if small:
            self.model = self.model.out
        draws = torch.Generator().manual_seed(1)
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        average = {key: value.clone() for key, value in self.model.state_dict().items()}
        for step in range(1, max(STEPS) + 1):
            for parameter in self.model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=draws)
            optimizer.step()
            torch._foreach_lerp_(list(average.values()), list(self.model.state_dict().values()), 0.5)
            if step in STEPS:
                state = {"step": step, "position": 4 * step, "best": 1 / step, "stream": draws.get_state()}
                parts = {"model": self.model.state_dict(), f"ema_{RATE}_": average}
                parts |= {"opt": optimizer.state_dict(), "state": state}
                save_checkpoint(self.path, step, {kind: Part(contents) for kind, contents in parts.items()}, 1 / step)
                self.truth[step] = copy.deepcopy(parts)


def damage(path, way, draws):
    """Truncate a file, change 1 to 64 of its bytes, or delete it."""
    if way == "delete":
        return path.unlink()
    raw = bytearray(path.read_bytes())
    if way == "truncate":
        del raw[draws.randrange(len(raw)) :]
    else:
        for place in draws.sample(range(len(raw)), min(len(raw), draws.randint(1, 64))):
            raw[place] ^= draws.randint(1, 255)
    path.write_bytes(raw)


def resumed(folder, hurt, kind):
    """Resume after `kind` of step `hurt` was damaged; return the outcome, with WRONG where it is not allowed."""
    logged = []
    directory, step = resume_point(folder.path, "auto", log=logged.append)
    if not equal(loaded(directory, step), folder.truth.get(step)):
        return f"WRONG: step {step} differs from what was saved"
    return _outcome(step, hurt, logged, concerned=True)


def sampled(folder, hurt, kind):
    """Load the newest averages after `kind` of step `hurt` was damaged; return the outcome, as `resumed`."""
    logged = []
    path = Path(find_weights(str(folder.path), log=logged.append))
    load_weights(folder.model, path)
    step = int(path.name[-9:-3])
    if not equal(dict(folder.model.state_dict()), dict(folder.truth[step][f"ema_{RATE}_"])):
        return f"WRONG: {path.name} differs from what was saved"
    return _outcome(step, hurt, logged, concerned=kind in (f"ema_{RATE}_", "manifest"))


def _outcome(step, hurt, logged, concerned):
    if hurt < max(STEPS) or not concerned:
        return "newest untouched" if step == max(STEPS) and not logged else f"WRONG: took {step}, logged {logged}"
    return "fell back" if step < hurt and logged else f"WRONG: took {step} in silence"


def direct(folder, hurt, kind):
    """Load the damaged step's averages by their name: right contents or a refusal."""
    try:
        load_weights(folder.model, folder.path / file_name(f"ema_{RATE}_", hurt))
    except InputError:
        return "refused"
    right = equal(dict(folder.model.state_dict()), dict(folder.truth[hurt][f"ema_{RATE}_"]))
    return "loaded right" if right else "WRONG: loaded with other contents"


def run(folder, cases, seed):
    """Run the cases; return a Counter of (kind, way, what was tried, outcome)."""
    draws, outcomes = random.Random(seed), Counter()
    for case in range(cases):
        kind, way = KINDS[case % len(KINDS)], WAYS[case // len(KINDS) % len(WAYS)]
        hurt = max(STEPS) if draws.random() < 0.7 else draws.choice(STEPS[:-1])
        path = folder.path / file_name(kind, hurt)
        before = path.read_bytes()
        damage(path, way, draws)
        for attempt in (resumed, sampled, direct):
            try:
                found = attempt(folder, hurt, kind)
            except Exception as error:  # whole steps are there: also a refusal is a fault of the package
                found = f"WRONG: {type(error).__name__}: {error}"
            outcomes[kind, way, attempt.__name__, found] += 1
        path.write_bytes(before)
    return outcomes


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("cases", type=int, nargs="?", default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as path:
        outcomes = run(Folder(path), options.cases, options.seed)
    for (kind, way, attempt, outcome), count in sorted(outcomes.items()):
        print(f"{count:4d}  {kind:12s} {way:9s} {attempt:16s} {outcome}")
    wrong = sum(count for key, count in outcomes.items() if key[3].startswith("WRONG"))
    print(f"{options.cases} cases, seed {options.seed}: {wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
