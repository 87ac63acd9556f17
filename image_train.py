"""Train the semantic diffusion model with noise-restricted forward diffusion (Diff-GOn).

Start small: python image_train.py --preset toy
"""

import os
from contextlib import nullcontext
from pathlib import Path

from guided_diffusion.config import TrainConfig, adopt_resumed, parse_config, print_config, save_config, unused_flags
from guided_diffusion.console import Interrupts, log, run_script
from guided_diffusion.files import check_folder
from guided_diffusion.prepare import check_places, check_values, draw_toy_scenes
from guided_diffusion.training.ranks import find_ranks


def main():
    """Parse flags, meet the other processes, build, train."""
    config, given = parse_config(TrainConfig, __doc__)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else a lost connection is a page of C++ frames
    with Interrupts(at_once=True) as interrupts:
        ranks = find_ranks()
        alone = ranks.world_size == 1
        if (
            alone
        ):  # before torch is loaded, so that a mistake is answered at once; of several, none ends while others wait
            settle(config, given)
        elif not config.resume_checkpoint:  # else some values are the earlier run's
            check_values(config)
        from guided_diffusion import build

        group, device = build.join_group(config, ranks)
        with group.guarded():
            if not alone:
                settle(config, given, group)
            train(config, given, group, device, interrupts)


def settle(config, given, group=None):
    """Take over what a resumed run fixes, warn of idle flags, check folders, draw toy scenes."""
    adopted = adopt_resumed(config, given)
    check_values(config)
    for line in [*adopted, *unused_flags(config, given)]:
        if group is None or group.main:
            log(f"warning: {line}")
    check_folder(config.checkpoint_dir, "checkpoint_dir")
    with group.main_first() if group else nullcontext():
        draw_toy_scenes(config, given, log)
    check_places(config)


def train(config, given, group, device, interrupts):
    """Train, or look at what training would do (--dry_run)."""
    from guided_diffusion import build

    tell = log if group.main else lambda line: None
    if config.dry_run:
        if group.main:
            from guided_diffusion.dry_run import dry_run

            print_config(config)
            dry_run(config, log=print)
        return
    loop = build.training_loop(config, given, tell, group, device)
    if group.main:
        os.makedirs(config.checkpoint_dir, exist_ok=True)
        save_config(config, Path(config.checkpoint_dir) / "config.json")
    step = loop.run(interrupts)
    tell(f"finished at step {step}: weights, progress.csv and previews are in {config.checkpoint_dir}")


if __name__ == "__main__":
    run_script(main)
