"""Train the semantic diffusion model with noise-restricted forward diffusion (Diff-GOn).

Start small: python image_train.py --preset toy
"""

import os
from pathlib import Path

from guided_diffusion import config as flags
from guided_diffusion.console import Interrupts, log, run_script
from guided_diffusion.files import check_folder


def main():
    """Parse flags, meet the other processes, train."""
    config, given = flags.parse_config(flags.TrainConfig, __doc__)
    check_folder(config.checkpoint_dir, "checkpoint_dir")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else a lost connection is a page of C++ frames
    from guided_diffusion.training.devices import select_device  # with torch
    from guided_diffusion.training.distributed import Group, find_ranks

    with Interrupts(at_once=True) as interrupts:
        ranks = find_ranks()
        device = select_device(config.device, ranks)
        own = {"data_dir", "cache_dir", "num_workers"}  # may differ between processes
        shared = {name: value for name, value in vars(config).items() if name not in own}
        group = Group(ranks, device, config.dist_timeout, shared)
        with group.guarded():
            train(config, given, group, device, interrupts)


def train(config, given, group, device, interrupts):
    """Train, or look at what training would do (--dry_run)."""
    from guided_diffusion import build

    log_main = log if group.main else lambda line: None
    for line in flags.adopt_resumed(config, given) + flags.unused_flags(config, given) + flags.surprises(config, given):
        log_main(f"warning: {line}")
    flags.check_adopted(config)
    group.main_first(lambda: build.draw_toy_scenes(config, given, log))
    if config.dry_run:
        if group.main:
            from guided_diffusion.dry_run import dry_run

            dry_run(config, log=print)
        return
    loop = build.training_loop(config, given, log_main, group, device)
    if group.main:
        os.makedirs(config.checkpoint_dir, exist_ok=True)
        flags.save_config(config, Path(config.checkpoint_dir) / "config.json")
    step = loop.run(interrupts)
    log_main(f"finished at step {step}: weights and progress.csv are in {config.checkpoint_dir}")


if __name__ == "__main__":
    run_script(main)
