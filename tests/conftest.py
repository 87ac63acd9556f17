"""Shared by all tests: tiny scenes, the flags of a tiny network, and short runs of both scripts' parts."""

import os

import pytest

VISIBLE_DEVICES = os.environ.get("CUDA_VISIBLE_DEVICES")  # for the scripts that test_gpu.py starts
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests compare bits, on the CPU
os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads of tiny networks only wait for each other

FLAGS = """image_size=16 num_channels=32 channel_mult=1,1 num_res_blocks=1 num_head_channels=32 attention_resolutions=8
resblock_updown=True noise_schedule=cosine prediction=v noise_bank_size=16 num_workers=0"""
TINY = dict(flag.split("=") for flag in FLAGS.split())
TRAIN = {"batch_size": "2", "lr": "1e-3", "ema_rate": "0.9", "preview_items": "0", "log_interval": "1"}


def tiny_network(**flags):
    """Return an 8-pixel UNet of four classes, whose zero-initialised layers are filled, and its process."""
    import torch

    from guided_diffusion import create_model_and_diffusion, model_and_diffusion_defaults

    torch.manual_seed(0)
    small = {
        "image_size": 8,
        "num_channels": 32,
        "channel_mult": "1,1",
        "num_res_blocks": 1,
        "num_heads": 2,
        "attention_resolutions": "4",
        "num_classes": 4,
        "learn_sigma": True,
    }
    model, diffusion = create_model_and_diffusion(**{**model_and_diffusion_defaults(), **small, **flags})
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05)
    return model.eval(), diffusion


def normals(*shape, seed=0):
    """Standard normal values that follow from the seed."""
    import torch

    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sampled(model, diffusion, y, noise, method="ddpm", **options):
    """`run_chain` with the options that belong to `SamplerSettings` among its own."""
    from dataclasses import fields

    from guided_diffusion.diffusion.sampling import run_chain
    from guided_diffusion.diffusion.solvers import SamplerSettings

    names = {field.name for field in fields(SamplerSettings)} & {*options}
    settings = SamplerSettings(method, **{name: options.pop(name) for name in names})
    return run_chain(model, diffusion, y, noise, settings, **options)


def as_arguments(flags):
    """Turn {"batch_size": "2"} into ["--batch_size", "2"]."""
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    """A folder of six training and three validation scenes, 32x64."""
    from guided_diffusion.data.toy_scenes import write_toy_scenes

    folder = tmp_path_factory.mktemp("data") / "scenes"
    write_toy_scenes(str(folder), train=6, val=3, height=32, width=64, progress=False)
    return folder


def training_loop(scenes, directory, **flags):
    from guided_diffusion import build
    from guided_diffusion.config import TrainConfig, parse_config

    flags = {"data_dir": scenes, "checkpoint_dir": directory, **TINY, **TRAIN, **flags}
    config, given = parse_config(TrainConfig, "", as_arguments(flags))
    return build.training_loop(config, given, log=lambda line: None), config


@pytest.fixture
def make_loop(scenes, tmp_path):
    """Function that builds a training loop on the scenes, with flags over the tiny ones."""

    def make(folder="run", **flags):
        (tmp_path / folder).mkdir(exist_ok=True)
        return training_loop(scenes, tmp_path / folder, **flags)[0]

    return make


@pytest.fixture(scope="session")
def trained(scenes, tmp_path_factory):
    """The checkpoint folder of a few training steps, with config.json beside."""
    return train_into(tmp_path_factory.mktemp("trained"), scenes)


def train_into(directory, scenes, **flags):
    """Take four training steps; return the checkpoint folder."""
    from guided_diffusion.config import save_config

    loop, config = training_loop(scenes, directory, total_steps=4, drop_rate=0.1, **flags)
    save_config(config, directory / "config.json")
    loop.run()
    return directory


@pytest.fixture
def sample(scenes, trained, tmp_path):
    """Function that runs one share of a sampling run into a folder; returns what was logged, and the failures."""

    from guided_diffusion import build_link
    from guided_diffusion.config import SampleConfig, parse_config
    from guided_diffusion.evaluation.run import run_pictures
    from guided_diffusion.training.checkpoint import find_weights
    from guided_diffusion.training.distributed import Share

    def run(folder, share=(0, 1), **flags):
        own = {"data_dir": scenes, "model_path": trained, "results_path": tmp_path / folder, "timestep_respacing": 3}
        config, _ = parse_config(SampleConfig, "", as_arguments({**own, **TINY, **flags}))
        weights, logged = find_weights(config.model_path), []
        build = build_link.receiving_parts if config.role == "receive" else build_link.sampling_parts
        parts = build(config, weights, lambda line: None)
        logged.extend(run_pictures(config, weights, parts, logged.append, Share(*share)))
        return logged

    return run


@pytest.fixture
def receive(sample, tmp_path):
    """Function that receives a folder of messages."""

    def run(messages="sent/messages", folder="received", share=(0, 1), **flags):
        return sample(folder, share, role="receive", messages=tmp_path / messages, **flags)

    return run
