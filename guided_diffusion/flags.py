"""Every flag once: dataclasses whose fields carry their help texts. Standard library only."""

from dataclasses import dataclass, field

from .presets import PRESETS

# Values of flags that are lists, and so have no choices of argparse
LINKS = ("analog", "digital", "ideal")
POOLS = ("None", "med", "mean", "max")
METRICS = ("psnr", "ssim", "ms_ssim", "lpips", "fid", "kid", "miou")
CODECS = ("jpeg", "webp", "avif", "jxl")


def flag(default, help, choices=None):
    """Declare one command-line flag as a dataclass field."""
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass(kw_only=True)
class RunFlags:
    """Run"""

    preset: str = flag("", "starting values that explicit flags override", ("", *PRESETS))
    dry_run: bool = flag(
        False, "check data, labels, sizes and weights, print the configuration and a memory estimate, stop"
    )
    device: str = flag("auto", "auto, cpu or cuda[:N]; auto gives each process of a node its own GPU")
    precision: str = flag(
        "", "fp32, bf16 or fp16 (torch.amp); empty: fp16 with --use_fp16 True, else fp32", ("", "fp32", "bf16", "fp16")
    )
    use_fp16: bool = flag(False, "the family's flag for --precision fp16; a CPU then uses bf16 and says so")
    seed: int = flag(0, "seed of everything but the noise bank: data order, crops, flips, timesteps, channel noise")
    compile: bool = flag(
        False, "torch.compile the network: the first pass takes minutes, the others less (needs a C++ compiler)"
    )


@dataclass(kw_only=True)
class DataFlags:
    """Data"""

    data_dir: str = flag("", "the data set's folder (local, gs:// or az://)")
    dataset_mode: str = flag("cityscapes", "folder layout and label ids", ("cityscapes", "ade20k", "coco"))
    is_train: bool = flag(True, "True reads the training split, False the validation split")
    num_workers: int = flag(2, "processes that load pictures; 0 loads in the main process")
    cache_dir: str = flag(
        "",
        "keep the resized pictures and maps in a memory-mapped file there, made once (not for random"
        " crops); empty: no cache",
    )


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
    attention_resolutions: str = flag(
        "16,8", "image sizes at which attention runs, as image_size // size = downsampling"
    )
    channel_mult: str = flag(
        "", 'width multiplier per level, such as "1,2,3,4"; empty: the default of image_size 64...512'
    )
    dropout: float = flag(0.0, "dropout in the residual blocks, 0...1")
    class_cond: bool = flag(True, "must be True: this network is conditional")
    use_checkpoint: bool = flag(False, "recompute activations in the backward pass: less memory, more time")
    use_scale_shift_norm: bool = flag(True, "the time embedding scales and shifts the second norm of each block")
    resblock_updown: bool = flag(False, "residual blocks change the resolution, not strided convolutions")
    use_new_attention_order: bool = flag(False, "split q, k, v before the heads (published weights: False)")
    no_instance: bool = flag(False, "leave out the edge plane (instance and image edges)")
    one_hot_label: bool = flag(True, "one plane per class; False: one plane with the raw label id")
    unet_model: str = flag(
        "unet",
        "where SPADE blocks are: unet (middle, decoder), spadeboth, enconly (encoder, middle)",
        ("unet", "spadeboth", "enconly"),
    )


@dataclass(kw_only=True)
class DiffusionFlags:
    """Diffusion"""

    learn_sigma: bool = flag(False, "the network also predicts the variance")
    diffusion_steps: int = flag(1000, "steps of the forward process")
    noise_schedule: str = flag("linear", "noise schedule", ("linear", "cosine"))
    timestep_respacing: str = flag(
        "",
        'steps of the reverse chain: "250", "10,20,30" (per section; no message can say it), "ddim50", or "logsnr20" (even in'
        " log signal-to-noise ratio, for dpm++); empty: all",
    )
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
class SourceFlags:
    """Source coding of the semantics (training uses what the link will send)"""

    label_scale: int = flag(1, "send one label for so many pixels in each direction: 1, 2, 4 or 8", (1, 2, 4, 8))
    edge_levels: int = flag(
        0, "values of an image-edge pixel: 0 (image edges are not sent), 2 (thresholded) ... 256 (GESCO)"
    )
    edge_threshold: float = flag(0.3, "with --edge_levels 2: image edges from here on are sent as 1")
    edge_scale: int = flag(1, "send one image-edge pixel for so many in each direction: 1, 2, 4 or 8", (1, 2, 4, 8))


@dataclass(kw_only=True)
class ChannelFlags:
    """Channel"""

    snr: float = flag(
        100.0,
        "dB in GESCO's table 100:0 30:0.05 25:0.08 20:0.13 15:0.22 10:0.36 5:0.6 1:0.9 (standard deviation of the noise"
        " on the semantic planes; log-linear between rows; a convention, not a signal-to-noise ratio: 10 dB would be 0.316)",
    )
    add_noise: bool = flag(
        False, "training: noise on the semantics, per sample one of the table's rows, or --snr if given"
    )
    noise_to: str = flag(
        "semantics", "training: noise on all planes, or on the label planes alone", ("semantics", "label")
    )


@dataclass(kw_only=True)
class TrainFlags:
    """Training"""

    checkpoint_dir: str = flag("./checkpoints", "where checkpoints, config.json, progress.csv and previews go")
    resume_checkpoint: str = flag("", "model file to go on from, or auto: the newest in checkpoint_dir, if any")
    resume_partial: bool = flag(False, "resume although parts of the checkpoint are missing")
    batch_size: int = flag(1, "pictures per step in each process")
    microbatch: int = flag(
        -1,
        "pictures per forward pass (gradient accumulation); -1: the whole batch, on a CPU two (so that"
        " the number of processes hardly matters)",
    )
    lr: float = flag(1e-4, "learning rate of AdamW")
    weight_decay: float = flag(0.0, "weight decay of AdamW")
    lr_warmup_steps: int = flag(0, "steps over which the learning rate rises from 0")
    lr_anneal_steps: int = flag(
        0, "the learning rate falls linearly to 0 over so many steps, and training ends; 0: constant"
    )
    total_steps: int = flag(0, "stop after so many steps; 0: go on until stopped (or lr_anneal_steps)")
    ema_rate: str = flag("0.9999", "decay of the averaged weights; several, separated by commas, make several averages")
    schedule_sampler: str = flag("uniform", "which timesteps to train on", ("uniform", "loss-second-moment"))
    drop_rate: float = flag(
        0.0, "share of samples trained without conditioning; needed for guidance (0.1 in the presets)"
    )
    log_interval: int = flag(10, "steps between rows of progress.csv")
    save_interval: int = flag(5000, "steps between checkpoints and previews")
    keep_checkpoints: int = flag(0, "keep so many of the newest checkpoints, and the one with the best score; 0: all")
    save_failures: int = flag(
        3, "end the run when so many saves in a row fail (a full disk); until then it goes on training"
    )
    on_bad_image: str = flag(
        "error",
        "an unreadable file among the pictures ends the run, or is skipped and listed at the end",
        ("error", "skip"),
    )
    dist_timeout: float = flag(600.0, "seconds after which processes that wait for another one give up")
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
    use_ddim: bool = flag(False, "the family's flag for --sampler ddim")
    sampler: str = flag(
        "",
        "ddpm (ancestral), ddim, or dpm++ (DPM-Solver++ 2M: few steps, --timestep_respacing logsnr20);"
        " empty: ddim with --use_ddim True, else ddpm",
        ("", "ddpm", "ddim", "dpm++"),
    )
    label_memory: float = flag(
        4.0, "GiB that may hold what follows from label maps alone; beyond, it is computed anew at every step"
    )
    eta: float = flag(0.0, "share of fresh noise in --sampler ddim, 0...1")
    clip_denoised: bool = flag(True, "clip the predicted picture to the valid range at every step")
    s: float = flag(1.0, "guidance scale, at least 1; above 1 doubles the cost")
    stop_tol: float = flag(0.0, "early stop: predicted picture moved less than this (RMS, of a range of 2); 0: off")
    stop_patience: int = flag(3, "early stop: so many consecutive steps")
    stop_min_steps: int = flag(1, "early stop: not before so many steps")
    panel_items: int = flag(8, "pictures in panel.png")
    share_array: bool = flag(
        True, "the tasks of a SLURM array share the pictures; False: each makes all (arrays over --snr ...)"
    )


@dataclass(kw_only=True)
class LinkFlags:
    """Link"""

    role: str = flag(
        "link",
        "link: both ends and the channel between; transmit: write messages; receive: read messages",
        ("link", "transmit", "receive"),
    )
    link: str = flag(
        "analog",
        "analog (noise on the planes, GESCO), digital (coded bits, needs sionna-no-rt) or ideal (bits"
        " arrive); several, separated by commas, are compared",
    )
    pool: str = flag(
        "None",
        "analog: filter on the received planes: None, med (3x3 median), mean (3x3), max (mean, then 3x3"
        " maximum); several, separated by commas, are compared",
    )
    modulation: str = flag("16qam", "digital: symbols of the maps", ("qpsk", "16qam", "64qam"))
    code_rate: float = flag(0.5, "digital: rate of the maps' LDPC code, 0.2...0.95")
    fading: str = flag("awgn", "digital: constant channel, or Rayleigh block fading", ("awgn", "rayleigh"))
    messages: str = flag("", "receive: folder with .dgo files; the checkpoint is all it needs besides")
    extractor: str = flag(
        "gt",
        "where label maps come from: gt (the data set) or a segmenter's file (TorchScript or"
        " torch.export), which reads them off the pictures",
    )
    local_picture: bool = flag(
        False, "also make the transmitter's local picture, and report how far the receiver's is from it"
    )


@dataclass(kw_only=True)
class SelectionFlags:
    """Noise selection (transmitter)"""

    noise_index: str = flag("random", "bank entry to start from: random (per picture, from --seed), a number, or best")
    candidates: int = flag(16, "best: search so many bank entries")
    distance: str = flag(
        "mse", "best: what the transmitter compares its local pictures by", ("mse", "ssim", "lpips", "segmenter")
    )
    feedback_steps: int = flag(
        0,
        "best: look at all candidates with so many network evaluations each, more closely at the best"
        " quarter, and so on (5 does for 50 steps); 0: whole chains for all",
    )
    selection: str = flag(
        "initial",
        "what is chosen: the start (--noise_index), the noise of each step, or both",
        ("initial", "per_step", "both"),
    )
    step_candidates: int = flag(256, "per step: bank entries to choose from")
    step_atoms: int = flag(4, "per step: entries chosen, each with a sign")
    selected_steps: int = flag(0, "per step: choose in the last so many steps that carry noise; 0: in all")
    tail_steps: int = flag(0, "the last so many steps without noise (DDIM, eta 0); not for dpm++")
    segmenter: str = flag(
        "", "a segmenter's file (TorchScript or torch.export), for --distance segmenter and --metrics miou"
    )


@dataclass(kw_only=True)
class MeasureFlags:
    """Measures"""

    metrics: str = flag("psnr,ssim", "any of psnr, ssim, ms_ssim, lpips, fid, kid, miou, separated by commas")
    lpips_weights: str = flag("", "backbone weights for lpips; empty: TORCH_HOME, or downloaded")
    fid_weights: str = flag("", "Inception weights for fid and kid; empty: TORCH_HOME, or downloaded")
    features: str = flag(
        "", "a feature network's file (TorchScript or torch.export) for fid and kid instead of Inception"
    )
    baseline: str = flag(
        "", "classical codecs at the message's bits: any of jpeg, webp, avif, jxl, separated by commas"
    )


@dataclass(kw_only=True)
class TrainConfig(RunFlags, DataFlags, ModelFlags, DiffusionFlags, BankFlags, SourceFlags, ChannelFlags, TrainFlags):
    """Configuration of image_train.py."""


@dataclass(kw_only=True)
class SampleConfig(
    RunFlags,
    DataFlags,
    ModelFlags,
    DiffusionFlags,
    BankFlags,
    SourceFlags,
    ChannelFlags,
    SampleFlags,
    LinkFlags,
    SelectionFlags,
    MeasureFlags,
):
    """Configuration of image_sample.py."""

    is_train: bool = flag(False, "True reads the training split, False the validation split")
    snr: str = flag(
        "100",
        "dB. Analog: nominal, in GESCO's table 100:0 30:0.05 25:0.08 20:0.13 15:0.22 10:0.36 5:0.6 1:0.9 (standard deviation"
        " of the noise on the semantic planes; log-linear between rows; a convention, not a signal-to-noise ratio: 10 dB"
        " would be 0.316). Digital: Es/N0. Several, separated by commas, make curves",
    )
