"""From flags to parts."""

import pytest
import torch
from conftest import TINY, TRAIN, as_arguments

from guided_diffusion import build, create_model_and_diffusion, model_and_diffusion_defaults
from guided_diffusion.config import TrainConfig, parse_config
from guided_diffusion.console import InputError
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
