"""Every flag once, presets, validation, and config.json. Standard library only, so that `--help` answers at once."""

import argparse
import dataclasses
import functools
import glob
import hashlib
import itertools
import json
import math
import os
import sys
from dataclasses import dataclass

from .console import InputError
from .files import atomic_write

LINKS = ("analog", "digital", "ideal")
POOLS = ("None", "med", "mean", "max")
METRICS = ("psnr", "ssim", "ms_ssim", "lpips", "fid", "kid", "miou")
CODECS = ("jpeg", "webp", "avif", "jxl")
SCALES = (1, 2, 4, 8)
INT64 = {"low": -(2**63), "high": 2**63 - 1}

PRESETS = {  # starting values for whole runs: of both scripts, of training, of sampling
    # Toy street scenes on a laptop: minutes for the whole round. SPADE in the encoder costs half of what it costs in
    # the decoder, and predicting x_0 gives clean pictures after few steps.
    "toy": (
        "--data_dir ./datasets/toy_scenes --image_size 32 --unet_model enconly --num_channels 32 --channel_mult 1,1,2,2"
        " --num_head_channels 32 --num_res_blocks 1 --attention_resolutions 4 --resblock_updown True"
        " --noise_schedule cosine --prediction x0 --num_workers 0",
        "--checkpoint_dir ./checkpoints/toy --batch_size 8 --microbatch 8 --lr 1e-3 --lr_warmup_steps 50"
        " --lr_anneal_steps 600 --ema_rate 0.98 --drop_rate 0.1 --add_noise True --save_interval 200",
        "--model_path ./checkpoints/toy --results_path ./results/toy --num_samples 8 --batch_size 8 --use_ddim True"
        " --timestep_respacing 25",
    ),
    # Cityscapes at 256x512 with the family's architecture; schedule and prediction chosen against tints. The label
    # memory holds four pictures in bf16, and the null conditioning.
    "cityscapes": (
        "--image_size 256 --num_channels 256 --num_head_channels 64 --num_res_blocks 2 --attention_resolutions 32,16,8"
        " --resblock_updown True --learn_sigma True --noise_schedule cosine --prediction v --precision bf16"
        " --num_workers 4",
        "--checkpoint_dir ./checkpoints/cityscapes --batch_size 4 --use_checkpoint True --lr_warmup_steps 1000"
        " --drop_rate 0.1 --add_noise True --eval_interval 5000",
        "--model_path ./checkpoints/cityscapes --results_path ./results/cityscapes --use_ddim True"
        " --timestep_respacing 50 --batch_size 4 --label_memory 10",
    ),
}

# -- flags ------------------------------------------------------------------------------------------------------------


def flag(default, help, low=-math.inf, high=math.inf, choices=None, among=None, fixed_by="user", free="", needs=""):
    """Declare one command-line flag as a dataclass field. All that is known of it stands here.

    :param low, high: its range. :param choices: its values. :param among: the same, for a list separated by commas.
    :param fixed_by: who else decides it, in words: "training" (the checkpoint: another value is refused), "source" (the
        checkpoint unless given, which a warning tells), "resumed" (the run to be resumed), "message" (--role receive).
    :param free: "training", "sampling" or both: it may change between two runs into one folder.
    :param needs: what it needs to have an effect: names of `CONDITIONS`, flags to be set ("stop_tol") or to have one of
        some values ("sampler=ddim", "metrics=fid|kid"; a flag that the script lacks is no hindrance).
    """
    metadata = {"help": help, "low": low, "high": high, "choices": choices, "among": among}
    metadata |= {"fixed_by": fixed_by.split(), "free": free.split(), "needs": needs.split()}
    return dataclasses.field(default=default, metadata=metadata)


CONDITIONS = {  # name: what holds where it does not, and the condition on a config
    "training": ("sampling has no loss and no backward pass", lambda c: isinstance(c, TrainConfig)),
    "training_channel": ("--snr alone sets the channel in sampling", lambda c: isinstance(c, TrainConfig)),
    "loader": ("sampling loads its pictures in the main process", lambda c: isinstance(c, TrainConfig)),
    "loss_scaling": ("torch's GradScaler has its own growth rule", lambda c: False),
    "whole_pictures": (
        "random crops are cut from the files",
        lambda c: isinstance(c, SampleConfig) or not c.is_train or c.dataset_mode == "cityscapes",
    ),
    "split_batch": ("it is no smaller than the batch", lambda c: c.batch_size > 2 or c.microbatch < c.batch_size),
    "last_step": ("training ends with --lr_anneal_steps", lambda c: not 0 < c.lr_anneal_steps < c.total_steps),
    "selecting": ("nothing is selected", lambda c: c.noise_index == "best" or c.selection != "initial"),
    "no_selecting": ("the local picture is made anyway", lambda c: not _holds("selecting", c)[0]),
    "many_candidates": ("so few candidates all run whole chains", lambda c: c.candidates > 4),
    "bits": (
        "planes of --link analog have no bits to compare with",
        lambda c: c.role != "link" or {*parts_of(c.link)} - {"analog"},
    ),
    "step_noise": (
        "this sampler has no noise in any step",
        lambda c: c.sampler == "ddpm" or (c.sampler == "ddim" and c.eta > 0),
    ),
    "lpips": ("nothing asks for lpips", lambda c: "lpips" in [*parts_of(c.metrics), c.distance]),
    "segmenting": (
        "it belongs to --distance segmenter and --metrics miou",
        lambda c: "miou" in parts_of(c.metrics) or (c.distance == "segmenter" and _holds("selecting", c)[0]),
    ),
}
SENDS = "role=link|transmit"
by_training = functools.partial(flag, fixed_by="training")
by_source = functools.partial(flag, fixed_by="source message")
by_message = functools.partial(flag, fixed_by="message")
anyhow = functools.partial(flag, free="training sampling")


@dataclass(kw_only=True)
class RunFlags:
    """Run and data"""

    preset: str = anyhow("", "starting values that explicit flags override", choices=("", *PRESETS))
    dry_run: bool = anyhow(False, "check data, labels and weights, print configuration and a memory estimate, and stop")
    device: str = anyhow("auto", "auto, cpu or cuda[:N]; auto gives each process of a node its own GPU")
    precision: str = by_message(
        "", "by torch.amp; empty: fp16 with --use_fp16 True, else fp32", choices=("", "fp32", "bf16", "fp16")
    )
    use_fp16: bool = anyhow(False, "the family's flag for --precision fp16; a CPU then uses bf16 and says so")
    seed: int = flag(
        0, "of all but the noise bank: data order, crops, channel noise", **INT64, free="training", needs=SENDS
    )
    compile: bool = flag(
        False, "torch.compile the network: the first pass takes minutes (C++ compiler)", free="training"
    )
    data_dir: str = flag("", "the data set's folder (local, gs:// or az://)", needs=SENDS)
    dataset_mode: str = flag("cityscapes", "folder layout and label ids", choices=("cityscapes", "ade20k", "coco"))
    is_train: bool = by_message(True, "True reads the training split, False the validation split")
    num_workers: int = anyhow(2, "processes that load pictures; 0: the main process", low=0, needs="loader")
    cache_dir: str = anyhow(
        "",
        "keep resized pictures and maps in a memory-mapped file there (no random crops); empty: no cache",
        needs=f"{SENDS} extractor=gt whole_pictures dry_run=False",
    )


@dataclass(kw_only=True)
class ModelFlags:
    """Network"""

    image_size: int = by_training(64, "short side of the picture; Cityscapes keeps its aspect (256 -> 256x512)", low=1)
    num_classes: int = by_training(35, "label ids (8 bits): 35 cityscapes, 151 ade20k, 183 coco", low=1, high=256)
    num_channels: int = by_training(128, "base width; times channel_mult: multiples of 32", low=1)
    num_res_blocks: int = by_training(2, "residual blocks per level", low=1)
    num_heads: int = by_training(4, "attention heads, where num_head_channels is -1", needs="num_head_channels=-1")
    num_heads_upsample: int = by_training(-1, "the decoder's; -1: num_heads", needs="num_head_channels=-1")
    num_head_channels: int = by_training(-1, "channels per attention head; -1: use num_heads")
    attention_resolutions: str = by_training("16,8", "attention runs where image_size // size is the downsampling")
    channel_mult: str = by_training("", 'width multiplier per level ("1,2,3,4"); empty: by image_size 64...512')
    dropout: float = flag(0.0, "dropout in the residual blocks", low=0, high=1, free="sampling", needs="training")
    class_cond: bool = flag(True, "must be True: this network is conditional")
    use_checkpoint: bool = anyhow(False, "recompute activations: less memory, more time", needs="training")
    use_scale_shift_norm: bool = by_training(True, "the time embedding scales and shifts each block's second norm")
    resblock_updown: bool = by_training(False, "residual blocks change the resolution, not strided convolutions")
    use_new_attention_order: bool = by_training(False, "split q, k, v before the heads (published weights: False)")
    no_instance: bool = by_training(False, "leave out the edge plane (instance and image edges)")
    one_hot_label: bool = by_training(True, "one plane per class; False: one plane with the raw label id")
    unet_model: str = by_training(
        "unet", "SPADE in middle and decoder, all, or encoder and middle", choices=("unet", "spadeboth", "enconly")
    )


@dataclass(kw_only=True)
class DiffusionFlags:
    """Diffusion"""

    learn_sigma: bool = by_training(False, "the network also predicts the variance")
    diffusion_steps: int = by_training(1000, "steps of the forward process", low=1)
    noise_schedule: str = by_training("linear", "noise schedule", choices=("linear", "cosine"))
    timestep_respacing: str = flag(
        "",
        'reverse steps: "250", "10,20,30" (per section, in no message), "ddim50", "logsnr20" (for dpm++); empty: all',
        fixed_by="resumed message",
    )
    use_kl: bool = flag(
        False, "train on the variational bound alone", fixed_by="resumed", free="sampling", needs="training"
    )
    prediction: str = by_training("eps", "what the network predicts: noise, x_0, velocity", choices=("eps", "x0", "v"))
    predict_xstart: bool = by_training(False, "the family's flag for --prediction x0")
    rescale_timesteps: bool = by_training(False, "the network sees timesteps scaled to 0...1000")
    rescale_learned_sigmas: bool = flag(
        False,
        "weight the variational term by T/1000",
        fixed_by="resumed",
        free="sampling",
        needs="training learn_sigma use_kl=False",
    )


@dataclass(kw_only=True)
class BankFlags:
    """Noise bank"""

    noise_bank_size: int = by_training(1000, "entries; 0: ordinary diffusion with fresh noise", low=0)
    noise_bank_seed: int = by_training(150, "both ends share it; published: 150", **INT64, needs="noise_bank_size")
    noise_bank_cache: int = anyhow(0, "bank entries kept in memory", low=0, needs="noise_bank_size")


@dataclass(kw_only=True)
class ChannelFlags:
    """Source coding (training uses what the link will send) and channel"""

    label_scale: int = by_source(1, "send one label for so many pixels in each direction", choices=SCALES)
    edge_levels: int = by_source(
        0, "values of an image-edge pixel: 0 (none sent), 2 (thresholded) ... 256 (GESCO)", needs="no_instance=False"
    )
    edge_threshold: float = by_source(
        0.3, "image edges from here on are sent as 1", needs="no_instance=False edge_levels=2"
    )
    edge_scale: int = by_source(
        1, "send one image-edge pixel for so many", choices=SCALES, needs="no_instance=False edge_levels"
    )
    snr: float = flag(
        100.0,
        "dB in GESCO's table 100:0 30:0.05 25:0.08 20:0.13 15:0.22 10:0.36 5:0.6 1:0.9 (standard deviation of the noise"
        " on the semantic planes; log-linear between; a convention, not a signal-to-noise ratio: 10 dB would be 0.316)",
        needs="add_noise",
    )
    add_noise: bool = flag(
        False,
        "noise on the semantics: a row of the table, or --snr if given",
        free="sampling",
        needs="training_channel",
    )
    noise_to: str = flag(
        "semantics",
        "training: noise on all planes, or on the label planes alone",
        choices=("semantics", "label"),
        free="sampling",
        needs="training_channel add_noise no_instance=False",
    )


@dataclass(kw_only=True)
class TrainFlags:
    """Training"""

    checkpoint_dir: str = anyhow("./checkpoints", "where checkpoints, config.json, progress.csv and previews go")
    resume_checkpoint: str = anyhow("", "model file to go on from, or auto: the newest in checkpoint_dir, if any")
    resume_partial: bool = anyhow(False, "resume although parts are missing", needs="resume_checkpoint")
    batch_size: int = anyhow(1, "pictures per step in each process", low=1)
    microbatch: int = flag(-1, "pictures per pass; -1: the batch, on a CPU two at a time", low=-1, needs="split_batch")
    lr: float = flag(1e-4, "learning rate of AdamW", low=0)
    weight_decay: float = flag(0.0, "weight decay of AdamW", low=0)
    lr_warmup_steps: int = flag(0, "steps over which the learning rate rises from 0", low=0)
    lr_anneal_steps: int = flag(0, "steps to a learning rate of 0, where training ends; 0: constant", low=0)
    total_steps: int = anyhow(0, "stop after so many steps; 0: go on", low=0, needs="last_step")
    ema_rate: str = flag("0.9999", "decay of the averaged weights; several, separated by commas, make several averages")
    schedule_sampler: str = flag("uniform", "which timesteps to train on", choices=("uniform", "loss-second-moment"))
    drop_rate: float = flag(0.0, "share of samples without conditioning, for guidance (presets: 0.1)", low=0, high=1)
    log_interval: int = flag(10, "steps between rows of progress.csv", low=1)
    save_interval: int = flag(5000, "steps between checkpoints and previews", low=1)
    keep_checkpoints: int = flag(
        0, "keep so many of the newest checkpoints, and the one with the best score; 0: all", low=0
    )
    save_failures: int = flag(3, "end the run when so many saves in a row fail (a full disk)", low=1)
    on_bad_image: str = flag("error", "an unreadable file ends the run, or is skipped", choices=("error", "skip"))
    dist_timeout: float = anyhow(
        600.0, "seconds that processes wait for one that is lost or hangs, then all end", low=1
    )
    export_legacy: bool = flag(False, "add spade_norm tensors, which GESCO and Diff-GO-n want", needs="unet_model=unet")
    fp16_scale_growth: float = flag(1e-3, "accepted, without effect: GradScaler has its own rule", needs="loss_scaling")
    eval_interval: int = flag(0, "steps between validation scores; 0: none", low=0)
    eval_items: int = flag(8, "validation pictures behind one score", low=1, needs="eval_interval")
    patience: int = flag(0, "stop after so many scores without improvement; 0: never", low=0, needs="eval_interval")
    min_delta: float = flag(0.0, "what counts as improvement of the validation score", low=0, needs="patience")
    preview_items: int = flag(4, "validation pictures in the preview at every save; 0: no preview", low=0)
    preview_steps: int = flag(20, "reverse steps of the preview", low=1, needs="preview_items")


@dataclass(kw_only=True)
class SampleFlags:
    """Sampling"""

    model_path: str = flag("", "weights (.pt), or a checkpoint folder: its newest EMA file", free="sampling")
    results_path: str = anyhow("", "where pictures, panel and results.csv go")
    num_samples: int = anyhow(10000, "at most so many pictures; each picture of the split once", low=1)
    batch_size: int = anyhow(1, "pictures per batch", low=1, needs=SENDS)
    use_ddim: bool = by_message(False, "the family's flag for --sampler ddim")
    sampler: str = by_message(
        "",
        "ddpm (ancestral), ddim, dpm++ (DPM-Solver++ 2M, few steps); empty: ddim with --use_ddim True, else ddpm",
        choices=("", "ddpm", "ddim", "dpm++"),
    )
    label_memory: float = anyhow(4.0, "GiB for cached SPADE modulation; beyond: computed every step", low=0, high=1e6)
    eta: float = by_message(0.0, "share of fresh noise in DDIM", low=0, high=1, needs="sampler=ddim")
    clip_denoised: bool = by_message(True, "clip the predicted picture to the valid range at every step")
    s: float = by_message(1.0, "guidance scale; above 1 doubles the cost", low=1)
    stop_tol: float = by_message(0.0, "early stop: x_0 moved less than this (RMS, of a range of 2); 0: off", low=0)
    stop_patience: int = flag(3, "early stop: so many consecutive steps", low=1, needs="stop_tol")
    stop_min_steps: int = flag(1, "early stop: not before so many steps", low=1, needs="stop_tol")
    panel_items: int = anyhow(8, "pictures in panel.png", low=0)
    share_array: bool = anyhow(True, "the tasks of a SLURM array share the pictures; False: each makes all")


@dataclass(kw_only=True)
class LinkFlags:
    """Link (of --link, --pool and --snr, several values, separated by commas, are compared)"""

    role: str = flag("link", "both ends, write messages, or read them", choices=("link", "transmit", "receive"))
    link: str = flag(
        "analog",
        "analog (noise on the planes, GESCO), digital (coded bits, needs sionna-no-rt), ideal (bits arrive)",
        among=LINKS,
        needs="role=link",
    )
    pool: str = flag(
        "None",
        "filter on the received planes: None, med (3x3 median), mean (3x3), max (mean, then 3x3 maximum)",
        among=POOLS,
        needs="role=link link=analog",
    )
    modulation: str = flag(
        "16qam", "symbols of the maps", choices=("qpsk", "16qam", "64qam"), needs="role=link link=digital"
    )
    code_rate: float = flag(0.5, "of the maps' 5G LDPC code", low=0.2, high=0.95, needs="role=link link=digital")
    fading: str = flag(
        "awgn", "constant channel, or block fading", choices=("awgn", "rayleigh"), needs="role=link link=digital"
    )
    messages: str = anyhow("", "folder with .dgo files; all that is needed beside the checkpoint", needs="role=receive")
    extractor: str = by_message(
        "gt", "label maps: gt (data set), or from a segmenter's file (TorchScript, torch.export)"
    )
    local_picture: bool = flag(
        False, "compare with the transmitter's local picture", needs="role=link no_selecting noise_bank_size"
    )


@dataclass(kw_only=True)
class SelectionFlags:
    """Noise selection (transmitter)"""

    noise_index: str = by_message(
        "random", "bank entry to start from: random (from --seed), a number, or best", needs="noise_bank_size"
    )
    candidates: int = by_message(16, "best: search so many bank entries", low=1, needs="noise_index=best")
    distance: str = by_message(
        "mse", "of local pictures", choices=("mse", "ssim", "lpips", "segmenter"), needs="selecting"
    )
    feedback_steps: int = by_message(
        0,
        "best: first look at all candidates by so many NFE, closer at a quarter, and so on; 0: by whole chains",
        low=0,
        needs="noise_index=best many_candidates",
    )
    selection: str = by_message(
        "initial", "choose the start, each step's noise, or both", choices=("initial", "per_step", "both")
    )
    step_candidates: int = by_message(256, "bank entries to choose from", low=1, needs="selection=per_step|both")
    step_atoms: int = by_message(4, "entries chosen, each with a sign", low=1, needs="selection=per_step|both")
    selected_steps: int = by_message(0, "in the last so many steps; 0: in all", low=0, needs="selection=per_step|both")
    tail_steps: int = by_message(0, "deterministic final steps (DDIM, eta 0); not for dpm++", low=0, needs="step_noise")
    segmenter: str = anyhow("", "a segmenter's file (TorchScript, torch.export)", needs=f"{SENDS} segmenting")


@dataclass(kw_only=True)
class MeasureFlags:
    """Measures (lists are separated by commas)"""

    metrics: str = anyhow("psnr,ssim", f"any of {', '.join(METRICS)}", among=METRICS, needs=SENDS)
    lpips_weights: str = flag("", "backbone weights for lpips; empty: TORCH_HOME, or downloaded", needs="lpips")
    fid_weights: str = anyhow(
        "", "Inception weights; empty: TORCH_HOME, or downloaded", needs=f"{SENDS} metrics=fid|kid"
    )
    features: str = anyhow("", "a feature network's file instead of Inception", needs=f"{SENDS} metrics=fid|kid")
    baseline: str = anyhow(
        "", f"classical codecs at the message's bits: any of {', '.join(CODECS)}", among=CODECS, needs=f"{SENDS} bits"
    )


@dataclass(kw_only=True)
class TrainConfig(RunFlags, ModelFlags, DiffusionFlags, BankFlags, ChannelFlags, TrainFlags):
    """Configuration of image_train.py."""


@dataclass(kw_only=True)
class SampleConfig(
    RunFlags, ModelFlags, DiffusionFlags, BankFlags, ChannelFlags, SampleFlags, LinkFlags, SelectionFlags, MeasureFlags
):
    """Configuration of image_sample.py."""

    is_train: bool = by_message(False, "True reads the training split, False the validation split")
    snr: str = flag(
        "100",
        f"{ChannelFlags.__dataclass_fields__['snr'].metadata['help']}; digital: Es/N0",
        needs="role=link link=analog|digital",
    )


def model_and_diffusion_defaults():
    """Return the default of every flag that `create_model_and_diffusion` takes."""
    return {f.name: f.default for group in (ModelFlags, DiffusionFlags) for f in dataclasses.fields(group)}


# -- parsing ----------------------------------------------------------------------------------------------------------


class _OneLineParser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}; see --help\n")


def _boolean(text):
    if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
        raise argparse.ArgumentTypeError(f"expected True or False, found {text!r}")
    return text.lower() in ("true", "1", "yes")


def _parser(config_class, doc):
    parser = _OneLineParser(description=doc, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for group_class in config_class.__bases__:
        group = parser.add_argument_group(group_class.__doc__)
        for name in group_class.__dataclass_fields__:
            f = config_class.__dataclass_fields__[name]  # which may declare it anew
            metavar = "True|False" if f.type is bool else None if f.metadata["choices"] else name.upper()
            shown = repr(f.default) if f.type is str else f.default
            text = f"{f.metadata['help']} (default: {shown})".replace("%", "%%")
            kind = {"type": _boolean if f.type is bool else f.type, "choices": f.metadata["choices"]}
            group.add_argument(f"--{name}", **kind, metavar=metavar, help=text)
    return parser


def parse_config(config_class, doc, arguments=None):
    """Parse flags over a preset over the defaults.

    :param doc: the script's description. :param arguments: list of words; None: the command line's.
    :return: the config, resolved and validated, and the set of flags that were given explicitly.
    """
    parser = _parser(config_class, doc)
    words = sys.argv[1:] if arguments is None else arguments
    given = vars(parser.parse_args(words))
    both, *own = PRESETS.get(given.get("preset", ""), ("", "", ""))
    preset = f"{both} {own[config_class is SampleConfig]}".split()
    config = config_class(**vars(parser.parse_args([*preset, *words])))
    resolve(config, {*given})
    validate(config)
    if isinstance(config, SampleConfig) and "noise_bank_size" in given:
        check_bank(config, {*given})
    return config, {*given}


def parts_of(text):
    """Split a flag's value at its commas."""
    return [part.strip() for part in str(text).split(",") if part.strip()]


def numbers(text, name, kind):
    """Return the numbers of a flag's value, which commas separate."""
    try:
        return [kind(part) for part in parts_of(text)]
    except ValueError:
        raise InputError(f"--{name} {text}: expected numbers separated by commas") from None


def multipliers(text):
    """Parse --channel_mult: one positive number per level."""
    found = tuple(numbers(text, "channel_mult", float))
    if not found or not all(0 < mult < math.inf for mult in found):
        raise InputError(f'--channel_mult {text}: expected positive numbers separated by commas, such as "1,2,3,4"')
    return found


def ema_rates(text):
    """Parse --ema_rate into its parts, kept as texts because they are part of file names."""
    if not all(0 <= rate < 1 for rate in numbers(text, "ema_rate", float)):
        raise InputError(f"--ema_rate {text}: every rate must be at least 0 and below 1")
    if not parts_of(text):
        raise InputError("--ema_rate is empty: give at least one rate, such as 0.9999")
    return tuple(parts_of(text))


# -- resolving and validating -----------------------------------------------------------------------------------------


def resolve(config, given):
    """Give flags that name the same thing one value. Changes `config` in place."""
    pairs = [("predict_xstart", "prediction", "x0", ""), ("use_fp16", "precision", "fp16", "fp32")]
    if isinstance(config, SampleConfig):
        pairs.append(("use_ddim", "sampler", "ddim", "ddpm"))
    for old, new, value, other in pairs:
        asked, chosen = getattr(config, old), getattr(config, new)
        if {old, new} <= given and chosen and asked != (chosen == value):
            raise InputError(f"--{old} {asked} contradicts --{new} {chosen}: drop one of them")
        if not chosen or (new not in given and (asked or old in given)):
            chosen = value if asked else other or chosen
        setattr(config, new, chosen)
        setattr(config, old, chosen == value)
    if isinstance(config, SampleConfig) and config.selection == "both" and config.noise_index == "random":
        config.noise_index = "best"


def validate(config):
    """Refuse values that cannot be meant, by InputError."""
    for f in dataclasses.fields(config):
        value, low, high = getattr(config, f.name), f.metadata["low"], f.metadata["high"]
        if (low, high) != (-math.inf, math.inf) and not low <= value <= high:
            found = f"at least {low}" if high == math.inf else f"between {low} and {high}"
            raise InputError(f"--{f.name} {value}: must be {found}")
        for part in parts_of(value) if f.metadata["among"] else ():
            if part not in f.metadata["among"]:
                raise InputError(f"--{f.name} {part}: choose from {', '.join(f.metadata['among'])}")
    if not config.class_cond:
        raise InputError("--class_cond False: this network is conditional; leave the flag out or set it to True")
    numbers(config.attention_resolutions, "attention_resolutions", int)
    if config.channel_mult:
        multipliers(config.channel_mult)
    if isinstance(config, SampleConfig):
        _validate_link(config)
        _validate_selection(config)
        return
    ema_rates(config.ema_rate)
    _check_nominal_snr(config.snr)
    if config.microbatch == 0:
        raise InputError("--microbatch 0: must be at least 1, or -1 for the whole batch")


def _check_nominal_snr(snr):
    if not snr >= 1:
        raise InputError(f"--snr {snr:g}: GESCO's table covers 1 dB to 100 dB (no noise); choose a value in that range")


def _validate_link(config):
    snrs, links = numbers(config.snr, "snr", float), parts_of(config.link)
    if not snrs or not all(map(math.isfinite, snrs)):
        raise InputError(f"--snr {config.snr}: expected at least one finite value in dB")
    for name in ("link", "pool"):
        if not parts_of(getattr(config, name)):
            raise InputError(f"--{name} is empty: name at least one")
    if config.role == "link" and "analog" in links:
        for snr in snrs:
            _check_nominal_snr(snr)
    if config.role == "receive" and not config.messages:
        raise InputError("--role receive needs --messages: the folder with the .dgo files of --role transmit")
    if config.role != "link" and len(sweep(config)) > 1:
        found = f"--role {config.role}: one run makes one set of messages"
        raise InputError(f"{found}; drop the lists of --link, --pool and --snr")


def _validate_selection(config):
    index, selection = config.noise_index, config.selection
    if index not in ("random", "best") and not (index.isascii() and index.isdecimal()):
        raise InputError(f"--noise_index {index}: expected random, best or a number")
    if selection == "initial":
        return
    if selection == "per_step" and index != "random":
        raise InputError(f"--selection per_step starts from entry 0; for --noise_index {index} set --selection both")
    if config.step_atoms > config.step_candidates:
        raise InputError(f"--step_atoms {config.step_atoms}: more than --step_candidates {config.step_candidates}")
    if config.sampler == "dpm++" or (config.sampler == "ddim" and config.eta != 1):
        found = config.sampler if config.sampler == "dpm++" else f"{config.eta:g}"
        raise InputError(f"--selection {selection} needs ancestral sampling, or DDIM with --eta 1 (not {found})")
    if config.stop_tol:
        raise InputError(f"--selection {selection}: the steps to choose noise for are fixed; drop --stop_tol")


def check_bank(config, given):
    """Refuse flags that ask for more than the noise bank has; to be called once the bank's size is known."""
    index, size = config.noise_index, config.noise_bank_size
    if size == 0:
        if index == "best" or config.selection != "initial":
            raise InputError("--noise_bank_size 0: noise selection needs a noise bank")
        if config.role != "link" or parts_of(config.link) != ["analog"]:
            found = "a message names its noise by a bank index; only --link analog works without"
            raise InputError(f"--noise_bank_size 0: {found}")
        return
    if index not in ("random", "best") and int(index) >= size:
        raise InputError(f"--noise_index {index}: expected random, best or a number from 0 to {size - 1}")
    for name in ("candidates", "step_candidates"):
        if name in given and getattr(config, name) > size:
            raise InputError(f"--{name} {getattr(config, name)}: the noise bank has {size} entries")
        setattr(config, name, min(getattr(config, name), size))
    if config.selection != "initial" and config.step_atoms > config.step_candidates:
        raise InputError(f"--step_atoms {config.step_atoms}: the noise bank has {size} entries")


def _holds(need, config):
    """Return whether one of a flag's needs is met, and what holds where it is not."""
    if need in CONDITIONS:
        reason, condition = CONDITIONS[need]
        return bool(condition(config)), reason
    name, _, values = need.partition("=")
    if not hasattr(config, name):
        return True, ""
    value = getattr(config, name)
    met = {*parts_of(value)} & {*values.split("|")} if values else value
    return bool(met), f"it needs --{name} {values.replace('|', ' or ')}".rstrip() + f" (now {value!r})"


def unused_flags(config, given):
    """Return one line for every explicit flag that changes nothing in this run."""
    lines = []
    for f in dataclasses.fields(config):
        if f.name not in given or getattr(config, f.name) is False:
            continue
        reasons = [reason for met, reason in (_holds(need, config) for need in f.metadata["needs"]) if not met]
        if "message" in f.metadata["fixed_by"] and getattr(config, "role", "") == "receive":
            reasons.insert(0, "with --role receive the message decides")
        if reasons:
            lines.append(f"--{f.name} {getattr(config, f.name)} has no effect: {reasons[0]}")
    return lines


def sweep(config):
    """Return a copy of a sampling config for each link, pool and SNR that it lists, each with a folder of its own.

    A single one keeps the folder; in the copies `snr` is a float.
    """
    found, snrs = [], dict.fromkeys(map(float, parts_of(config.snr)))  # each once
    for link in dict.fromkeys(parts_of(config.link)):
        pools = dict.fromkeys(parts_of(config.pool)) if link == "analog" else ["None"]
        found += itertools.product([link], pools, snrs if link != "ideal" else [math.inf])
    copies = [dataclasses.replace(config, link=link, pool=pool, snr=snr) for link, pool, snr in found]
    for copy in copies if len(copies) > 1 else ():
        pool = "" if copy.pool == "None" else f"_{copy.pool}"
        snr = f"_{copy.snr!r}dB".replace(".0dB", "dB") if math.isfinite(copy.snr) else ""
        copy.results_path = os.path.join(config.results_path, f"{copy.link}{pool}{snr}")
    return copies


# -- earlier runs -----------------------------------------------------------------------------------------------------


def results_settings(config):
    """Return the flags of a sampling config that identify a results folder, as a dict."""
    fields = [f for f in dataclasses.fields(config) if "sampling" not in f.metadata["free"]]
    return {f.name: getattr(config, f.name) for f in fields}


def adopt_training_config(config, given, trained, source, fixed=("training", "source")):
    """Take from a checkpoint's config.json what training fixed. Changes `config` in place.

    :param trained: dict read from config.json. :param source: its path, for messages.
    :param fixed: of which flags: words of `fixed_by`.
    :return: a line for each flag of source coding that differs from training's.
    :raises InputError: a flag was given with another value (the message names both), or the file holds an invalid one.
    """
    # What training saw before these flags were there.
    trained = {"label_scale": 1, "edge_levels": 256, "edge_threshold": 0.3, "edge_scale": 1, **trained}
    differing = []
    for f in dataclasses.fields(config):
        name, choices, asked = f.name, f.metadata["choices"], getattr(config, f.name)
        if name not in trained or not {*f.metadata["fixed_by"]} & {*fixed}:
            continue
        value = trained[name]
        if type(value) is not type(asked) or (choices and value not in choices):
            raise InputError(f"{source}: {name} is {value!r}, which this flag does not take; restore the file")
        if name not in given:
            setattr(config, name, value)
        elif asked != value and "source" in f.metadata["fixed_by"]:
            differing.append(f"--{name} {asked} is not what the checkpoint was trained with ({value}, {source})")
        elif asked != value:
            found = f"--{name} {asked} contradicts the checkpoint, trained with {value} ({source})"
            raise InputError(f"{found}; drop the flag")
    resolve(config, given - {"prediction", "predict_xstart", "precision", "use_fp16"})
    validate(config)
    return sorted(differing)


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
    lines = adopt_training_config(config, given, trained, path, ("training", "source", "resumed"))
    for f in sorted(dataclasses.fields(config), key=lambda f: f.name):
        value, earlier = getattr(config, f.name), trained.get(f.name)
        compared = "source" not in f.metadata["fixed_by"] and "training" not in f.metadata["free"]
        if compared and f.name in trained and value != earlier:
            lines.append(f"resuming with --{f.name} {value}; the earlier run had {earlier}")
    return lines


def print_config(config):
    """Print the configuration as JSON to standard output."""
    print(json.dumps(dataclasses.asdict(config), indent=1))


def _sha256(values):
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def save_config(config, path):
    """Write the config as JSON, with its SHA-256, which tells a damaged file from a good one."""
    values = dataclasses.asdict(config)
    with atomic_write(path) as f:
        f.write(json.dumps(values | {"sha256": _sha256(values)}, indent=1) + "\n")


def load_config(path):
    """Read a config.json. Returns a dict.

    :raises InputError: it is unreadable, no JSON object, or not as `save_config` wrote it (one without SHA-256 passes).
    """
    try:
        with open(path) as f:
            values = dict(json.load(f))
    except (OSError, TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read as a configuration ({error}); restore it or move it away") from None
    if values.pop("sha256", None) not in (None, _sha256(values)):
        found = f"{path}: differs from its SHA-256, so it is damaged or was edited"
        raise InputError(f'{found}; restore it, or remove the line "sha256" to use it as it is')
    return values
