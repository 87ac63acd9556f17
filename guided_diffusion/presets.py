"""Starting values for whole runs. Explicit flags override them."""

PRESETS = {
    # Toy street scenes on a laptop: minutes for the whole round. SPADE in the encoder costs half of what it costs in the
    # decoder, and predicting x_0 gives clean pictures after few steps.
    "toy": {
        "both": {
            "data_dir": "./datasets/toy_scenes",
            "dataset_mode": "cityscapes",
            "image_size": 32,
            "unet_model": "enconly",
            "num_channels": 32,
            "channel_mult": "1,1,2,2",
            "num_head_channels": 32,
            "num_res_blocks": 1,
            "attention_resolutions": "4",
            "resblock_updown": True,
            "noise_schedule": "cosine",
            "prediction": "x0",
            "num_workers": 0,
        },
        "train": {
            "checkpoint_dir": "./checkpoints/toy",
            "batch_size": 8,
            "microbatch": 8,
            "lr": 1e-3,
            "lr_warmup_steps": 50,
            "lr_anneal_steps": 600,
            "ema_rate": "0.98",
            "drop_rate": 0.1,
            "add_noise": True,
            "save_interval": 200,
        },
        "sample": {
            "model_path": "./checkpoints/toy",
            "results_path": "./results/toy",
            "num_samples": 8,
            "batch_size": 8,
            "use_ddim": True,
            "timestep_respacing": "25",
        },
    },
    # Cityscapes at 256x512 with the family's architecture; schedule and prediction chosen against tints.
    "cityscapes": {
        "both": {
            "dataset_mode": "cityscapes",
            "image_size": 256,
            "num_channels": 256,
            "num_head_channels": 64,
            "num_res_blocks": 2,
            "attention_resolutions": "32,16,8",
            "resblock_updown": True,
            "learn_sigma": True,
            "noise_schedule": "cosine",
            "prediction": "v",
            "precision": "bf16",
            "num_workers": 4,
        },
        "train": {
            "checkpoint_dir": "./checkpoints/cityscapes",
            "batch_size": 4,
            "use_checkpoint": True,
            "lr_warmup_steps": 1000,
            "drop_rate": 0.1,
            "add_noise": True,
            "eval_interval": 5000,
        },
        "sample": {
            "model_path": "./checkpoints/cityscapes",
            "results_path": "./results/cityscapes",
            "use_ddim": True,
            "timestep_respacing": "50",
            "batch_size": 4,
            "label_memory": 10.0,  # four pictures in bf16, and the empty label map
        },
    },
}
