"""Train the semantic diffusion model with noise-restricted forward diffusion (Diff-GOn).

Start small: python image_train.py --preset toy
"""

import os
from pathlib import Path

from guided_diffusion.config import (
    TrainConfig,
    adopt_resumed,
    ineffective_flags,
    parse_config,
    print_config,
    save_config,
)
from guided_diffusion.files import check_folder
from guided_diffusion.scripts import run_script, say


def main():
    """Parse flags, build, train."""
    config, given = parse_config(TrainConfig, __doc__)
    from guided_diffusion import build

    for line in [*adopt_resumed(config, given), *ineffective_flags(config, given)]:
        say(f"warning: {line}")
    check_folder(config.checkpoint_dir, "checkpoint_dir")
    build.draw_toy_scenes(config, given, say)
    if config.dry_run:
        print_config(config)
        build.dry_run(config, say=print)
        return
    loop = build.training_loop(config, given, say)
    os.makedirs(config.checkpoint_dir, exist_ok=True)
    save_config(config, Path(config.checkpoint_dir) / "config.json")
    step = loop.run()
    say(f"finished at step {step}: weights, progress.csv and previews are in {config.checkpoint_dir}")


if __name__ == "__main__":
    run_script(main)
