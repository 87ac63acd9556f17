"""Send a split's pictures as semantics and a noise index, and regenerate them at the other end (Diff-GOn).

Start small: python image_sample.py --preset toy
"""

import os

from guided_diffusion.config import (
    SampleConfig,
    adopt_training_config,
    check_bank,
    ineffective_flags,
    load_config,
    parse_config,
    print_config,
)
from guided_diffusion.errors import InputError
from guided_diffusion.files import check_folder
from guided_diffusion.scripts import run_script, say


def main():
    """Parse flags, take the architecture from the checkpoint, build, regenerate."""
    config, given = parse_config(SampleConfig, __doc__)
    from guided_diffusion import build

    weights = build.find_weights(config.model_path, config.dry_run)
    trained = {}
    beside = os.path.join(os.path.dirname(weights), "config.json")
    if os.path.exists(beside):
        trained = load_config(beside)
        for line in adopt_training_config(config, given, trained, beside):
            say(f"warning: {line}")
    check_bank(config, given)
    for line in ineffective_flags(config, given):
        say(f"warning: {line}")
    if config.s > 1 and trained.get("drop_rate") == 0:
        say(f"warning: --s {config.s:g} guides a model trained without --drop_rate: it has never seen empty semantics")
    if not trained and os.path.exists(weights):
        say(f"warning: no config.json beside {weights}: prediction, schedule and noise bank are taken from the flags")
    if config.role != "receive":
        build.draw_toy_scenes(config, given, say)
    if not config.results_path and not config.dry_run:
        raise InputError("--results_path is empty: name a folder for pictures, panel.png and results.csv")
    check_folder(config.results_path, "results_path")
    if config.dry_run:
        print_config(config)
        build.dry_run(config, say=print, weights=weights)
        return
    from guided_diffusion import build_link

    if config.role == "receive":
        from guided_diffusion.receive import Receiving

        run = Receiving(config, weights, build_link.receiving_parts(config, weights, say))
        say(f"receiving {run.count} messages with {weights} into {config.results_path}")
        for line in run.summary(run.run()):
            say(line)
        return
    from guided_diffusion.regenerate import run_points

    run_points(config, weights, build_link.sampling_parts(config, weights, say), say)


if __name__ == "__main__":
    run_script(main)
