"""Flags that were given and change nothing: said, never ignored in silence. Standard library only."""

from .config import parts_of
from .flags import TrainConfig


def unused_flags(config, given):
    """Return one line for every explicit flag that changes nothing in this run."""
    training = isinstance(config, TrainConfig)
    on = {name for name in given if getattr(config, name) is not False}
    rules = [
        ("num_heads", config.num_head_channels != -1, "num_head_channels decides the number of heads"),
        ("num_heads_upsample", config.num_head_channels != -1, "num_head_channels decides the number of heads"),
        ("noise_bank_seed", config.noise_bank_size == 0, "there is no bank with --noise_bank_size 0"),
        ("noise_bank_cache", config.noise_bank_size == 0, "there is no bank with --noise_bank_size 0"),
        ("edge_threshold", config.edge_levels != 2 and not config.no_instance, "it belongs to --edge_levels 2"),
        (
            "edge_scale",
            config.edge_levels == 0 and not config.no_instance,
            "there are no image edges with --edge_levels 0",
        ),
        ("cache_dir", config.dry_run, "a dry run builds no cache"),
        *(
            (name, config.no_instance, "there is no edge plane with --no_instance True")
            for name in ("edge_levels", "edge_threshold", "edge_scale")
        ),
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
            ("microbatch", config.microbatch >= config.batch_size <= 2, "it is no smaller than the batch"),
            (
                "total_steps",
                0 < config.lr_anneal_steps < config.total_steps,
                f"training ends with --lr_anneal_steps {config.lr_anneal_steps}",
            ),
            ("preview_steps", not config.preview_items, "it belongs to --preview_items"),
            ("resume_partial", not config.resume_checkpoint, "it belongs to --resume_checkpoint"),
            (
                "cache_dir",
                config.is_train and config.dataset_mode != "cityscapes",
                "random crops are cut from the files",
            ),
        ]
    else:
        rules += [
            ("add_noise", True, "--snr alone sets the channel in sampling"),
            ("noise_to", True, "in sampling all sent planes cross the channel"),
            ("use_checkpoint", True, "sampling has no backward pass"),
            ("dropout", True, "sampling has no dropout"),
            ("use_kl", True, "sampling has no loss"),
            ("rescale_learned_sigmas", True, "sampling has no loss"),
            ("eta", config.sampler != "ddim", "it belongs to --sampler ddim"),
            ("stop_patience", not config.stop_tol, "it belongs to --stop_tol"),
            ("stop_min_steps", not config.stop_tol, "it belongs to --stop_tol"),
            ("noise_index", config.noise_bank_size == 0, "there is no bank with --noise_bank_size 0"),
            ("num_workers", True, "sampling loads its pictures in the main process"),
            *_idle_link_flags(config),
        ]
    return [
        f"--{name} {getattr(config, name)} has no effect: {why}" for name, idle, why in rules if name in on and idle
    ]


def _idle_link_flags(config):
    """Return (flag, whether it is idle, why) for the flags of the link."""
    links = parts_of(config.link) if config.role == "link" else []
    searching, per_step = config.noise_index == "best", config.selection != "initial"
    segmenting = ((searching or per_step) and config.distance == "segmenter") or "miou" in parts_of(config.metrics)
    decided_by_message = (
        "s",
        "use_ddim",
        "sampler",
        "eta",
        "timestep_respacing",
        "clip_denoised",
        "stop_tol",
        "noise_index",
        "selection",
        "candidates",
        "distance",
        "feedback_steps",
        "step_candidates",
        "step_atoms",
        "selected_steps",
        "tail_steps",
        "extractor",
        "label_scale",
        "edge_levels",
        "edge_scale",
        "edge_threshold",
        "is_train",
        "precision",
    )
    receiving = config.role == "receive"
    rules = [(name, receiving, "with --role receive the message decides") for name in decided_by_message]
    rules += [
        (name, receiving, "--role receive sees messages alone")
        for name in (
            "data_dir",
            "cache_dir",
            "baseline",
            "segmenter",
            "local_picture",
            "metrics",
            "features",
            "fid_weights",
            "seed",
            "batch_size",
        )
    ]
    rules += [
        ("messages", not receiving, "it belongs to --role receive"),
        (
            "cache_dir",
            config.extractor != "gt" and not receiving,
            "it holds the data set's label maps, not an extractor's",
        ),
        ("link", config.role != "link", "only --role link has a channel"),
        ("snr", not {"analog", "digital"} & {*links}, "this run has no noisy channel"),
        ("pool", "analog" not in links, "it belongs to --link analog"),
        *(
            (name, "digital" not in links, "it belongs to --link digital")
            for name in ("modulation", "code_rate", "fading")
        ),
        *((name, not searching, "it belongs to --noise_index best") for name in ("candidates", "feedback_steps")),
        ("distance", not searching and not per_step, "nothing is selected"),
        ("feedback_steps", searching and config.candidates <= 4, "so few candidates all run whole chains"),
        ("local_picture", config.role == "transmit" or searching or per_step, "the local picture is made anyway"),
        (
            "local_picture",
            config.role == "link" and config.noise_bank_size == 0,
            "there is no bank with --noise_bank_size 0",
        ),
        ("tail_steps", config.sampler == "ddim" and not config.eta, "DDIM with --eta 0 has no noise in any step"),
        ("tail_steps", config.sampler == "dpm++", "DPM-Solver++ has no noise in any step"),
        *(
            (name, not per_step, "it belongs to --selection per_step or both")
            for name in ("step_candidates", "step_atoms", "selected_steps")
        ),
        ("segmenter", not segmenting and not receiving, "it belongs to --distance segmenter and --metrics miou"),
        ("baseline", links and {"analog"} >= {*links}, "planes of --link analog have no bits to compare with"),
        (
            "lpips_weights",
            "lpips" not in parts_of(config.metrics) and config.distance != "lpips",
            "it belongs to lpips",
        ),
        *(
            (name, not receiving and not {"fid", "kid"} & {*parts_of(config.metrics)}, "it belongs to fid and kid")
            for name in ("fid_weights", "features")
        ),
    ]
    return rules
