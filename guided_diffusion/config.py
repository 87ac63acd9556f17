"""Every flag once: dataclasses whose fields carry their help texts, turned into argparse, presets and config.json.

Standard library only, so that `--help` answers at once.
"""

import argparse
import dataclasses
import glob
import json
import os
from dataclasses import dataclass, field

from .errors import InputError
from .files import whole_file
from .presets import PRESETS


def flag(default, help, choices=None):
    """Declare one command-line flag as a dataclass field."""
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass(kw_only=True)
class RunFlags:
    """Run"""

    preset: str = flag("", "starting values that explicit flags override", ("", *PRESETS))
    dry_run: bool = flag(False, "check data, labels, sizes and weights, print the configuration and a memory estimate, stop")
    device: str = flag("auto", "auto, cpu or cuda[:N]")
    precision: str = flag("", "fp32, bf16 or fp16 (torch.amp); empty: fp16 with --use_fp16 True, else fp32",
                          ("", "fp32", "bf16", "fp16"))  # fmt: skip
    use_fp16: bool = flag(False, "the family's flag for --precision fp16; a CPU then uses bf16 and says so")
    seed: int = flag(0, "seed of everything but the noise bank: data order, crops, flips, timesteps, channel noise")


@dataclass(kw_only=True)
class DataFlags:
    """Data"""

    data_dir: str = flag("", "the data set's folder (local, gs:// or az://)")
    dataset_mode: str = flag("cityscapes", "folder layout and label ids", ("cityscapes", "ade20k", "coco"))
    is_train: bool = flag(True, "True reads the training split, False the validation split")
    num_workers: int = flag(2, "processes that load pictures; 0 loads in the main process")


@dataclass(kw_only=True)
class ModelFlags:
    """Network"""

    image_size: int = flag(64, "short side of the picture, in pixels; Cityscapes keeps its aspect (256 -> 256x512)")
    num_classes: int = flag(35, "label ids: 35 for cityscapes, 151 for ade20k, 183 for coco")
    num_channels: int = flag(128, "base width; level widths (times channel_mult) are multiples of 32")
    num_res_blocks: int = flag(2, "residual blocks per level")
    num_heads: int = flag(4, "attention heads, where num_head_channels is -1")
    num_heads_upsample: int = flag(-1, "attention heads in the decoder; -1: num_heads")
    num_head_channels: int = flag(-1, "channels per attention head; -1: use num_heads")
    attention_resolutions: str = flag("16,8", "image sizes at which attention runs, as image_size // size = downsampling")
    channel_mult: str = flag("", 'width multiplier per level, such as "1,2,3,4"; empty: the default of image_size 64...512')
    dropout: float = flag(0.0, "dropout in the residual blocks, 0...1")
    class_cond: bool = flag(True, "must be True: this network is conditional")
    use_checkpoint: bool = flag(False, "recompute activations in the backward pass: less memory, more time")
    use_scale_shift_norm: bool = flag(True, "the time embedding scales and shifts the second norm of each block")
    resblock_updown: bool = flag(False, "residual blocks change the resolution, not strided convolutions")
    use_new_attention_order: bool = flag(False, "split q, k, v before the heads (published weights: False)")
    no_instance: bool = flag(False, "leave out the edge plane (instance and image edges)")
    one_hot_label: bool = flag(True, "one plane per class; False: one plane with the raw label id")
    unet_model: str = flag("unet", "where SPADE blocks are: unet (middle, decoder), spadeboth, enconly (encoder, middle)",
                           ("unet", "spadeboth", "enconly"))  # fmt: skip


@dataclass(kw_only=True)
class DiffusionFlags:
    """Diffusion"""

    learn_sigma: bool = flag(False, "the network also predicts the variance")
    diffusion_steps: int = flag(1000, "steps of the forward process")
    noise_schedule: str = flag("linear", "noise schedule", ("linear", "cosine"))
    timestep_respacing: str = flag("", 'steps of the reverse chain: "250", "10,20,30" (per section) or "ddim50"; empty: all')
    use_kl: bool = flag(False, "train on the variational bound alone")
    prediction: str = flag("eps", "what the network predicts: noise, picture or velocity", ("eps", "x0", "v"))
    predict_xstart: bool = flag(False, "the family's flag for --prediction x0")
    rescale_timesteps: bool = flag(False, "the network sees timesteps scaled to 0...1000")
    rescale_learned_sigmas: bool = flag(False, "weight the variational term by T/1000")


@dataclass(kw_only=True)
class BankFlags:
    """Noise bank"""

    noise_bank_size: int = flag(1000, "entries; 0: ordinary diffusion with fresh noise")
    noise_bank_seed: int = flag(150, "seed that both ends share; published weights: 150")
    noise_bank_cache: int = flag(0, "bank entries kept in memory")


@dataclass(kw_only=True)
class ChannelFlags:
    """Channel"""

    snr: float = flag(
        100.0,
        "dB in GESCO's table 100:0 30:0.05 25:0.08 20:0.13 15:0.22 10:0.36 5:0.6 1:0.9 (standard deviation of the noise"
        " on the semantic planes; log-linear between rows; a convention, not a signal-to-noise ratio: 10 dB would be 0.316)",
    )
    add_noise: bool = flag(False, "training: noise on the semantics, per sample one of the table's rows, or --snr if given")
    noise_to: str = flag("semantics", "training: noise on all planes, or on the label planes alone", ("semantics", "label"))


@dataclass(kw_only=True)
class TrainFlags:
    """Training"""

    checkpoint_dir: str = flag("./checkpoints", "where checkpoints, config.json, progress.csv and previews go")
    resume_checkpoint: str = flag("", "model file to go on from, or auto: the newest in checkpoint_dir, if any")
    resume_partial: bool = flag(False, "resume although parts of the checkpoint are missing")
    batch_size: int = flag(1, "pictures per step")
    microbatch: int = flag(-1, "pictures per forward pass (gradient accumulation); -1: the whole batch")
    lr: float = flag(1e-4, "learning rate of AdamW")
    weight_decay: float = flag(0.0, "weight decay of AdamW")
    lr_warmup_steps: int = flag(0, "steps over which the learning rate rises from 0")
    lr_anneal_steps: int = flag(0, "the learning rate falls linearly to 0 over so many steps, and training ends; 0: constant")
    total_steps: int = flag(0, "stop after so many steps; 0: go on until stopped (or lr_anneal_steps)")
    ema_rate: str = flag("0.9999", "decay of the averaged weights; several, separated by commas, make several averages")
    schedule_sampler: str = flag("uniform", "which timesteps to train on", ("uniform", "loss-second-moment"))
    drop_rate: float = flag(0.0, "share of samples trained without conditioning; needed for guidance (0.1 in the presets)")
    log_interval: int = flag(10, "steps between rows of progress.csv")
    save_interval: int = flag(5000, "steps between checkpoints and previews")
    export_legacy: bool = flag(False, "add the unused spade_norm tensors that GESCO and Diff-GO-n insist on")
    fp16_scale_growth: float = flag(1e-3, "accepted, without effect: GradScaler has its own rule")
    eval_interval: int = flag(0, "steps between validation scores; 0: none")
    eval_items: int = flag(8, "validation pictures behind one score")
    patience: int = flag(0, "stop after so many validation scores without improvement; 0: never")
    min_delta: float = flag(0.0, "what counts as improvement of the validation score")
    preview_items: int = flag(4, "validation pictures in the preview at every save; 0: no preview")
    preview_steps: int = flag(20, "reverse steps of the preview")


@dataclass(kw_only=True)
class SampleFlags:
    """Sampling"""

    model_path: str = flag("", "weights (.pt), or a checkpoint folder: its newest EMA file")
    results_path: str = flag("", "where pictures, panel and results.csv go")
    num_samples: int = flag(10000, "at most so many pictures; each picture of the split once")
    batch_size: int = flag(1, "pictures per batch")
    use_ddim: bool = flag(False, "DDIM instead of ancestral sampling")
    eta: float = flag(0.0, "share of fresh noise in DDIM, 0...1")
    clip_denoised: bool = flag(True, "clip the predicted picture to the valid range at every step")
    s: float = flag(1.0, "guidance scale, at least 1; above 1 doubles the cost")
    pool: str = flag("None", "filter on the received planes: None, med (3x3 median), mean (3x3), max (mean, then 3x3 maximum)",
                     ("None", "med", "mean", "max"))  # fmt: skip
    noise_index: str = flag("random", "bank entry to start from: random (per picture, from --seed) or a number")
    stop_tol: float = flag(0.0, "early stop: predicted picture moved less than this (RMS, of a range of 2); 0: off")
    stop_patience: int = flag(3, "early stop: so many consecutive steps")
    stop_min_steps: int = flag(1, "early stop: not before so many steps")
    panel_items: int = flag(8, "pictures in panel.png")


@dataclass(kw_only=True)
class TrainConfig(RunFlags, DataFlags, ModelFlags, DiffusionFlags, BankFlags, ChannelFlags, TrainFlags):
    """Configuration of image_train.py."""


@dataclass(kw_only=True)
class SampleConfig(RunFlags, DataFlags, ModelFlags, DiffusionFlags, BankFlags, ChannelFlags, SampleFlags):
    """Configuration of image_sample.py."""

    is_train: bool = flag(False, "True reads the training split, False the validation split")


# What a checkpoint fixes: sampling with other values would be another model.
_FREE = {"dropout", "use_checkpoint", "class_cond", "timestep_respacing", "use_kl", "rescale_learned_sigmas",
         "noise_bank_cache"}  # fmt: skip
FIXED_BY_TRAINING = [
    f.name for group in (ModelFlags, DiffusionFlags, BankFlags) for f in dataclasses.fields(group) if f.name not in _FREE
]


def model_and_diffusion_defaults():
    """Return the default of every flag that `create_model_and_diffusion` takes."""
    return {f.name: f.default for group in (ModelFlags, DiffusionFlags) for f in dataclasses.fields(group)}


class _OneLineParser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}; see --help\n")


def _boolean(text):
    lowered = text.lower()
    if lowered not in ("true", "false", "1", "0", "yes", "no"):
        raise argparse.ArgumentTypeError(f"expected True or False, found {text!r}")
    return lowered in ("true", "1", "yes")


def create_parser(config_class, description):
    """Return an argparse parser with one group per flag class. Flags that are not given stay out of its namespace."""
    parser = _OneLineParser(description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    own = {f.name: f for f in dataclasses.fields(config_class)}
    for group_class in config_class.__mro__[1:-1]:
        group = parser.add_argument_group(group_class.__doc__)
        for f in (own[inherited.name] for inherited in dataclasses.fields(group_class)):
            kind = _boolean if f.type is bool else f.type
            metavar = "True|False" if f.type is bool else None if f.metadata["choices"] else f.name.upper()
            shown = repr(f.default) if f.type is str else f.default
            text = f"{f.metadata['help']} (default: {shown})".replace("%", "%%")
            group.add_argument(f"--{f.name}", type=kind, choices=f.metadata["choices"], metavar=metavar, help=text)
    return parser


def parse_config(config_class, description, arguments=None):
    """Parse flags over a preset over the defaults.

    :return: the config, and the set of flags that were given explicitly.
    """
    given = vars(create_parser(config_class, description).parse_args(arguments))
    preset = PRESETS.get(given.get("preset", ""), {})
    names = {f.name for f in dataclasses.fields(config_class)}
    own = preset.get("train" if config_class is TrainConfig else "sample", {})
    starting = {k: v for k, v in {**preset.get("both", {}), **own}.items() if k in names}
    config = config_class(**{**starting, **given})
    settle(config, set(given))
    return config, set(given)


def settle(config, given):
    """Resolve flags that name the same thing, and refuse values that cannot be meant. Changes `config` in place."""
    if not config.class_cond:
        raise InputError("--class_cond False: this network is conditional; leave the flag out or set it to True")
    if config.predict_xstart:
        if "prediction" in given and config.prediction != "x0":
            raise InputError(f"--predict_xstart True is --prediction x0, but --prediction {config.prediction} was given")
        config.prediction = "x0"
    elif {"predict_xstart", "prediction"} <= given and config.prediction == "x0":
        raise InputError("--predict_xstart False contradicts --prediction x0: drop one of them")
    config.predict_xstart = config.prediction == "x0"
    if config.use_fp16 and "precision" in given and config.precision not in ("", "fp16"):
        raise InputError(f"--use_fp16 True is --precision fp16, but --precision {config.precision} was given")
    if not config.use_fp16 and {"use_fp16", "precision"} <= given and config.precision == "fp16":
        raise InputError("--use_fp16 False contradicts --precision fp16: drop one of them")
    if not config.precision or ("use_fp16" in given and "precision" not in given):
        config.precision = "fp16" if config.use_fp16 else "fp32"
    for name, low in (("image_size", 1), ("num_classes", 1), ("num_channels", 1), ("num_res_blocks", 1),
                      ("diffusion_steps", 1), ("noise_bank_size", 0), ("noise_bank_cache", 0), ("num_workers", 0),
                      ("batch_size", 1), ("num_samples", 1), ("log_interval", 1), ("save_interval", 1), ("lr", 0),
                      ("weight_decay", 0), ("total_steps", 0), ("lr_anneal_steps", 0), ("lr_warmup_steps", 0),
                      ("eval_interval", 0), ("eval_items", 1), ("patience", 0), ("min_delta", 0), ("preview_items", 0),
                      ("preview_steps", 1), ("s", 1), ("stop_tol", 0), ("stop_patience", 1), ("stop_min_steps", 1),
                      ("panel_items", 0)):  # fmt: skip
        if not getattr(config, name, low) >= low:
            raise InputError(f"--{name} {getattr(config, name)}: must be at least {low}")
    if getattr(config, "microbatch", -1) < 1 and getattr(config, "microbatch", -1) != -1:
        raise InputError(f"--microbatch {config.microbatch}: must be at least 1, or -1 for the whole batch")
    if not config.snr >= 1:
        raise InputError(f"--snr {config.snr:g}: GESCO's table covers 1 dB to 100 dB (no noise); choose a value in that range")
    if config.num_classes > 256:
        raise InputError(f"--num_classes {config.num_classes}: label maps have 8 bits, so at most 256 classes")
    index = getattr(config, "noise_index", "random")
    if index != "random" and config.noise_bank_size and not (index.isdigit() and int(index) < config.noise_bank_size):
        raise InputError(f"--noise_index {index}: expected random or a number from 0 to {config.noise_bank_size - 1}")
    for name in ("drop_rate", "dropout", "eta"):
        if not 0 <= getattr(config, name, 0) <= 1:
            raise InputError(f"--{name} {getattr(config, name)}: must be between 0 and 1")
    for name in ("seed", "noise_bank_seed"):
        if not -(2**63) <= getattr(config, name) < 2**63:
            raise InputError(f"--{name} {getattr(config, name)}: must fit in 64 bits")


def ineffective_flags(config, given):
    """Return one line for every explicit flag that changes nothing in this run."""
    training = isinstance(config, TrainConfig)
    on = {name for name in given if getattr(config, name) is not False}
    rules = [
        ("num_heads", config.num_head_channels != -1, "num_head_channels decides the number of heads"),
        ("num_heads_upsample", config.num_head_channels != -1, "num_head_channels decides the number of heads"),
        ("noise_bank_seed", config.noise_bank_size == 0, "there is no bank with --noise_bank_size 0"),
        ("noise_bank_cache", config.noise_bank_size == 0, "there is no bank with --noise_bank_size 0"),
    ]
    if training:
        rules += [
            ("rescale_learned_sigmas", not config.learn_sigma, "it weights the variational term of --learn_sigma True"),
            ("rescale_learned_sigmas", config.learn_sigma and config.use_kl, "--use_kl True has its own weight"),
            ("fp16_scale_growth", True, "torch's GradScaler has its own growth rule"),
            ("snr", not config.add_noise, "training adds channel noise only with --add_noise True"),
            ("noise_to", not config.add_noise, "training adds channel noise only with --add_noise True"),
            ("noise_to", config.add_noise and config.no_instance, "there is no edge plane with --no_instance True"),
            ("export_legacy", config.unet_model != "unet", "this encoder has SPADE blocks of its own"),
            ("patience", config.patience and not config.eval_interval, "there is no score without --eval_interval"),
            ("min_delta", not config.patience, "it belongs to --patience"),
            ("eval_items", not config.eval_interval, "it belongs to --eval_interval"),
            ("microbatch", config.microbatch >= config.batch_size, "it is no smaller than the batch"),
            ("preview_steps", not config.preview_items, "it belongs to --preview_items"),
            ("resume_partial", not config.resume_checkpoint, "it belongs to --resume_checkpoint"),
        ]
    else:
        rules += [
            ("add_noise", True, "--snr alone sets the channel in sampling"),
            ("noise_to", True, "in sampling all sent planes cross the channel"),
            ("use_checkpoint", True, "sampling has no backward pass"),
            ("dropout", True, "sampling has no dropout"),
            ("use_kl", True, "sampling has no loss"),
            ("rescale_learned_sigmas", True, "sampling has no loss"),
            ("eta", not config.use_ddim, "it belongs to --use_ddim True"),
            ("stop_patience", not config.stop_tol, "it belongs to --stop_tol"),
            ("stop_min_steps", not config.stop_tol, "it belongs to --stop_tol"),
            ("noise_index", config.noise_bank_size == 0, "there is no bank with --noise_bank_size 0"),
            ("num_workers", True, "sampling loads its pictures in the main process"),
        ]
    return [f"--{name} {getattr(config, name)} has no effect: {why}" for name, idle, why in rules if name in on and idle]


def adopt_training_config(config, given, trained, path, also=()):
    """Take from a checkpoint's config.json what training fixed. Changes `config` in place.

    :param trained: dict read from config.json.
    :param also: further names to take over.
    :raises InputError: a flag was given with another value (the message names both), or the file holds an invalid one.
    """
    choices = {f.name: f.metadata["choices"] for f in dataclasses.fields(config)}
    for name in [*FIXED_BY_TRAINING, *also]:
        if name not in trained:
            continue
        value, asked = trained[name], getattr(config, name)
        if type(value) is not type(asked) or (choices[name] and value not in choices[name]):
            raise InputError(f"{path}: {name} is {value!r}, which this flag does not take; restore the file")
        if name in given and asked != value:
            raise InputError(f"--{name} {asked} contradicts the checkpoint, trained with {value} ({path}); drop the flag")
        setattr(config, name, value)
    settle(config, given - {"prediction", "predict_xstart", "precision", "use_fp16"})


def adopt_resumed(config, given):
    """Take over what the config.json of a run to be resumed fixes. Changes `config` in place.

    :return: one line for every other training flag that differs from the earlier run's.
    :raises InputError: a flag contradicts what the checkpoint fixes.
    """
    resumed = config.resume_checkpoint
    folder = config.checkpoint_dir if resumed == "auto" else os.path.dirname(resumed)
    path = os.path.join(folder, "config.json")
    if not resumed or not os.path.exists(path) or not glob.glob(os.path.join(glob.escape(folder), "model*.pt")):
        return []
    trained = load_config(path)
    adopt_training_config(config, given, trained, path, also=("use_kl", "rescale_learned_sigmas", "timestep_respacing"))
    watched = {f.name for group in (TrainFlags, ChannelFlags, DataFlags) for f in dataclasses.fields(group)}
    watched |= {"precision", "dropout"}
    watched -= {"resume_checkpoint", "resume_partial", "checkpoint_dir", "total_steps", "num_workers"}
    changed = [name for name in sorted(watched & trained.keys()) if getattr(config, name) != trained[name]]
    return [f"resuming with --{name} {getattr(config, name)}; the earlier run had {trained[name]}" for name in changed]


def print_config(config):
    """Print the configuration as JSON to standard output."""
    print(json.dumps(dataclasses.asdict(config), indent=1))


def save_config(config, path):
    """Write the config as JSON."""
    with whole_file(path) as f:
        f.write(json.dumps(dataclasses.asdict(config), indent=1) + "\n")


def load_config(path):
    """Read a config.json. Returns a dict; raises InputError where it is unreadable or no JSON object."""
    try:
        with open(path) as f:
            values = json.load(f)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as a configuration ({error}); restore it or move it away") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(values).__name__}; restore it or move it away")
    return values
