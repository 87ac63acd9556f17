"""Every flag once: all that is known of one stands in its declaration. Standard library only."""

import dataclasses
import functools
import math
from dataclasses import dataclass

LINKS, POOLS = ("analog", "digital", "ideal"), ("None", "med", "mean", "max")
METRICS = ("psnr", "ssim", "ms_ssim", "lpips", "fid", "kid", "miou", "swd", "color_std")
CODECS = ("jpeg", "webp", "avif", "jxl", "jpeg-bare", "webp-bare", "avif-bare")
PRECISIONS = ("", "fp32", "bf16", "fp16")
SAMPLERS = ("", "ddpm", "ddim", "dpm++")
PLACES = ("unet", "spadeboth", "enconly")
NOISY, SELECTIONS = ("semantics", "label"), ("initial", "per_step", "both")
DISTANCES = ("mse", "ssim", "lpips", "segmenter")
SCALES = (1, 2, 4, 8)
INT64 = {"low": -(2**63), "high": 2**63 - 1}
SNR_HELP = (
    "dB in GESCO's table 100:0 30:0.05 25:0.08 20:0.13 15:0.22 10:0.36 5:0.6 1:0.9 (standard deviation of the noise on"
    " the semantic planes; log-linear between rows; a convention, not a signal-to-noise ratio: 10 dB would be 0.316)"
)

PRESETS = {  # starting values for whole runs: of both scripts, of training, of sampling
    # Toy street scenes on a laptop: minutes for the whole round. SPADE in the encoder costs half of what it costs in
    # the decoder, and predicting x_0 gives clean pictures after few steps, fewer from the colour layer on.
    "toy": (
        "--data_dir ./datasets/toy_scenes --image_size 32 --unet_model enconly --num_channels 32 --channel_mult 1,1,2,2"
        " --num_head_channels 32 --num_res_blocks 1 --attention_resolutions 4 --resblock_updown True"
        " --noise_schedule cosine --prediction x0 --spade_channels 32 --color_layer True --num_workers 0",
        "--checkpoint_dir ./checkpoints/toy --batch_size 8 --microbatch 8 --lr 1e-3 --lr_warmup_steps 50"
        " --lr_anneal_steps 600 --ema_rate 0.98 --drop_rate 0.1 --add_noise True --save_interval 200",
        "--model_path ./checkpoints/toy --results_path ./results/toy --num_samples 8 --batch_size 8 --use_ddim True"
        " --timestep_respacing 8 --start_time 600",
    ),
    # Cityscapes at 256x512 with the family's architecture; schedule and prediction chosen against tints. The label
    # memory holds four pictures in bf16, and the null conditioning.
    "cityscapes": (
        "--data_dir ./datasets/cityscapes --image_size 256 --num_channels 256 --num_head_channels 64 --num_res_blocks 2"
        " --attention_resolutions 32,16,8 --resblock_updown True --learn_sigma True --noise_schedule cosine"
        " --prediction v --precision bf16 --num_workers 4",
        "--checkpoint_dir ./checkpoints/cityscapes --batch_size 4 --use_checkpoint True --lr_warmup_steps 1000"
        " --drop_rate 0.1 --add_noise True --eval_interval 5000",
        "--model_path ./checkpoints/cityscapes --results_path ./results/cityscapes --use_ddim True"
        " --timestep_respacing 50 --batch_size 4 --label_memory 10",
    ),
    # What GESCO's and Diff-GO-n's own commands and code set.
    "gesco": (
        "--image_size 256 --num_channels 256 --num_head_channels 64 --num_res_blocks 2 --attention_resolutions 32,16,8"
        " --resblock_updown True --learn_sigma True --noise_schedule linear --use_fp16 True --edge_levels 256",
        "--checkpoint_dir ./checkpoints/gesco --batch_size 1 --lr 1e-4 --use_checkpoint True --save_interval 1000",
        "--model_path ./checkpoints/gesco --results_path ./results/gesco --num_samples 100 --batch_size 1 --s 2",
    ),
    # CamVid street scenes at 128x256, with a colour layer: hours on a laptop's CPU.
    "camvid": (
        "--image_size 128 --unet_model enconly --num_channels 32 --channel_mult 1,2,3,4 --num_head_channels 32"
        " --num_res_blocks 1 --attention_resolutions 16 --resblock_updown True --noise_schedule cosine --prediction v"
        " --spade_channels 32 --no_instance True --color_layer True --label_scale 0",
        "--checkpoint_dir ./checkpoints/camvid --batch_size 4 --crop 64 --lr 6e-4 --lr_warmup_steps 100"
        " --lr_anneal_steps 9700 --ema_rate 0.998 --drop_rate 0.1 --save_interval 500",
        "--model_path ./checkpoints/camvid --results_path ./results/camvid --link ideal --color_step 0 --target_bpp 0.1"
        " --selection per_step --timestep_respacing 12",
    ),
}


def flag(default, help, low=-math.inf, high=math.inf, choices=None, each=None, fixed_by="user", free="", needs=""):
    """Declare one command-line flag as a dataclass field. All that is known of it stands here.

    :param low, high, choices: its range, and its values.
    :param each: of a list separated by commas: the type of its parts, for which the above then hold.
    :param fixed_by: who else decides it, in words: "training" (the checkpoint: another value is refused), "source" (the
        checkpoint unless given, which a warning tells), "resumed" (the run to be resumed), "message" (--role receive).
    :param free: "training", "sampling" or both: it may change between two runs into one folder.
    :param needs: what it needs to have an effect: names of `CONDITIONS`, flags to be set ("stop_tol") or to have one of
        some values ("sampler=ddim", "metrics=fid|kid"; a flag that the script lacks is no hindrance).
    """
    metadata = {"help": help, "low": low, "high": high, "choices": choices, "each": each}
    metadata |= {"fixed_by": fixed_by.split(), "free": free.split(), "needs": needs.split()}
    return dataclasses.field(default=default, metadata=metadata)


RESPACING = '"250", "10,20,30" (sections), "ddim50", "logsnr20" (dpm++)'
SCENES_HELP = "{} scenes of the split whose path in its folder begins with one of these: aachen,bonn/bonn_0000"
LINK_HELP = "analog (noise on the planes, GESCO), digital (coded bits, by sionna-no-rt), ideal (bits arrive)"
POOL_HELP = "filter on received planes: None, med (3x3 median), mean (3x3), max (mean, then 3x3 maximum)"
COLOR_HELP = (
    "step 2^(n/16) of the colour layer at 128x256 (training: 88 to 175); a target may enlarge it; 0: it decides"
)
WEIGHT_HELP = "rare: each pixel's error counts by its class's inverse share of the picture"
FEEDBACK_HELP = "compare all candidates by so many NFE, the best quarter by more, and so on; 0: by whole chains"
BASELINE_HELP = "codecs to compare with, at the message's bits; -bare: their containers are not counted"

SENDS, ANALOG, DIGITAL = "role=link|transmit", "role=link link=analog", "role=link link=digital"
NOISY_LINK, CODED, LOCAL = "role=link link=analog|digital", f"{SENDS} bits", "role=link no_selecting noise_bank_size"
CACHE = f"{SENDS} extractor=gt whole_pictures dry_run=False"
NOISE_TO = "no_snr add_noise no_instance=False"
EDGES, PER_STEP, VB = "no_instance=False", "selection=per_step|both", "training learn_sigma use_kl=False"
by_training = functools.partial(flag, fixed_by="training")
by_source = functools.partial(flag, fixed_by="source message")
by_resumed = functools.partial(flag, fixed_by="resumed")
by_message = functools.partial(flag, fixed_by="message")
anyhow = functools.partial(flag, free="training sampling")


@dataclass(kw_only=True)
class RunFlags:
    """Run and data"""

    preset: str = anyhow("", "starting values that explicit flags override", choices=("", *PRESETS))
    dry_run: bool = anyhow(False, "check flags, some scenes and weights; estimate memory and time; and stop")
    check_all: bool = anyhow(False, "--dry_run decodes all scenes, not a few", needs="dry_run")
    device: str = anyhow("auto", "auto, cpu or cuda[:N]; auto gives each process of a node its own GPU")
    precision: str = by_message("", "by torch.amp; empty: fp32, or fp16 with --use_fp16 True", choices=PRECISIONS)
    use_fp16: bool = anyhow(False, "the family's flag for --precision fp16; a CPU then uses bf16 and says so")
    seed: int = flag(0, "of data order, crops, channel noise; not of the bank", **INT64, free="training", needs=SENDS)
    compile: bool = flag(False, "torch.compile the network: minutes before the first pass", free="training")
    data_dir: str = flag("", "the data set's folder (local, gs:// or az://)", needs=SENDS)
    dataset_mode: str = flag("cityscapes", "folder layout and label ids", choices=("cityscapes", "ade20k", "coco"))
    only: str = flag("", SCENES_HELP.format("take only"), needs=SENDS)
    leave_out: str = flag("", SCENES_HELP.format("leave out"), needs=SENDS)
    is_train: bool = by_message(True, "True reads the training split, False the validation split")
    num_workers: int = anyhow(2, "processes that load pictures; 0: the main process", low=0, needs="loader")
    cache_dir: str = anyhow("", "keep resized pictures and maps there, in memory-mapped files", needs=CACHE)


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
    attention_resolutions: str = by_training("16,8", "attention where image_size // it is the stride", low=1, each=int)
    channel_mult: str = by_training("", 'width per level: "1,2,3,4"; empty: by image_size', low=0, high=1e3, each=float)
    dropout: float = flag(0.0, "dropout in the residual blocks", low=0, high=1, free="sampling", needs="training")
    class_cond: bool = flag(True, "must be True: this network is conditional", choices=(True,))
    use_checkpoint: bool = anyhow(False, "recompute activations: less memory, more time", needs="training")
    use_scale_shift_norm: bool = by_training(True, "the time embedding scales and shifts each block's second norm")
    resblock_updown: bool = by_training(False, "residual blocks change the resolution, not strided convolutions")
    use_new_attention_order: bool = by_training(False, "split q, k, v before the heads (published weights: False)")
    no_instance: bool = by_training(False, "leave out the edge plane (instance and image edges)")
    one_hot_label: bool = by_training(True, "one plane per class; False: one plane with the raw label id")
    color_layer: bool = by_training(False, "a coarse picture is sent, too; the network makes what it lacks")
    spade_channels: int = by_training(128, "hidden width of SPADE; 32 trains up to twice as fast", low=1)
    unet_model: str = by_training("unet", "SPADE in middle and decoder, all, or encoder and middle", choices=PLACES)


@dataclass(kw_only=True)
class DiffusionFlags:
    """Diffusion"""

    learn_sigma: bool = by_training(False, "the network also predicts the variance")
    diffusion_steps: int = by_training(1000, "steps of the forward process", low=1)
    noise_schedule: str = by_training("linear", "noise schedule", choices=("linear", "cosine"))
    timestep_respacing: str = flag("", f"steps: {RESPACING}; empty: all", fixed_by="resumed message")
    use_kl: bool = by_resumed(False, "train on the variational bound alone", free="sampling", needs="training")
    prediction: str = by_training("eps", "what the network predicts: noise, x_0, velocity", choices=("eps", "x0", "v"))
    predict_xstart: bool = by_training(False, "the family's flag for --prediction x0")
    rescale_timesteps: bool = by_training(False, "the network sees timesteps scaled to 0...1000")
    rescale_learned_sigmas: bool = by_resumed(False, "weight the variational term by T/1000", free="sampling", needs=VB)


@dataclass(kw_only=True)
class BankFlags:
    """Noise bank"""

    noise_bank_size: int = by_training(1000, "entries; 0: ordinary diffusion with fresh noise", low=0)
    noise_bank_seed: int = by_training(150, "both ends share it; published: 150", **INT64, needs="noise_bank_size")
    noise_bank_cache: int = anyhow(0, "bank entries kept in memory", low=0, needs="noise_bank_size")


@dataclass(kw_only=True)
class ChannelFlags:
    """Source coding (training uses what the link will send) and channel"""

    label_scale: int = by_source(1, "one label for so many pixels in each direction; 0: varies", choices=(0, *SCALES))
    label_smooth: int = by_source(0, "smooth label maps, to regions of at least so many pixels; 0: do not", low=0)
    edge_levels: int = by_source(0, "values of an image-edge pixel: 0 (none sent), 2 ... 256 (GESCO)", needs=EDGES)
    edge_threshold: float = by_source(0.3, "image edges from here on are sent as 1", needs=f"{EDGES} edge_levels=2")
    edge_scale: int = by_source(1, "send one edge pixel for so many", choices=SCALES, needs=f"{EDGES} edge_levels")
    snr: float = flag(100.0, SNR_HELP, low=1, needs="add_noise")
    add_noise: bool = flag(False, "noise by a row of the table, or by --snr", free="sampling", needs="no_snr")
    noise_to: str = flag("semantics", "noise on these planes", choices=NOISY, free="sampling", needs=NOISE_TO)


@dataclass(kw_only=True)
class TrainFlags:
    """Training"""

    checkpoint_dir: str = anyhow("./checkpoints", "where checkpoints, config.json, progress.csv and previews go")
    resume_checkpoint: str = anyhow("", "model file to go on from, or auto: the newest in checkpoint_dir, if any")
    resume_partial: bool = anyhow(False, "resume although parts are missing", needs="resume_checkpoint")
    batch_size: int = anyhow(1, "pictures per step in each process", low=1)
    crop: int = flag(0, "train on random parts of so many rows, in the picture's aspect; 0: on whole pictures", low=0)
    microbatch: int = flag(-1, "pictures per pass; -1: the batch, on a CPU two at a time", low=-1, needs="split_batch")
    lr: float = flag(1e-4, "learning rate of AdamW", low=0)
    weight_decay: float = flag(0.0, "weight decay of AdamW", low=0)
    lr_warmup_steps: int = flag(0, "steps over which the learning rate rises from 0", low=0)
    lr_anneal_steps: int = flag(0, "steps to a learning rate of 0, where training ends; 0: constant", low=0)
    total_steps: int = anyhow(0, "stop after so many steps; 0: go on", low=0, needs="last_step")
    ema_rate: str = flag("0.9999", "decays of the averaged weights, each an average", low=0, high=0.999999, each=float)
    schedule_sampler: str = flag("uniform", "which timesteps to train on", choices=("uniform", "loss-second-moment"))
    drop_rate: float = flag(0.0, "share of samples without conditioning, for guidance (presets: 0.1)", low=0, high=1)
    log_interval: int = flag(10, "steps between rows of progress.csv", low=1)
    save_interval: int = flag(5000, "steps between checkpoints and previews", low=1)
    keep_checkpoints: int = flag(0, "keep so many of the newest, and the one with the best score; 0: all", low=0)
    dist_timeout: float = anyhow(600.0, "seconds to wait for a process that is lost or hangs, until all end", low=1)
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

    model_path: str = flag("", "weights (.pt), a folder (its newest EMA file), or an archive (.zip)", free="sampling")
    allow_missing_weights: bool = anyhow(False, "--dry_run goes on where --model_path is missing", needs="dry_run")
    results_path: str = anyhow("", "where pictures, panel and results.csv go")
    num_samples: int = anyhow(10000, "at most so many pictures; each picture of the split once", low=1)
    batch_size: int = anyhow(1, "pictures per batch", low=1, needs=SENDS)
    use_ddim: bool = by_message(False, "the family's flag for --sampler ddim")
    sampler: str = by_message("", "dpm++: DPM-Solver++ 2M; empty: ddpm, or ddim with --use_ddim", choices=SAMPLERS)
    label_memory: float = anyhow(4.0, "GiB for cached SPADE modulation; beyond: computed every step", low=0, high=1e6)
    eta: float = by_message(0.0, "share of fresh noise in DDIM", low=0, high=1, needs="sampler=ddim")
    clip_denoised: bool = by_message(True, "clip predicted pictures at every step; not beside a colour layer")
    start_time: int = by_message(0, "begin below this step, at the layer; 0: at T", low=0, needs="color_layer")
    realism: float = flag(1.0, "0: the mean picture, 1: a sample, between: a mix", low=0, high=1, needs="color_layer")
    s: float = by_message(1.0, "guidance scale; above 1 doubles the cost", low=1)
    stop_tol: float = by_message(0.0, "early stop: x_0 moved less than this (RMS, of a range of 2); 0: off", low=0)
    stop_patience: int = flag(3, "early stop: so many consecutive steps", low=1, needs="stop_tol")
    stop_min_steps: int = flag(1, "early stop: not before so many steps", low=1, needs="stop_tol")
    panel_items: int = anyhow(8, "pictures in panel.png", low=0)
    share_array: bool = anyhow(True, "the tasks of a SLURM array share the pictures; False: each makes all")


@dataclass(kw_only=True)
class LinkFlags:
    """Link (of --link, --pool and --snr, several values, separated by commas, are compared)"""

    send: str = by_message("labels,color", "parts that are sent", choices=("labels", "color"), each=str, needs=SENDS)
    color_step: int = by_message(120, COLOR_HELP, low=0, high=255, needs="color_layer")
    target_bpp: float = by_message(0.0, "bits per pixel that no message exceeds; 0: none", low=0, high=1e3, needs=SENDS)
    target_bytes: int = by_message(0, "the same, in bytes", low=0, needs=SENDS)
    role: str = flag("link", "both ends, write messages, or read them", choices=("link", "transmit", "receive"))
    link: str = flag("analog", LINK_HELP, choices=LINKS, each=str, needs="role=link")
    pool: str = flag("None", POOL_HELP, choices=POOLS, each=str, needs=ANALOG)
    modulation: str = flag("16qam", "symbols of the maps", choices=("qpsk", "16qam", "64qam"), needs=DIGITAL)
    code_rate: float = flag(0.5, "of the maps' 5G LDPC code", low=0.2, high=0.95, needs=DIGITAL)
    fading: str = flag("awgn", "constant channel, or block fading", choices=("awgn", "rayleigh"), needs=DIGITAL)
    messages: str = anyhow("", "folder with .dgo files; all that is needed beside the checkpoint", needs="role=receive")
    verify: str = anyhow("", "results folder of --role transmit: are the pictures equal?", needs="role=receive")
    extractor: str = by_message("gt", "label maps: gt (data set), or a segmenter's file (TorchScript, torch.export)")
    local_picture: bool = flag(False, "compare with the transmitter's local picture", needs=LOCAL)


@dataclass(kw_only=True)
class SelectionFlags:
    """Noise selection (transmitter)"""

    noise_index: str = by_message("random", "bank entry: random, a number, or best", needs="noise_bank_size")
    candidates: int = by_message(16, "best: search so many bank entries", low=1, needs="noise_index=best")
    distance: str = by_message("mse", "of local pictures from the sent one", choices=DISTANCES, needs="selecting")
    feedback_steps: int = by_message(0, FEEDBACK_HELP, low=0, needs="noise_index=best many_candidates")
    selection: str = by_message("initial", "of the start, each step's noise, or both", choices=SELECTIONS)
    step_candidates: int = by_message(256, "bank entries to choose from", low=1, needs=PER_STEP)
    step_atoms: int = by_message(4, "entries chosen, each with a sign", low=1, needs=PER_STEP)
    selected_steps: int = by_message(0, "in the last so many steps; 0: in all", low=0, needs=PER_STEP)
    selection_weight: str = by_message("none", WEIGHT_HELP, choices=("none", "rare"), needs=PER_STEP)
    tail_steps: int = by_message(0, "deterministic final steps (DDIM, eta 0); not for dpm++", low=0, needs="step_noise")
    segmenter: str = anyhow("", "a segmenter's file (TorchScript, torch.export)", needs=f"{SENDS} segmenting")


@dataclass(kw_only=True)
class MeasureFlags:
    """Measures (lists are separated by commas)"""

    metrics: str = anyhow("psnr,ssim", "measures", choices=METRICS, each=str, needs=SENDS)
    lpips_weights: str = flag("", "backbone weights for lpips; empty: TORCH_HOME, or downloaded", needs="lpips")
    fid_weights: str = anyhow("", "Inception weights; empty: as for lpips", needs=f"{SENDS} metrics=fid|kid")
    features: str = anyhow("", "a feature network's file instead of Inception", needs=f"{SENDS} metrics=fid|kid")
    baseline: str = anyhow("", BASELINE_HELP, choices=CODECS, each=str, needs=CODED)


class SharedFlags(RunFlags, ModelFlags, DiffusionFlags, BankFlags, ChannelFlags):
    pass


@dataclass(kw_only=True)
class TrainConfig(SharedFlags, TrainFlags):
    """Configuration of image_train.py."""


@dataclass(kw_only=True)
class SampleConfig(SharedFlags, SampleFlags, LinkFlags, SelectionFlags, MeasureFlags):
    """Configuration of image_sample.py."""

    is_train: bool = by_message(False, "True reads the training split, False the validation split")
    snr: str = flag("100", f"{SNR_HELP}; digital: Es/N0", low=-1e6, high=1e6, each=float, needs=NOISY_LINK)
