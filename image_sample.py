"""Send a split's pictures as semantics and a noise index, and regenerate them at the other end (Diff-GOn).

Start small: python image_sample.py --preset toy
"""

import os

from guided_diffusion.config import SampleConfig, adopt_training_config, check_bank, parse_config, print_config
from guided_diffusion.console import InputError, Interrupted, Interrupts, log, run_script
from guided_diffusion.files import check_folder
from guided_diffusion.idle_flags import unused_flags
from guided_diffusion.build import draw_toy_scenes
from guided_diffusion.prepare import check_values
from guided_diffusion.training.checkpoint import find_weights, trained_config
from guided_diffusion.training.distributed import find_ranks, find_share


def main():
    """Parse flags, take the architecture from the checkpoint, build, regenerate; a signal ends it at once."""
    config, given = parse_config(SampleConfig, __doc__)
    with Interrupts(at_once=True):  # what is done is on the disk already
        try:
            regenerate(config, given)
        except Interrupted:
            log("stopped; the same command goes on with what is missing")
            raise


def regenerate(config, given):
    """Regenerate this process's share of the pictures, or look at what that would do (--dry_run)."""
    ranks = find_ranks()
    quiet = ranks.rank > 0  # one process of a job logs and shows a progress bar
    tell = (lambda line: None) if quiet else log
    weights = find_weights(config.model_path, config.dry_run, tell)
    trained, source = trained_config(weights)
    warnings = adopt_training_config(config, given, trained, source) if trained else []
    check_bank(config, given)
    check_values(config)
    warnings += unused_flags(config, given)
    if config.s > 1 and trained.get("drop_rate") == 0:
        warnings.append(f"--s {config.s:g} guides a model trained without --drop_rate, which never saw empty semantics")
    if not trained and os.path.exists(weights):
        taken = "prediction, schedule, noise bank and edges are taken from the flags"
        warnings.append(f"no config.json beside {weights}: {taken}; most weights from elsewhere need --edge_levels 256")
    for line in warnings:
        tell(f"warning: {line}")
    if config.role != "receive":
        draw_toy_scenes(config, given, log)
    if not config.results_path and not config.dry_run:
        raise InputError("--results_path is empty: name a folder for pictures, panel.png and results.csv")
    check_folder(config.results_path, "results_path")

    if config.dry_run:
        from guided_diffusion.dry_run import dry_run

        if not quiet:
            print_config(config)
            dry_run(config, log=print, weights=weights)
        return
    from guided_diffusion import build_link
    from guided_diffusion.evaluation.run import run_pictures

    build = build_link.receiving_parts if config.role == "receive" else build_link.sampling_parts
    parts = build(config, weights, tell, ranks)
    run_pictures(config, weights, parts, log, find_share(ranks, config.share_array), quiet)


if __name__ == "__main__":
    run_script(main)
