"""What must not change from one version to the next: values noted in golden.json.

Integers (message bytes, flags, columns) are compared exactly, floats with a tolerance for other CPUs. After a change
that is meant, `PYTHONPATH=. python tests/test_golden.py` writes the file anew.
"""

import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, TRAIN, as_arguments, tiny_network
from PIL import Image

from guided_diffusion import NoiseBank, sample
from guided_diffusion.config import SampleConfig, TrainConfig
from guided_diffusion.diffusion.solvers import SamplerSettings
from guided_diffusion.link.message import Header, Message, Session, to_bytes

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = Path(__file__).with_name("golden.json")


def label_map(k):
    """A 32x64 map of five Cityscapes ids that needs no drawing library."""
    rows, columns = np.indices((32, 64))
    ids = np.full((32, 64), 23, np.uint8)
    ids[rows > 12 + k] = 7
    ids[(columns // (5 + k) + k) % 3 == 0] = 11
    ids[(rows - 20) ** 2 + (columns - 20 - 9 * k) ** 2 < 30] = 26
    ids[(rows > 26) & (columns < 10 + k)] = 8
    return ids


def write_scenes(root):
    """Write four training and three validation scenes in the Cityscapes layout."""
    for split, k in (*(("train", k) for k in range(4)), *(("val", k) for k in range(4, 7))):
        ids = label_map(k)
        wide = ids.astype(int)
        picture = np.stack([wide * 7 % 256, wide * 3 % 256, (wide * 5 + 40) % 256], -1).astype(np.uint8)
        instances = np.where(ids == 26, 26000 + (np.indices(ids.shape)[1] > 20 + 9 * k), ids).astype(np.uint16)
        files = {"leftImg8bit": ("leftImg8bit", picture), "gtFine/": ("gtFine_labelIds", ids)}
        files["gtFine"] = ("gtFine_instanceIds", instances)
        for folder, (ending, array) in files.items():
            path = root / folder / split / "town" / f"town_{k:06d}_000000_{ending}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(path)


def some(tensor):
    """Nine values spread over a tensor, and its norm."""
    flat = tensor.detach().double().flatten()
    return [*flat[:: max(1, len(flat) // 8)][:9].tolist(), float(flat.norm())]


def script(name, *arguments):
    """Run one of the two scripts."""
    done = subprocess.run([sys.executable, ROOT / name, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def bank_entries():
    """Entries of the bank that published weights were trained on, and of a small one."""
    whole, small = NoiseBank((3, 256, 512), 1000, 150), NoiseBank((3, 5, 7), 40, 3)
    return {"0": some(whole[0]), "999": some(whole[999]), "small": some(small[39]), "chain": whole.chain_seed(7)}


def network_values():
    """Outputs, losses and gradients of a small network with fixed weights, and pictures of the three samplers."""
    found = {}
    x, noise = torch.randn(2, 2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    y = torch.zeros(2, 5, 8, 8)
    y[:, 1, :4], y[:, 2, 4:], y[:, 4, 3] = 1, 1, 1
    for places in ("unet", "spadeboth", "enconly"):
        model, diffusion = tiny_network(unet_model=places, prediction="eps")
        t = torch.tensor([3, 700])
        losses = diffusion.training_losses(model, x, t, y=y, noise=noise)
        losses["loss"].mean().backward()
        gradient = model.input_blocks[1][0].in_layers[-1].weight.grad
        found[places] = [some(model(x, t, y)), some(losses["loss"]), some(losses["vb"]), some(gradient)]
    model, diffusion = tiny_network(timestep_respacing="5")
    for method, eta in (("ddpm", 0.0), ("ddim", 0.5), ("dpm++", 0.0)):
        found[method] = some(sample(model, diffusion, y, noise, method=method, s=1.5, eta=eta, seeds=[1, 2]).images)
    return found


def message_digests():
    """SHA-256 of three sessions, each with a message: maps at three scales, edges of several levels, noise choices."""
    found = []
    for k, (scale, levels, method) in enumerate(((1, 0, "ddim"), (2, 2, "dpm++"), (1, 16, "ddpm"))):
        steps, eta = 3 if k == 2 else 0, 0.3 if method == "ddim" else 0.0
        variance = "posterior" if k == 2 else "model"
        fields = {"height": 32, "width": 64, "num_classes": 35, "boundaries": True, "fingerprint": "0001020304050607"}
        fields |= {"label_scale": scale, "edge_levels": levels, "selected_steps": steps}
        fields |= {"step_candidates": 64, "step_atoms": 2} if steps else {}
        header = Header(sampler=SamplerSettings(method, "20", s=1.7, eta=eta, variance=variance), **fields)
        boundary = np.zeros((32, 64), bool)
        boundary[20, 10 : 20 + k] = True
        edges = (np.indices((32, 64)).sum(0) * (k + 1) % levels).astype(np.uint8) if levels else None
        codewords = (((3, 9), (1, -1)), ((0, 63), (1, 1)), ((5, 6), (-1, -1)))[:steps]
        message = Message(header, label_map(k)[::scale, ::scale], boundary, edges, 321 + k, codewords)
        session = Session(header)
        found.append(hashlib.sha256(session.file + to_bytes(session.encode(message))).hexdigest())
    return found


def flags():
    """Every flag with its default, in both scripts."""
    return {
        config.__name__: {name: field.default for name, field in config.__dataclass_fields__.items()}
        for config in (TrainConfig, SampleConfig)
    }


def runs():
    """Weights after 30 steps that were interrupted at the 15th, and the pictures and columns of a link."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_scenes(folder / "data")
        shared = {"data_dir": folder / "data", **TINY}
        train = {**shared, **TRAIN, "checkpoint_dir": folder / "run", "learn_sigma": True, "add_noise": True}
        train |= {"drop_rate": 0.2, "schedule_sampler": "loss-second-moment", "dropout": 0.1}
        script("image_train.py", *as_arguments({**train, "total_steps": 15}))
        script("image_train.py", *as_arguments({**train, "total_steps": 30, "resume_checkpoint": "auto"}))
        link = {**shared, "model_path": folder / "run", "timestep_respacing": 4, "num_samples": 2, "link": "ideal"}
        found = {}
        for kind in ("model", "ema_0.9_"):
            weights = torch.load(folder / "run" / f"{kind}000030.pt", weights_only=True)
            found[kind] = {name: float(value.double().norm()) for name, value in weights.items()}
        script("image_sample.py", *as_arguments({**link, "results_path": folder / "link", "s": 1.5}))
        found["pictures"] = [
            np.asarray(Image.open(path)).reshape(-1, 3)[::16].tolist()
            for path in sorted((folder / "link" / "samples").glob("*.png"))
        ]
        for name, file in (("columns", "link/results.csv"), ("progress", "run/progress.csv")):
            found[name] = (folder / file).read_text().splitlines()[0].split(",")
        return found


MAKERS = {"bank": bank_entries, "network": network_values, "messages": message_digests, "flags": flags, "runs": runs}


@pytest.fixture(scope="module")
def golden():
    return json.loads(GOLDEN.read_text())


def test_bank_entries(golden):
    found = bank_entries()
    for name in ("0", "999", "small"):
        assert found[name] == pytest.approx(golden["bank"][name], rel=1e-5, abs=3e-6), name
    assert found["chain"] == golden["bank"]["chain"]


def test_network_losses_and_samplers(golden):
    for name, values in network_values().items():
        tolerance = 1e-3 if name in ("ddpm", "ddim", "dpm++") else 1e-4
        assert np.hstack(values) == pytest.approx(np.hstack(golden["network"][name]), rel=1e-3, abs=tolerance), name


def test_message_bytes(golden):
    assert message_digests() == golden["messages"]


def test_flags_and_defaults(golden):
    assert json.loads(json.dumps(flags())) == golden["flags"]


def test_resumed_weights_and_link_pictures(golden):
    found, expected = runs(), golden["runs"]
    for kind in ("model", "ema_0.9_"):
        assert found[kind] == pytest.approx(expected[kind], rel=2e-2, abs=1e-2), kind
    assert np.abs(np.subtract(found["pictures"], expected["pictures"])).max() <= 2
    assert (found["columns"], found["progress"]) == (expected["columns"], expected["progress"])


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps({name: make() for name, make in MAKERS.items()}, indent=1) + "\n")
