"""From flags to parts."""

import math
import shutil

import numpy as np
import pytest
import torch
from conftest import TINY, TRAIN, as_arguments
from PIL import Image, ImageFilter
from test_scripts import SEED_SAMPLE, SEED_TRAIN
from test_semantics import naive_edges
from torch.distributions import Normal, kl_divergence

from guided_diffusion import build, build_link, create_model_and_diffusion, model_and_diffusion_defaults
from guided_diffusion.config import SampleConfig, TrainConfig, parse_config
from guided_diffusion.console import InputError
from guided_diffusion.diffusion.solvers import SamplerSettings
from guided_diffusion.link.label_prior import LabelPrior

SMALL = {"image_size": 32, "num_channels": 32, "channel_mult": "1,1", "num_res_blocks": 1}


def test_create_model_and_diffusion_from_flags():
    flags = {**model_and_diffusion_defaults(), **SMALL, "learn_sigma": True, "timestep_respacing": "10"}
    model, diffusion = create_model_and_diffusion(**flags)
    out = model(torch.zeros(2, 3, 32, 64), torch.tensor([0, 999]), torch.zeros(2, 36, 32, 64))
    assert out.shape == (2, 6, 32, 64)
    assert diffusion.num_timesteps == 10


@pytest.mark.parametrize(
    "flags, channels",
    [
        ({}, 36),
        ({"no_instance": True}, 35),
        ({"one_hot_label": False}, 2),
        ({"num_classes": 151, "no_instance": True}, 151),
    ],
)
def test_create_model_and_diffusion_conditioning_channels(flags, channels):
    model, _ = create_model_and_diffusion(**{**model_and_diffusion_defaults(), **SMALL, **flags})
    assert model.label_channels == channels


@pytest.mark.parametrize(
    "flags, words",
    [
        ({"colour": 1}, "colour"),
        ({"class_cond": False}, "--class_cond False"),
        ({"channel_mult": "", "image_size": 48}, "--image_size 48"),
        ({"attention_resolutions": "0"}, "--attention_resolutions 0"),
        ({"channel_mult": "0.5,1"}, "multiple of 32"),
        ({"channel_mult": "nan,1"}, "--channel_mult nan"),
        ({"unet_model": "foo"}, "--unet_model foo"),
        ({"prediction": "v", "predict_xstart": True}, "--predict_xstart"),
        ({"prediction": "y"}, "--prediction y"),
    ],
)
def test_create_model_and_diffusion_refuses_flags_that_cannot_be_meant(flags, words):
    with pytest.raises(InputError, match=words):
        create_model_and_diffusion(**{**model_and_diffusion_defaults(), **SMALL, **flags})


def test_training_loop_spreads_previews_over_a_small_split(make_loop):
    loop = make_loop(preview_items=8)
    paths = {batch["path"][0] for batch in loop.validation.items}
    assert len(loop.validation.items) == len(paths) == 3


@pytest.mark.parametrize(
    "flags, loss_type",
    [({}, "mse"), ({"use_kl": True}, "rescaled_kl"), ({"rescale_learned_sigmas": True}, "rescaled_mse")],
)
def test_create_model_and_diffusion_loss_types(flags, loss_type):
    _, diffusion = create_model_and_diffusion(**{**model_and_diffusion_defaults(), **SMALL, **flags})
    assert diffusion.loss_type == loss_type


def test_training_loop_does_not_train_over_another_run(make_loop):
    make_loop(total_steps=1).run()
    with pytest.raises(InputError, match=r"reached step 1.*--resume_checkpoint auto"):
        make_loop()


def test_training_loop_with_auto_and_no_checkpoint_starts_afresh(make_loop):
    assert make_loop(resume_checkpoint="auto").step == 0


def test_training_loop_initial_weights_follow_from_the_seed(make_loop):
    def first(folder, seed):
        return make_loop(folder, seed=seed).model.state_dict()["input_blocks.0.0.weight"]

    assert torch.equal(first("a", 1), first("b", 1)) and not torch.equal(first("c", 1), first("d", 2))


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ({"batch_size": 4}, "global batch 4 = 2 × 1 process × 2 accumulated"),
        ({"batch_size": 1}, "global batch 1 = 1 × 1 process × 1 accumulated"),
        ({"batch_size": 5, "microbatch": 3}, "global batch 5 = 3 × 1 process × 2 accumulated (the last one smaller)"),
        ({"batch_size": 4, "microbatch": 8}, "global batch 4 = 4 × 1 process × 1 accumulated"),
    ],
)
def test_training_loop_logs_the_global_batch(scenes, tmp_path, flags, line):
    flags = {"data_dir": scenes, "checkpoint_dir": tmp_path, **TINY, **TRAIN, **flags}
    config, given = parse_config(TrainConfig, "", as_arguments(flags))
    lines = []
    build.training_loop(config, given, lines.append)
    assert line in lines


def test_training_loop_carries_both_priors_in_all_its_weights(make_loop):
    flags = {"color_layer": True, "no_instance": True, "preview_items": 1}
    fitted = make_loop(**flags, total_steps=2, save_interval=2)
    prior = fitted.model.label_prior.clone()
    assert prior.dtype == torch.int32 and prior.shape == LabelPrior.shape(35) and prior.any()
    assert fitted.model.color_prior.any()
    fitted.run()
    flags["only"] = fitted.recent[-1][0].split("leftImg8bit/train/")[1].removesuffix("_leftImg8bit.png")
    resumed = make_loop(**flags, resume_checkpoint="auto", label_smooth=9)  # on other scenes
    assert resumed.inputs.color_prior == resumed.validation.inputs.color_prior == fitted.inputs.color_prior
    for weights in (fitted.model.state_dict(), fitted.slowest, resumed.model.state_dict(), resumed.slowest):
        assert torch.equal(weights["label_prior"], prior)  # not the one that smooth maps would give


def family_semantics(path, flip):
    """Picture (1, 3, 16, 32) and conditioning (1, 36, 16, 32) of a 32x64 scene, as GESCO's definitions have them."""
    stem = path.replace("leftImg8bit/", "gtFine/").removesuffix("_leftImg8bit.png")
    label, ids = (Image.open(f"{stem}_gtFine_{kind}.png").resize((32, 16), 0) for kind in ("labelIds", "instanceIds"))
    picture = Image.open(path).resize((32, 16), Image.Resampling.BOX)
    if flip:
        label, ids, picture = (each.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for each in (label, ids, picture))
    edges = torch.tensor(np.asarray(picture.convert("L").filter(ImageFilter.FIND_EDGES)) / 255).float()
    edges = naive_edges(torch.tensor(np.asarray(ids, int))[None, None]) + edges
    planes = torch.tensor(np.asarray(label) == np.arange(35)[:, None, None])[None].float()
    image = torch.tensor(np.asarray(picture) / 127.5 - 1).permute(2, 0, 1)[None].float()
    return image, torch.cat([planes, edges], dim=1)


def test_preset_gesco_makes_the_familys_commands_do_what_they_did(scenes, tmp_path):
    changes = {name: TINY[name] for name in TINY if name not in ("noise_schedule", "prediction", "noise_bank_size")}
    small = ["--preset", "gesco", *as_arguments({**changes, "use_fp16": False, "data_dir": scenes})]
    words = [*SEED_TRAIN, *small, "--checkpoint_dir", str(tmp_path)]
    loop = build.training_loop(*parse_config(TrainConfig, "", words), log=lambda line: None)
    with torch.no_grad():
        for p in loop.model.parameters():
            p += 0.05 * torch.randn_like(p) * (not p.any())
    whole = torch.randn(1000, 3, 16, 32, generator=torch.Generator().manual_seed(150))
    betas = np.linspace(1e-4, 0.02, 1000)
    left = np.cumprod(1 - betas)  # alpha-bar

    def reverse(t, x, eps, between, bound=math.inf):
        """The step from x_t, by a noise and where the log variance lies between its bounds, in [-1, 1]."""
        a, before = left[t], left[t - 1]
        x_0 = ((x - math.sqrt(1 - a) * eps) / math.sqrt(a)).clamp(-bound, bound)
        mean = (math.sqrt(before) * betas[t] * x_0 + math.sqrt(1 - betas[t]) * (1 - before) * x) / (1 - a)
        low = math.log(betas[t] * (1 - before) / (1 - a))
        return Normal(mean, (0.5 * (low + (between + 1) / 2 * (math.log(betas[t]) - low))).exp())

    batch = next(iter(loop.loader(0)))
    y, noise = loop.inputs.conditioning(batch), batch["noise"]
    views = [family_semantics(batch["path"][0], flip) for flip in (False, True)]
    image, expected = min(views, key=lambda view: (view[0] - batch["image"]).abs().sum())
    torch.testing.assert_close((batch["image"], y), (image, expected), rtol=0, atol=1e-6)
    assert (whole == noise).flatten(1).all(1).sum() == 1
    x = math.sqrt(left[400]) * image + math.sqrt(1 - left[400]) * noise
    eps, between = loop.model(x, torch.tensor([400.0]), y).chunk(2, 1)
    bits = kl_divergence(reverse(400, x, noise, torch.tensor(-1.0)), reverse(400, x, eps, between)) / math.log(2)
    found = loop.diffusion.training_losses(loop.model, image, torch.tensor([400]), y=y, noise=noise)["loss"]
    torch.testing.assert_close(found, ((noise - eps) ** 2).mean()[None] + bits.mean(), rtol=1e-4, atol=0)

    torch.save(loop.model.state_dict(), tmp_path / "ema.pt")
    config, _ = parse_config(SampleConfig, "", [*SEED_SAMPLE, *small])
    parts = build_link.sampling_parts(config, tmp_path / "ema.pt", log=lambda line: None)
    scene, transmitter = parts["dataset"].batch([1]), parts["transmitter"](config)
    message, y = transmitter.describe(scene)
    torch.testing.assert_close(y, family_semantics(scene["path"][0], False)[1])
    assert message.header.sampler == SamplerSettings("ddpm", "", s=2.0, variance="model")
    found = transmitter.chain.diffusion.p_mean_variance(loop.model, whole[7:8], torch.tensor([999]), y=y, s=2.0)
    (eps, between), (null, _) = (loop.model(whole[7:8], torch.tensor([999.0]), m).chunk(2, 1) for m in (y, 0 * y))
    step = reverse(999, whole[7:8], null + 2 * (eps - null), between, bound=1)
    torch.testing.assert_close((found["mean"], found["variance"]), (step.mean, step.variance), rtol=1e-4, atol=1e-4)


def test_data_set_says_what_the_edge_plane_holds_without_instance_maps(scenes, tmp_path):
    shutil.copytree(scenes, tmp_path / "scenes")
    for path in (tmp_path / "scenes").rglob("*_instanceIds.png"):
        path.unlink()
    logged, flags = [], TINY | {"data_dir": tmp_path / "scenes"}
    for levels in (0, 16):
        config, _ = parse_config(TrainConfig, "", as_arguments(flags | {"edge_levels": levels}))
        build.data_set(config, True, logged.append)
    assert [line.partition("holds ")[2] for line in logged] == ["nothing", "image edges alone"]
