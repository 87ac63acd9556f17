"""Send a split's pictures as semantics and a noise index, and regenerate them at the other end (Diff-GOn).

Start small: python image_sample.py --preset toy
"""

import os

from guided_diffusion.config import (
    SampleConfig,
    adopt_training_config,
    check_bank,
    parse_config,
    print_config,
    unused_flags,
)
from guided_diffusion.console import STARTED, InputError, Interrupted, Interrupts, log, run_script
from guided_diffusion.files import check_folder
from guided_diffusion.prepare import check_places, check_values, draw_toy_scenes, find_weights, trained_config
from guided_diffusion.training.ranks import find_ranks, find_share


def main():
    """Parse flags, take the architecture from the checkpoint, build, regenerate."""
    with Interrupts(at_once=True):  # what is done is on the disk already
        try:
            regenerate()
        except Interrupted:
            log("stopped; the same command goes on with what is missing")
            raise


def regenerate():
    """Regenerate this process's share of the pictures, or look at what that would do (--dry_run)."""
    config, given = parse_config(SampleConfig, __doc__)
    ranks = find_ranks()
    tell = log if ranks.rank == 0 else lambda line: None
    weights = find_weights(config.model_path, config.dry_run, tell)
    trained, beside = trained_config(weights)
    if trained:
        for line in adopt_training_config(config, given, trained, beside):
            tell(f"warning: {line}")
    check_bank(config, given)
    check_values(config)
    for line in unused_flags(config, given):
        tell(f"warning: {line}")
    if config.s > 1 and trained.get("drop_rate") == 0:
        tell(f"warning: --s {config.s:g} guides a model trained without --drop_rate: it has never seen empty semantics")
    if not trained and os.path.exists(weights):
        found = f"no config.json beside {weights}: prediction, schedule and noise bank are taken from the flags"
        tell(f"warning: {found}; weights from elsewhere saw all image edges: give --edge_levels 256")
    if config.role != "receive":
        draw_toy_scenes(config, given, log)
    if not config.results_path and not config.dry_run:
        raise InputError("--results_path is empty: name a folder for pictures, panel.png and results.csv")
    check_folder(config.results_path, "results_path")
    check_places(config)
    if config.dry_run:
        if ranks.rank == 0:
            from guided_diffusion.dry_run import dry_run

            print_config(config)
            dry_run(config, log=print, weights=weights)
        return
    share, quiet = find_share(ranks, config.share_array), ranks.rank > 0  # one progress bar for each job is enough
    from guided_diffusion import build_link

    if config.role == "receive":
        from guided_diffusion.evaluation.receive import receive_all

        receive_all(config, weights, build_link.receiving_parts(config, weights, tell, ranks), log, share, quiet)
        return
    from guided_diffusion.evaluation.run import run_points

    parts = build_link.sampling_parts(config, weights, tell, ranks)
    run_points(config, weights, parts, log, share, quiet, None if quiet else STARTED)


if __name__ == "__main__":
    run_script(main)
