"""From a configuration to model, diffusion, noise bank and data: the only module that knows them all."""

import dataclasses
import os
from pathlib import Path

import torch

from .data.image_datasets import SceneDataset, label_histogram, load_data
from .data.semantics import conditioning_channels
from .data.toy_scenes import write_toy_scenes
from .diffusion.gaussian_diffusion import create_gaussian_diffusion
from .diffusion.resample import create_schedule_sampler
from .diffusion.unet import DEFAULT_CHANNEL_MULT, UNetModel, check_size
from .errors import InputError
from .link.channel import snr_to_sigma
from .link.noise_bank import NoiseBank
from .random_streams import stream_seed
from .report import describe_labels, describe_network
from .training.checkpoint import load_weights, newest_checkpoint, newest_ema, parse_checkpoint_path
from .training.distributed import pins_memory, select_device, usable_precision
from .training.loop import LoopSettings, TrainLoop
from .training.samples import SampleRules
from .training.validation import Validation

_MODEL_FLAGS = ("image_size", "num_classes", "num_channels", "num_res_blocks", "num_heads", "num_heads_upsample",
                "num_head_channels", "attention_resolutions", "channel_mult", "dropout", "class_cond", "use_checkpoint",
                "use_scale_shift_norm", "resblock_updown", "use_new_attention_order", "no_instance", "one_hot_label",
                "unet_model")  # fmt: skip
_DIFFUSION_FLAGS = ("learn_sigma", "diffusion_steps", "noise_schedule", "timestep_respacing", "use_kl", "prediction",
                    "predict_xstart", "rescale_timesteps", "rescale_learned_sigmas")  # fmt: skip


# -- model and diffusion ----------------------------------------------------------------------------------------------


def create_model_and_diffusion(**flags):
    """Build the network and the diffusion process from flags.

    :param flags: every key of `model_and_diffusion_defaults()`.
    :return: (UNetModel, GaussianDiffusion).
    :raises InputError: for an unknown or missing flag, or values that do not fit together.
    """
    wanted = {*_MODEL_FLAGS, *_DIFFUSION_FLAGS}
    if flags.keys() != wanted:
        odd = sorted(flags.keys() ^ wanted)
        raise InputError(
            f"create_model_and_diffusion: {', '.join(odd)} unknown or missing; start from model_and_diffusion_defaults()"
        )
    model = create_model(learn_sigma=flags["learn_sigma"], **{name: flags[name] for name in _MODEL_FLAGS})
    return model, create_diffusion(**{name: flags[name] for name in _DIFFUSION_FLAGS})


def create_model(*, image_size, num_classes, num_channels, num_res_blocks, num_heads, num_heads_upsample,
                 num_head_channels, attention_resolutions, channel_mult, dropout, class_cond, use_checkpoint,
                 use_scale_shift_norm, resblock_updown, use_new_attention_order, no_instance, one_hot_label, unet_model,
                 learn_sigma):  # fmt: skip
    """Build the semantic UNet from flags (see `config.ModelFlags`)."""
    if not class_cond:
        raise InputError("--class_cond False: this network is conditional; set it to True")
    resolutions = _numbers(attention_resolutions, "attention_resolutions", int)
    if any(size < 1 for size in resolutions):
        raise InputError(f"--attention_resolutions {attention_resolutions}: image sizes must be at least 1")
    return UNetModel(
        model_channels=num_channels,
        out_channels=6 if learn_sigma else 3,
        label_channels=conditioning_channels(num_classes, one_hot_label, no_instance),
        num_res_blocks=num_res_blocks,
        attention_strides={image_size // size for size in resolutions},
        channel_mult=_channel_mult(channel_mult, image_size),
        dropout=dropout,
        num_heads=num_heads,
        num_heads_upsample=num_heads_upsample,
        num_head_channels=num_head_channels,
        use_scale_shift_norm=use_scale_shift_norm,
        resblock_updown=resblock_updown,
        use_new_attention_order=use_new_attention_order,
        use_checkpoint=use_checkpoint,
        places=unet_model,
    )


def create_diffusion(*, learn_sigma, diffusion_steps, noise_schedule, timestep_respacing, use_kl, prediction,
                     predict_xstart, rescale_timesteps, rescale_learned_sigmas):  # fmt: skip
    """Build the diffusion process from flags (see `config.DiffusionFlags`)."""
    loss_type = "rescaled_kl" if use_kl else "rescaled_mse" if rescale_learned_sigmas else "mse"
    return create_gaussian_diffusion(
        diffusion_steps=diffusion_steps,
        noise_schedule=noise_schedule,
        timestep_respacing=timestep_respacing,
        prediction="x0" if predict_xstart else prediction,
        learn_sigma=learn_sigma,
        loss_type=loss_type,
        rescale_timesteps=rescale_timesteps,
    )


def _channel_mult(text, image_size):
    if text:
        return tuple(_numbers(text, "channel_mult", float))
    if image_size not in DEFAULT_CHANNEL_MULT:
        known = ", ".join(str(size) for size in DEFAULT_CHANNEL_MULT)
        raise InputError(f'--image_size {image_size} has no default --channel_mult (only {known} have); set it: "1,2,3,4"')
    return DEFAULT_CHANNEL_MULT[image_size]


def _numbers(text, name, kind):
    try:
        return [kind(part) for part in str(text).split(",") if part.strip()]
    except ValueError:
        raise InputError(f"--{name} {text}: expected numbers separated by commas") from None


def model_from(config):
    """Build the network of a configuration."""
    return create_model(learn_sigma=config.learn_sigma, **{name: getattr(config, name) for name in _MODEL_FLAGS})


def diffusion_from(config, **changes):
    """Build the diffusion process of a configuration, with some flags changed."""
    return create_diffusion(**{**{name: getattr(config, name) for name in _DIFFUSION_FLAGS}, **changes})


def _placed(model, device):
    # Convolutions are faster on pixels than on planes, on CPUs and GPUs alike.
    return model.to(device, memory_format=torch.channels_last)


# -- data and bank ----------------------------------------------------------------------------------------------------


def data_set(config, is_train, augment=False):
    """Open one split of the configuration's data set; the toy preset draws its scenes first."""
    if config.preset == "toy" and not os.path.exists(config.data_dir):
        write_toy_scenes(config.data_dir)
    return SceneDataset(
        config.dataset_mode, config.data_dir, config.image_size, is_train, num_classes=config.num_classes,
        no_instance=config.no_instance, augment=augment, seed=config.seed,
    )  # fmt: skip


def picture_size(dataset, model):
    """Return (H, W) of the data set's pictures after checking that the network takes them."""
    height, width = dataset.sample_size(0)
    check_size(height, width, model.strides)
    return height, width


def noise_bank(config, height, width):
    """Return the configuration's noise bank for pictures of one size, or None with --noise_bank_size 0."""
    if config.noise_bank_size == 0:
        return None
    return NoiseBank((3, height, width), config.noise_bank_size, config.noise_bank_seed, config.noise_bank_cache)


# -- training ---------------------------------------------------------------------------------------------------------


def training_loop(config, given, say):
    """Build a training run, resumed where asked for.

    :param given: the flags given explicitly.
    :param say: function that prints one line.
    :return: `TrainLoop`.
    """
    device = select_device(config.device)
    precision = _precision(config, device, say)
    torch.manual_seed(stream_seed(config.seed, "initial weights"))
    model = model_from(config)
    _say_idle_attention(config, model, say)
    data_set_ = data_set(config, config.is_train)
    if not data_set_.has_images:
        raise InputError(f"--data_dir {config.data_dir}: training needs pictures, and this split has labels alone")
    height, width = picture_size(data_set_, model)
    rates = ema_rates(config.ema_rate)
    start = _resume_point(config, rates, say)
    say(f"training on {len(data_set_)} pictures of {height}x{width}; checkpoints, progress.csv and previews are in"
        f" {config.checkpoint_dir}")  # fmt: skip
    rules = SampleRules(
        num_classes=config.num_classes,
        one_hot=config.one_hot_label,
        edge_plane=not config.no_instance,
        bank=noise_bank(config, height, width),
        drop_rate=config.drop_rate,
        add_noise=config.add_noise,
        sigma=snr_to_sigma(config.snr) if "snr" in given else None,
        noise_to=config.noise_to,
        seed=config.seed,
    )
    diffusion = diffusion_from(config).to(device)
    settings = _loop_settings(config, rates, precision)
    loop = TrainLoop(
        _placed(model, device), diffusion, create_schedule_sampler(config.schedule_sampler, diffusion.num_timesteps).to(device),
        rules, lambda position: _training_batches(config, position, device),
        _validation(config, rules, diffusion, device, precision), settings,
    )  # fmt: skip
    if start is not None:
        missing = loop.resume(*start, partial=config.resume_partial)
        say(f"resumed from step {start[1]} in {start[0]}" + (f", without {', '.join(missing)}" if missing else ""))
    return loop


def ema_rates(text):
    """Parse --ema_rate into its parts, kept as texts because they are part of file names."""
    rates = tuple(part.strip() for part in text.split(",") if part.strip())
    for rate in _numbers(text, "ema_rate", float):
        if not 0 <= rate < 1:
            raise InputError(f"--ema_rate {text}: every rate must be at least 0 and below 1")
    if not rates:
        raise InputError("--ema_rate is empty: give at least one rate, such as 0.9999")
    return rates


def _loop_settings(config, rates, precision):
    names = {f.name for f in dataclasses.fields(LoopSettings)} - {"ema_rates", "precision"}
    return LoopSettings(ema_rates=rates, precision=precision, **{name: getattr(config, name) for name in names})


def _training_batches(config, position, device):
    return load_data(
        dataset_mode=config.dataset_mode, data_dir=config.data_dir, batch_size=config.batch_size,
        image_size=config.image_size, is_train=config.is_train, num_classes=config.num_classes,
        no_instance=config.no_instance, seed=config.seed, start=position, num_workers=config.num_workers,
        pin_memory=pins_memory(device),
    )  # fmt: skip


def _validation(config, rules, diffusion, device, precision):
    """Return a `Validation` on the first pictures of the validation split, or None where nothing asks for it."""
    count = max(config.preview_items, config.eval_items if config.eval_interval else 0)
    if not count:
        return None
    pictures = data_set(config, is_train=False)
    if not pictures.has_images:
        raise InputError(f"--data_dir {config.data_dir}: previews and scores need validation pictures; set --preview_items 0"
                         " and --eval_interval 0 to train without")  # fmt: skip
    # Spread over the split: neighbours in a drive look alike.
    chosen = sorted({k * len(pictures) // count for k in range(min(count, len(pictures)))})
    items = [pictures.batch([i]) for i in chosen]
    steps = min(config.preview_steps, diffusion.num_timesteps)
    preview = diffusion_from(config, timestep_respacing=str(steps)).to(device)
    clean = dataclasses.replace(rules, add_noise=False, drop_rate=0.0)
    return Validation(items, clean, diffusion, preview, device, precision)


def _resume_point(config, rates, say):
    """Return (folder, step) to resume from, or None; refuse to train over another run's checkpoints."""
    if config.resume_checkpoint not in ("", "auto"):
        folder, step = parse_checkpoint_path(config.resume_checkpoint)
        if not Path(config.resume_checkpoint).exists():
            raise InputError(f"--resume_checkpoint {config.resume_checkpoint}: no such file")
        return folder, step
    newest = newest_checkpoint(config.checkpoint_dir, rates)
    if config.resume_checkpoint == "auto":
        if newest is None:
            say(f"no checkpoint in {config.checkpoint_dir} yet: starting afresh")
            return None
        return config.checkpoint_dir, newest
    if newest is not None:
        raise InputError(
            f"--checkpoint_dir {config.checkpoint_dir} holds a run that reached step {newest}: go on with"
            " --resume_checkpoint auto, or choose another folder"
        )
    return None


# -- sampling ---------------------------------------------------------------------------------------------------------


def find_weights(model_path, may_lack=False):
    """Return the weights file that --model_path means: the file itself, or a folder's newest EMA file.

    :param may_lack: do not insist that it exists (dry runs).
    """
    if not model_path and not may_lack:
        raise InputError("--model_path is empty: name a .pt file, or a folder with checkpoints")
    if os.path.isdir(model_path):
        return str(newest_ema(model_path))
    if not os.path.exists(model_path) and not may_lack:
        raise InputError(f"--model_path {model_path}: no such file; train first, or name another .pt file or folder")
    return model_path


def sampling_parts(config, weights, say):
    """Build what a sampling run needs.

    :param weights: path of the weights, or None to leave them random (dry runs).
    :return: dict of model (on its device), diffusion, bank, dataset, device, precision.
    """
    device = select_device(config.device)
    precision = _precision(config, device, say)
    model = model_from(config)
    dataset = data_set(config, config.is_train)
    height, width = picture_size(dataset, model)
    if weights is not None:
        load_weights(model, weights)
    return {
        "model": _placed(model, device).eval().requires_grad_(False),
        "diffusion": diffusion_from(config).to(device),
        "bank": noise_bank(config, height, width),
        "dataset": dataset,
        "device": device,
        "precision": precision,
    }


# -- dry run ----------------------------------------------------------------------------------------------------------


def dry_run(config, say, weights=None):
    """Check data, labels, sizes and (given a path) weights; say what was found, and what the run would take.

    :param weights: path of the weights in sampling; None in training.
    """
    device = select_device(config.device)
    precision = _precision(config, device, say)
    with torch.device("meta"):
        model = model_from(config)
    _say_idle_attention(config, model, say)
    diffusion_from(config)
    dataset = data_set(config, config.is_train)
    height, width = picture_size(dataset, model)
    say(f"pictures: {len(dataset)} of {height}x{width}" + ("" if dataset.has_images else ", labels alone"))
    say("label histogram:")
    for line in describe_labels(label_histogram(dataset, progress=True)):
        say(line)
    training = weights is None
    count = len(ema_rates(config.ema_rate)) if training else None
    batch = config.batch_size
    if training and config.microbatch > 0:
        batch = min(batch, config.microbatch)
    for line in describe_network(lambda: model_from(config), height, width, batch, precision, count):
        say(line)
    if not training:
        _check_weights(config, weights, say)
    say("dry run: everything was accepted; nothing was written")


def _check_weights(config, weights, say):
    if not os.path.exists(weights):
        say(f"--model_path {weights or '(empty)'}: does not exist yet, so the weights were not checked")
        return
    model = model_from(config)
    load_weights(model, weights)
    say(f"--model_path {weights}: fits the network")


def _precision(config, device, say):
    precision, why = usable_precision(device, config.precision)
    if why:
        say(why)
    return precision


def _say_idle_attention(config, model, say):
    for size in _numbers(config.attention_resolutions, "attention_resolutions", int):
        stride = config.image_size // size
        if not 1 <= stride <= model.strides or stride & (stride - 1):
            say(f"warning: --attention_resolutions {size} has no effect: no level of this network is {stride} times smaller")
