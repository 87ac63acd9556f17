"""Flags without effect get a line each."""

import shlex

import pytest

from guided_diffusion.config import parse_config
from guided_diffusion.flags import SampleConfig, TrainConfig
from guided_diffusion.idle_flags import unused_flags


def parse(config_class, line=""):
    return parse_config(config_class, "test", shlex.split(line))


@pytest.mark.parametrize(
    ("config_class", "line", "names"),
    [
        (TrainConfig, "", []),
        (TrainConfig, "--preset toy", []),
        (SampleConfig, "--preset cityscapes", []),
        (TrainConfig, "--fp16_scale_growth 1e-3", ["fp16_scale_growth"]),
        (TrainConfig, "--snr 10 --noise_to label", ["snr", "noise_to"]),
        (TrainConfig, "--snr 10 --noise_to label --add_noise True", []),
        (TrainConfig, "--patience 3 --eval_items 4", ["patience", "eval_items"]),
        (TrainConfig, "--patience 3 --eval_items 4 --eval_interval 10 --min_delta 0.1", []),
        (TrainConfig, "--min_delta 0.1", ["min_delta"]),
        (TrainConfig, "--microbatch 2 --batch_size 2", ["microbatch"]),
        (TrainConfig, "--microbatch 4 --batch_size 4", []),
        (TrainConfig, "--total_steps 900 --lr_anneal_steps 600", ["total_steps"]),
        (TrainConfig, "--total_steps 600 --lr_anneal_steps 900", []),
        (TrainConfig, "--total_steps 900 --preset toy", ["total_steps"]),
        (TrainConfig, "--microbatch 2 --batch_size 4", []),
        (TrainConfig, "--resume_partial True", ["resume_partial"]),
        (TrainConfig, "--resume_partial True --resume_checkpoint auto", []),
        (TrainConfig, "--num_heads 2 --num_head_channels 32", ["num_heads"]),
        (TrainConfig, "--num_heads 2 --num_heads_upsample 4", []),
        (TrainConfig, "--rescale_learned_sigmas True", ["rescale_learned_sigmas"]),
        (TrainConfig, "--rescale_learned_sigmas True --learn_sigma True", []),
        (TrainConfig, "--rescale_learned_sigmas True --learn_sigma True --use_kl True", ["rescale_learned_sigmas"]),
        (
            TrainConfig,
            "--noise_bank_size 0 --noise_bank_seed 7 --noise_bank_cache 9",
            ["noise_bank_seed", "noise_bank_cache"],
        ),
        (TrainConfig, "--preview_items 0 --preview_steps 5", ["preview_steps"]),
        (SampleConfig, "--add_noise True --noise_to label --snr 10", ["add_noise", "noise_to"]),
        (SampleConfig, "--add_noise False", []),
        (SampleConfig, "--eta 0.5", ["eta"]),
        (SampleConfig, "--eta 0.5 --use_ddim True", []),
        (SampleConfig, "--eta 0.5 --sampler ddim", []),
        (SampleConfig, "--eta 0.5 --sampler dpm++", ["eta"]),
        (SampleConfig, "--stop_patience 2 --stop_min_steps 3", ["stop_patience", "stop_min_steps"]),
        (SampleConfig, "--stop_patience 2 --stop_min_steps 3 --stop_tol 0.01", []),
        (SampleConfig, "--use_checkpoint True --dropout 0.1 --use_kl True", ["use_checkpoint", "dropout", "use_kl"]),
        (SampleConfig, "--noise_index 3 --noise_bank_size 0", ["noise_index"]),
        (SampleConfig, "--rescale_learned_sigmas True", ["rescale_learned_sigmas"]),
        (TrainConfig, "--edge_threshold 0.2 --edge_scale 2", ["edge_threshold", "edge_scale"]),
        (TrainConfig, "--edge_threshold 0.2 --edge_scale 2 --edge_levels 2", []),
        (SampleConfig, "--link ideal --snr 10 --pool med", ["snr", "pool"]),
        (SampleConfig, "--link digital --snr 10 --modulation qpsk --code_rate 0.3 --fading rayleigh", []),
        (SampleConfig, "--modulation qpsk --code_rate 0.3 --fading rayleigh", ["modulation", "code_rate", "fading"]),
        (
            SampleConfig,
            "--candidates 4 --distance ssim --feedback_steps 3",
            ["candidates", "distance", "feedback_steps"],
        ),
        (SampleConfig, "--candidates 8 --distance ssim --feedback_steps 3 --noise_index best", []),
        (SampleConfig, "--candidates 4 --feedback_steps 3 --noise_index best", ["feedback_steps"]),
        (SampleConfig, "--distance ssim --selection per_step --local_picture True", ["local_picture"]),
        (SampleConfig, "--use_ddim True --tail_steps 3", ["tail_steps"]),
        (SampleConfig, "--sampler dpm++ --tail_steps 3", ["tail_steps"]),
        (SampleConfig, "--sampler ddpm --tail_steps 3", []),
        (SampleConfig, "--no_instance True --edge_threshold 0.2 --edge_scale 2", ["edge_threshold", "edge_scale"]),
        (
            SampleConfig,
            "--role receive --messages m --metrics psnr --batch_size 2 --seed 3",
            ["metrics", "batch_size", "seed"],
        ),
        (
            SampleConfig,
            "--step_candidates 4 --step_atoms 1 --selected_steps 3",
            ["step_candidates", "step_atoms", "selected_steps"],
        ),
        (SampleConfig, "--step_candidates 4 --step_atoms 1 --selected_steps 3 --selection per_step", []),
        (SampleConfig, "--segmenter s.pt", ["segmenter"]),
        (SampleConfig, "--segmenter s.pt --metrics miou", []),
        (
            SampleConfig,
            "--features f.pt --fid_weights w.pth --lpips_weights l.pth",
            ["features", "fid_weights", "lpips_weights"],
        ),
        (SampleConfig, "--features f.pt --metrics kid", []),
        (SampleConfig, "--messages m", ["messages"]),
        (SampleConfig, "--role receive --messages m --s 2 --extractor e.pt", ["s", "extractor"]),
        (SampleConfig, "--role receive --messages m --sampler dpm++", ["sampler"]),
        (SampleConfig, "--role transmit --link digital --snr 3", ["link", "snr"]),
        (TrainConfig, "--cache_dir c", []),
        (TrainConfig, "--cache_dir c --dataset_mode coco --no_instance True", ["cache_dir"]),
        (TrainConfig, "--cache_dir c --dataset_mode coco --no_instance True --is_train False", []),
        (TrainConfig, "--cache_dir c --dry_run True", ["cache_dir"]),
        (SampleConfig, "--cache_dir c --is_train True --dataset_mode coco", []),
        (SampleConfig, "--cache_dir c --extractor e.pt", ["cache_dir"]),
        (SampleConfig, "--cache_dir c --role receive --messages m", ["cache_dir"]),
    ],
)
def test_flags_without_effect_get_one_line_each(config_class, line, names):
    config, given = parse(config_class, line)
    lines = unused_flags(config, given)
    assert sorted(text.split()[0] for text in lines) == sorted(f"--{name}" for name in names)
    assert all("has no effect: " in text for text in lines)
