"""From a configuration to model, diffusion, noise bank, data and training loop: the only module that knows them all."""

import dataclasses
import functools
import os

import torch

from .config import NETWORK_FLAGS, check_flag, model_and_diffusion_defaults, numbers, parts_of
from .console import InputError
from .data.datasets import SceneDataset
from .data.pictures import to_uint8
from .data.semantics import SemanticCoding, conditioning_channels, describe
from .diffusion.gaussian_diffusion import create_gaussian_diffusion
from .diffusion.unet import DEFAULT_CHANNEL_MULT, UNetModel, check_size
from .link.channel import snr_to_sigma
from .link.color_layer import PLANES, ColorPrior
from .link.label_prior import LabelPrior
from .link.noise_bank import FreshNoise, NoiseBank
from .random_streams import stream_seed
from .training.checkpoint import resume_point
from .training.devices import check_compiler, compiled, pins_memory, placed, select_device, usable_precision
from .training.distributed import Group


def create_model_and_diffusion(**flags):
    """Build the network and the diffusion process from flags.

    :param flags: every key of `model_and_diffusion_defaults()`. The family's `use_fp16` is accepted too, and ignored:
        weights stay in float32, and torch.autocast around the calls decides the precision.
    :return: (UNetModel, GaussianDiffusion).
    :raises InputError: for an unknown or missing flag, or values that do not fit together.
    """
    odd = flags.keys() - {"use_fp16"} ^ model_and_diffusion_defaults().keys()
    if odd:
        hint = "unknown or missing; start from model_and_diffusion_defaults()"
        raise InputError(f"create_model_and_diffusion: {', '.join(sorted(odd))} {hint}")
    for f in NETWORK_FLAGS:
        check_flag(f, flags[f.name])
    return create_model(flags), create_diffusion(flags)


def create_model(flags):
    """Build the semantic UNet from a dict of flags (see `config.ModelFlags`)."""
    size = flags["image_size"]
    channel_mult = numbers(flags["channel_mult"], "channel_mult", float) or DEFAULT_CHANNEL_MULT.get(size)
    if channel_mult is None:
        known = ", ".join(map(str, DEFAULT_CHANNEL_MULT))
        raise InputError(f'--image_size {size} has no default --channel_mult (only {known} have); set it: "1,2,3,4"')
    resolutions = numbers(flags["attention_resolutions"], "attention_resolutions", int)
    same = ("num_res_blocks", "dropout", "num_heads", "num_heads_upsample", "num_head_channels", "use_checkpoint")
    same += ("use_scale_shift_norm", "resblock_updown", "use_new_attention_order", "spade_channels")
    model = UNetModel(
        model_channels=flags["num_channels"],
        out_channels=6 if flags["learn_sigma"] else 3,
        label_channels=conditioning_channels(flags["num_classes"], flags["one_hot_label"], flags["no_instance"]),
        attention_strides={size // resolution for resolution in resolutions},
        channel_mult=channel_mult,
        places=flags["unet_model"],
        layer_channels=PLANES if flags["color_layer"] else 0,
        **{name: flags[name] for name in same},
    )
    if flags["color_layer"]:
        model.register_buffer("color_prior", torch.zeros(3, 10))  # whole numbers, see `ColorPrior`
        model.register_buffer("label_prior", torch.zeros(LabelPrior.shape(flags["num_classes"]), dtype=torch.int32))
    return model


def create_diffusion(flags):
    """Build the diffusion process from a dict of flags (see `config.DiffusionFlags`)."""
    if flags["predict_xstart"] and flags["prediction"] == "v":
        raise InputError("--predict_xstart True is --prediction x0, but prediction is v; drop one of them")
    same = ("diffusion_steps", "noise_schedule", "timestep_respacing", "learn_sigma", "rescale_timesteps")
    loss_type = "rescaled_mse" if flags["rescale_learned_sigmas"] else "mse"
    return create_gaussian_diffusion(
        start_time=flags.get("start_time", 0) if flags["color_layer"] else 0,
        prediction="x0" if flags["predict_xstart"] else flags["prediction"],
        loss_type="rescaled_kl" if flags["use_kl"] else loss_type,
        **{name: flags[name] for name in same},
    )


def untrained_model(config):
    """Build the network of a configuration on the meta device: shapes without values, for `load_weights` to fill in."""
    with torch.device("meta"):
        return create_model(vars(config))


def diffusion_from(config, **changes):
    """Build the diffusion process of a configuration, with some flags changed."""
    return create_diffusion(vars(config) | changes)


def log_unused_attention(config, model, log):
    """Warn of attention resolutions that no level of the network has."""
    for size in numbers(config.attention_resolutions, "attention_resolutions", int):
        stride = config.image_size // size
        if not 1 <= stride <= model.downsampling or stride & (stride - 1):
            log(f"warning: --attention_resolutions {size} has no effect: no level is {stride} times smaller")


def draw_toy_scenes(config, given, log):
    """Draw the scenes of the toy preset into its own folder, unless they are there or another folder was named."""
    if config.preset == "toy" and "data_dir" not in given and not os.path.exists(config.data_dir):
        log(f"drawing toy scenes into {config.data_dir}")
        from .data.toy_scenes import write_toy_scenes

        write_toy_scenes(config.data_dir)


def data_set(config, is_train, log=None, augment=False, cached=True):
    """Open one split of the configuration's data set, if `cached` from its --cache_dir, and log what it lacks."""
    options = {name: getattr(config, name) for name in ("num_classes", "no_instance", "seed")}
    if is_train == config.is_train:  # the split that the run is about
        options |= {"only": config.only, "leave_out": config.leave_out}
    options["cache_dir"] = config.cache_dir if cached and not config.dry_run else ""
    place = config.dataset_mode, config.data_dir, config.image_size
    dataset = SceneDataset(*place, is_train, augment=augment, **options)
    if log is not None and not dataset.has_images:
        log("this split has no pictures: working from labels alone, without image edges")
    if log is not None and not dataset.has_instances and not config.no_instance:
        holds = "image edges alone" if config.edge_levels and dataset.has_images else "nothing"
        log(f"this split has no instance maps: the edge plane holds {holds}")
    return dataset


def training_data(config, log):
    """Open the training split, and the validation split or None where nothing looks at it; both must have pictures."""
    pictures, validation = data_set(config, config.is_train, log, augment=config.is_train), None
    if config.preview_items or config.eval_interval:
        hint = "--preview_items 0 --eval_interval 0 trains without validation"
        try:
            validation = data_set(config, is_train=False, cached=False)  # few of its pictures are read, and once
        except InputError as error:
            raise InputError(f"{error}; {hint}") from None
    if not pictures.has_images or not (validation is None or validation.has_images):
        split, hint = ("validation", f"; {hint}") if pictures.has_images else ("training", "")
        raise InputError(f"--data_dir {config.data_dir}: the {split} split has labels alone, no pictures{hint}")
    return pictures, validation


def noise_bank(config, height, width, purpose="picture noise"):
    """Return the noise bank of a configuration; with --noise_bank_size 0 the fresh noise of a purpose."""
    if config.noise_bank_size == 0:
        return FreshNoise((3, height, width), config.seed, purpose)
    return NoiseBank((3, height, width), config.noise_bank_size, config.noise_bank_seed, config.noise_bank_cache)


def semantic_coding(config):
    """Return the `SemanticCoding` of a configuration."""
    return SemanticCoding(*(getattr(config, field.name) for field in dataclasses.fields(SemanticCoding)))


def picture_size(dataset, model):
    """Return (H, W) of the data set's pictures after checking that the network takes them."""
    height, width = dataset.sample_size(0)
    check_size(height, width, model.downsampling)
    return height, width


def check_crop(crop, height, width, model):
    """Refuse a --crop that is no part of the pictures, or that the network does not take."""
    if crop > height or width * crop % height:
        raise InputError(f"--crop {crop}: no part of {height}x{width} pixels in their aspect; give a part of {height}")
    check_size(crop, width * crop // height, model.downsampling)


def precision_of(config, device, log):
    """Return the precision that a device can do, and log where it is not the one asked for."""
    precision, why = usable_precision(device, config.precision)
    if why:
        log(why)
    return precision


def training_loop(config, given, log, group=None, device=None):
    """Build a training run, resumed where asked for.

    :param given, log: the flags given explicitly; function of a line.
    :param group, device: the `Group` of processes and this one's device; None: this process alone, on --device.
    :return: `TrainLoop`.
    """
    # Here and below: what training alone needs is imported by training alone.
    from .data.loading import scene_batches
    from .diffusion.resample import SCHEDULE_SAMPLERS
    from .training.loop import TrainLoop

    group, device = group or Group(), device or select_device(config.device)
    precision = precision_of(config, device, log)
    if config.compile:
        check_compiler(device)
    torch.manual_seed(stream_seed(config.seed, "initial weights"))
    model = create_model(vars(config))
    log_unused_attention(config, model, log)
    # Rank 0 alone builds what --cache_dir lacks.
    pictures, validation_pictures = group.main_first(lambda: training_data(config, log))
    height, width = picture_size(pictures, model)
    if config.crop:
        check_crop(config.crop, height, width, model)
    asked = config.checkpoint_dir, config.resume_checkpoint, config.resume_partial
    start = group.gather(group.run_on_main(lambda: resume_point(*asked, log)))[0]
    if config.color_layer and start is None:
        log("fitting the priors of colour layers and label maps to the training pictures")
        priors = group.gather(group.run_on_main(lambda: _priors(config, pictures)))[0]
        for name, weights in priors.items():
            model.get_buffer(name).copy_(torch.as_tensor(weights))
    model = placed(model, device)
    diffusion = diffusion_from(config).to(device)
    inputs = _training_inputs(config, given, height, width, ColorPrior.of(model))
    loading = {"batch_size": config.batch_size, "num_workers": config.num_workers, "pin_memory": pins_memory(device)}
    loading |= {"rank": group.rank, "world_size": group.world_size}
    loop = TrainLoop(
        compiled(model, log) if config.compile else model,
        diffusion,
        SCHEDULE_SAMPLERS[config.schedule_sampler](diffusion.num_timesteps).to(device),
        inputs,
        lambda position: scene_batches(pictures, start=position, prepare=loop.inputs, **loading),
        _validation(config, validation_pictures, inputs, diffusion, device, precision),
        loop_settings(config, precision, device),
        group,
    )
    if start is not None:
        missing = loop.resume(*start, partial=config.resume_partial)
        prior = ColorPrior.of(model)  # the checkpoint's
        for user in filter(None, (loop, loop.validation)):
            user.inputs = dataclasses.replace(user.inputs, color_prior=prior)
        log(f"resumed from step {start[1]} in {start[0]}" + (f", without {', '.join(missing)}" if missing else ""))
    elif config.resume_checkpoint:
        log(f"no checkpoint in {config.checkpoint_dir} yet: starting afresh")
    log(f"training on {len(pictures)} pictures of {height}x{width}; results go to {config.checkpoint_dir}")
    size, ranks = loop.settings.microbatch, group.world_size
    passes = f"{ranks} process{'es' if ranks > 1 else ''} × {-(-config.batch_size // size)} accumulated"
    rest = " (the last one smaller)" if config.batch_size % size else ""
    log(f"global batch {config.batch_size * ranks} = {size} × {passes}{rest}")
    return loop


def _priors(config, pictures):
    """Fit the priors of colour layers and label maps to at most 300 scenes: {buffer: values}."""
    coding, colors, maps = dataclasses.replace(semantic_coding(config), label_scale=1, edge_levels=0), [], []
    for k in range(0, len(pictures), -(-len(pictures) // 300)):
        scene = pictures.batch([k])
        colors.append(to_uint8(scene["image"])[0])
        maps.append(describe(scene["label"], None, None, coding)[0][0, 0].numpy().astype("uint8"))
    label_prior = LabelPrior.fit(maps, config.num_classes).weights
    return {"color_prior": ColorPrior.fit(colors).weights, "label_prior": label_prior}


def _training_inputs(config, given, height, width, color_prior):
    from .training.inputs import TrainingInputs

    bank = noise_bank(config, height, width, "noise")
    sigma = snr_to_sigma(config.snr) if "snr" in given else None
    form = config.num_classes, config.one_hot_label, not config.no_instance
    channel = config.add_noise, sigma, config.noise_to, config.seed
    return TrainingInputs(*form, bank, semantic_coding(config), config.drop_rate, *channel, color_prior, config.crop)


def pass_size(config, device):
    """Return how many pictures a forward pass takes in training."""
    # On a CPU, sums over pairs make the rounding of 1 process × 4 and of 2 × 2 the same, where Adam would blow it up.
    whole = 2 if device.type == "cpu" else config.batch_size
    return min(config.microbatch if config.microbatch > 0 else whole, config.batch_size)


def loop_settings(config, precision, device):
    """Return the `LoopSettings` of a configuration."""
    from .training.loop import LoopSettings

    own = {"ema_rates": parts_of(config.ema_rate), "precision": precision, "microbatch": pass_size(config, device)}
    flags = {f.name: getattr(config, f.name) for f in dataclasses.fields(LoopSettings) if f.name not in own}
    return LoopSettings(**own, **flags)


def _validation(config, pictures, inputs, diffusion, device, precision):
    """Return a `Validation` on a few pictures of the validation split, or None where nothing asks for it."""
    from .evaluation.panels import preview_panel
    from .training.validation import Validation

    if pictures is None:
        return None
    count = min(max(config.preview_items, config.eval_items if config.eval_interval else 0), len(pictures))
    # Spread over the split, because neighbours in a drive look alike; every other one first, for the preview's share.
    spread = [k * len(pictures) // count for k in range(count)]
    items = [pictures.batch([k]) for k in spread[::2] + spread[1::2]]
    steps = min(config.preview_steps, diffusion.num_timesteps)
    preview = diffusion_from(config, timestep_respacing=str(steps)).to(device)
    panel = functools.partial(preview_panel, num_classes=config.num_classes, one_hot=config.one_hot_label)
    clean = dataclasses.replace(inputs, add_noise=False, drop_rate=0.0, crop=0, color_drop=0.0)
    return Validation(items, clean, diffusion, preview, panel, device, precision)
