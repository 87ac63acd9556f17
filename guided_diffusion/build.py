"""From a configuration to model, diffusion, noise bank and data: the only module that knows them all."""

import contextlib
import dataclasses
import inspect

import torch

from .console import InputError
from .data.datasets import SceneDataset
from .data.loading import scene_batches
from .data.semantics import SemanticCoding, conditioning_channels
from .diffusion.gaussian_diffusion import create_gaussian_diffusion
from .diffusion.resample import create_schedule_sampler
from .diffusion.unet import DEFAULT_CHANNEL_MULT, SPADE_PLACES, UNetModel, check_size
from .link.channel import snr_to_sigma
from .link.noise_bank import NoiseBank
from .config import ema_rates, multipliers, numbers
from .random_streams import stream_seed
from .training.checkpoint_choice import resume_point
from .training.distributed import pins_memory, select_device, usable_precision
from .training.group import Group
from .training.inputs import TrainingInputs
from .training.loop import LoopSettings, TrainLoop
from .training.placement import check_compiler, compiled, placed
from .training.ranks import find_ranks
from .training.validation import Validation

# -- model and diffusion ----------------------------------------------------------------------------------------------


def create_model_and_diffusion(**flags):
    """Build the network and the diffusion process from flags.

    :param flags: every key of `model_and_diffusion_defaults()`. The family's `use_fp16` is accepted too, and ignored:
        weights stay in float32, and torch.autocast around the calls decides the precision.
    :return: (UNetModel, GaussianDiffusion).
    :raises InputError: for an unknown or missing flag, or values that do not fit together.
    """
    flags.pop("use_fp16", None)
    wanted = {*_MODEL_FLAGS, *_DIFFUSION_FLAGS}
    if flags.keys() != wanted:
        odd = sorted(flags.keys() ^ wanted)
        raise InputError(
            f"create_model_and_diffusion: {', '.join(odd)} unknown or missing; start from model_and_diffusion_defaults()"
        )
    model = create_model(learn_sigma=flags["learn_sigma"], **{name: flags[name] for name in _MODEL_FLAGS})
    return model, create_diffusion(**{name: flags[name] for name in _DIFFUSION_FLAGS})


def create_model(
    *,
    image_size,
    num_classes,
    num_channels,
    num_res_blocks,
    num_heads,
    num_heads_upsample,
    num_head_channels,
    attention_resolutions,
    channel_mult,
    dropout,
    class_cond,
    use_checkpoint,
    use_scale_shift_norm,
    resblock_updown,
    use_new_attention_order,
    no_instance,
    one_hot_label,
    unet_model,
    learn_sigma,
):
    """Build the semantic UNet from flags (see `config.ModelFlags`)."""
    if not class_cond:
        raise InputError("--class_cond False: this network is conditional; set it to True")
    if unet_model not in SPADE_PLACES:
        raise InputError(f"--unet_model {unet_model}: unknown; choose one of {', '.join(SPADE_PLACES)}")
    resolutions = numbers(attention_resolutions, "attention_resolutions", int)
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


def create_diffusion(
    *,
    learn_sigma,
    diffusion_steps,
    noise_schedule,
    timestep_respacing,
    use_kl,
    prediction,
    predict_xstart,
    rescale_timesteps,
    rescale_learned_sigmas,
):
    """Build the diffusion process from flags (see `config.DiffusionFlags`)."""
    if predict_xstart and prediction == "v":
        raise InputError("--predict_xstart True is --prediction x0, but prediction is v; drop one of them")
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


_MODEL_FLAGS = tuple(name for name in inspect.signature(create_model).parameters if name != "learn_sigma")
_DIFFUSION_FLAGS = tuple(inspect.signature(create_diffusion).parameters)


def _channel_mult(text, image_size):
    if text:
        return multipliers(text)
    if image_size not in DEFAULT_CHANNEL_MULT:
        known = ", ".join(str(size) for size in DEFAULT_CHANNEL_MULT)
        raise InputError(
            f'--image_size {image_size} has no default --channel_mult (only {known} have); set it: "1,2,3,4"'
        )
    return DEFAULT_CHANNEL_MULT[image_size]


def model_from(config):
    """Build the network of a configuration."""
    return create_model(learn_sigma=config.learn_sigma, **{name: getattr(config, name) for name in _MODEL_FLAGS})


def untrained_model(config):
    """Build the network of a configuration on the meta device: shapes without values, for `load_weights` to fill in."""
    with torch.device("meta"):
        return model_from(config)


def diffusion_from(config, **changes):
    """Build the diffusion process of a configuration, with some flags changed."""
    return create_diffusion(**{**{name: getattr(config, name) for name in _DIFFUSION_FLAGS}, **changes})


# -- data and bank ----------------------------------------------------------------------------------------------------


def data_set(config, is_train, log=None, augment=False, cached=True):
    """Open one split of the configuration's data set, and say what it lacks.

    :param cached: from the --cache_dir of the configuration, if it names one and this is not a dry run.
    """
    dataset = SceneDataset(
        config.dataset_mode,
        config.data_dir,
        config.image_size,
        is_train,
        num_classes=config.num_classes,
        no_instance=config.no_instance,
        augment=augment,
        seed=config.seed,
        cache_dir=config.cache_dir if cached and not config.dry_run else "",
    )
    if log is not None and not dataset.has_images:
        log("this split has no pictures: working from labels alone, without image edges")
    if log is not None and not dataset.has_instances and not config.no_instance:
        log("this split has no instance maps: the edge plane holds image edges alone")
    return dataset


def semantic_coding(config):
    """Return the `SemanticCoding` of a configuration."""
    return SemanticCoding(config.label_scale, config.edge_levels, config.edge_threshold, config.edge_scale)


def picture_size(dataset, model, skips=False):
    """Return (H, W) of the data set's pictures after checking that the network takes them.

    :param skips: look at the next label map where one is unreadable.
    """
    height, width = _first_readable(dataset.sample_size, range(len(dataset)), skips)
    check_size(height, width, model.downsampling)
    return height, width


def _first_readable(look, indices, skips):
    """Return look(index) of the first index; with `skips`, of the first one that raises no InputError."""
    for index in indices[:-1] if skips else ():
        with contextlib.suppress(InputError):
            return look(index)
    return look(indices[-1] if skips else indices[0])


def noise_bank(config, height, width):
    """Return the configuration's noise bank for pictures of one size, or None with --noise_bank_size 0."""
    if config.noise_bank_size == 0:
        return None
    return NoiseBank((3, height, width), config.noise_bank_size, config.noise_bank_seed, config.noise_bank_cache)


# -- training ---------------------------------------------------------------------------------------------------------


def join_group(config, ranks=None):
    """Meet the other processes of this job, if it has any. Returns this process's `Group` and its torch device.

    :param ranks: what `find_ranks` returned, which may be called once.
    """
    ranks = ranks or find_ranks()
    device, problem = torch.device("cpu"), ""
    try:
        device = select_device(config.device, ranks)
    except InputError as error:
        problem = str(error)
    own = ("data_dir", "cache_dir", "num_workers")  # may differ
    flags = {name: value for name, value in dataclasses.asdict(config).items() if name not in own}
    return Group(ranks, device, flags, problem), device


def training_loop(config, given, log, group=None, device=None):
    """Build a training run, resumed where asked for.

    :param given: the flags given explicitly.
    :param say: function that prints one line.
    :param group, device: what `join_group` returned; None: this process alone, on --device.
    :return: `TrainLoop`.
    """
    group, device = group or Group(), device or select_device(config.device)
    precision = precision_of(config, device, log)
    if config.compile:
        check_compiler(device)
    torch.manual_seed(stream_seed(config.seed, "initial weights"))
    model = model_from(config)
    say_idle_attention(config, model, log)
    with group.main_first():  # it builds what --cache_dir lacks
        pictures, validation_pictures = training_data(config, log)
    skips = config.on_bad_image == "skip"
    height, width = picture_size(pictures, model, skips)
    rates = ema_rates(config.ema_rate)
    start = _resume_point(config, group, log)
    rules = TrainingInputs(
        num_classes=config.num_classes,
        one_hot=config.one_hot_label,
        edge_plane=not config.no_instance,
        bank=noise_bank(config, height, width),
        drop_rate=config.drop_rate,
        add_noise=config.add_noise,
        sigma=snr_to_sigma(config.snr) if "snr" in given else None,
        noise_to=config.noise_to,
        seed=config.seed,
        coding=semantic_coding(config),
    )
    diffusion = diffusion_from(config).to(device)
    settings = _loop_settings(config, rates, precision, device, group)
    sampler = create_schedule_sampler(config.schedule_sampler, diffusion.num_timesteps).to(device)
    model = model if settings.fsdp else placed(model, device)  # shards go there one by one
    loop = TrainLoop(
        compiled(model, log) if config.compile and not settings.fsdp else model,
        diffusion,
        sampler,
        rules,
        lambda position: _training_batches(config, pictures, position, device, group),
        _validation(config, validation_pictures, rules, diffusion, device, precision),
        settings,
        group,
        device,
    )
    if start is not None:
        missing = loop.resume(*start, partial=config.resume_partial)
        log(f"resumed from step {start[1]} in {start[0]}" + (f", without {', '.join(missing)}" if missing else ""))
    elif config.resume_checkpoint:
        log(f"no checkpoint in {config.checkpoint_dir} yet: starting afresh")
    log(
        f"training on {len(pictures)} pictures of {height}x{width}; checkpoints, progress.csv and previews go to"
        f" {config.checkpoint_dir}"
    )
    log(_batch_line(settings, group))
    return loop


def _resume_point(config, group, log):
    """Let rank 0 find where to resume, for all."""
    start = (
        resume_point(config.checkpoint_dir, config.resume_checkpoint, config.resume_partial, log)
        if group.main
        else None
    )
    return group.gather(start)[0]


def _batch_line(settings, group):
    """global batch = batch × processes × accumulation, in numbers."""
    size, ranks = settings.microbatch, group.world_size
    passes = -(-settings.batch_size // size)
    processes = f"{ranks} process{'es' if ranks > 1 else ''}"
    line = f"global batch {settings.batch_size * ranks} = {size} × {processes} × {passes} accumulated"
    return line + (" (the last one smaller)" if settings.batch_size % size else "")


def training_data(config, log):
    """Open the training split, and the validation split or None where nothing looks at it; check that both have pictures."""
    pictures = data_set(config, config.is_train, log, augment=config.is_train)
    if not pictures.has_images:
        raise InputError(f"--data_dir {config.data_dir}: training needs pictures, and this split has labels alone")
    if not config.preview_items and not config.eval_interval:
        return pictures, None
    validation = data_set(config, is_train=False, cached=False)  # few of its pictures are read, and once
    if not validation.has_images:
        raise InputError(
            f"--data_dir {config.data_dir}: previews and scores need validation pictures; set --preview_items 0"
            " and --eval_interval 0 to train without"
        )
    return pictures, validation


def pass_size(config, device):
    """Return how many pictures a forward pass takes in training."""
    # On a CPU, sums over pairs make the rounding of 1 process × 4 and of 2 × 2 the same, where Adam would blow it up.
    whole = 2 if device.type == "cpu" else config.batch_size
    return min(config.microbatch if config.microbatch > 0 else whole, config.batch_size)


def _loop_settings(config, rates, precision, device, group):
    names = {f.name for f in dataclasses.fields(LoopSettings)} - {"ema_rates", "precision", "config", "fsdp"}
    flags = {name: getattr(config, name) for name in names}
    flags["fsdp"] = False
    flags["microbatch"] = pass_size(config, device)
    return LoopSettings(ema_rates=rates, precision=precision, config=dataclasses.asdict(config), **flags)


def _training_batches(config, pictures, position, device, group):
    return scene_batches(
        pictures,
        batch_size=config.batch_size,
        start=position,
        rank=group.rank,
        world_size=group.world_size,
        num_workers=config.num_workers,
        pin_memory=pins_memory(device),
        on_bad_image=config.on_bad_image,
    )


def _validation(config, pictures, rules, diffusion, device, precision):
    """Return a `Validation` on a few pictures of the validation split, or None where nothing asks for it."""
    if pictures is None:
        return None
    wanted = max(config.preview_items, config.eval_items if config.eval_interval else 0)
    count = min(wanted, len(pictures))
    # Spread over the split, because neighbours in a drive look alike; every other one first, for the preview's share.
    spread = [k * len(pictures) // count for k in range(count)]
    skips, everything = config.on_bad_image == "skip", list(range(len(pictures)))
    items = [
        _first_readable(lambda k: pictures.batch([k]), everything[i:] + everything[:i], skips)
        for i in spread[::2] + spread[1::2]
    ]
    steps = min(config.preview_steps, diffusion.num_timesteps)
    preview = diffusion_from(config, timestep_respacing=str(steps)).to(device)
    clean = dataclasses.replace(rules, add_noise=False, drop_rate=0.0)
    return Validation(items, clean, diffusion, preview, device, precision)


# -- sampling ---------------------------------------------------------------------------------------------------------


def precision_of(config, device, log):
    """Return the precision that a device can do, and say so where it is not the one asked for."""
    precision, why = usable_precision(device, config.precision)
    if why:
        log(why)
    return precision


def say_idle_attention(config, model, log):
    """Warn of attention resolutions that no level of the network has."""
    for size in numbers(config.attention_resolutions, "attention_resolutions", int):
        stride = config.image_size // size
        if not 1 <= stride <= model.downsampling or stride & (stride - 1):
            log(
                f"warning: --attention_resolutions {size} has no effect: no level of this network is {stride} times smaller"
            )
