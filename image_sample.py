"""Send a split's pictures as semantics and a noise index, and regenerate them at the other end (Diff-GOn).

Start small: python image_sample.py --preset toy
"""

import os

from guided_diffusion import config as flags
from guided_diffusion.console import InputError, Interrupted, Interrupts, log, run_script
from guided_diffusion.files import check_folder


def main():
    """Parse flags, take the architecture from the checkpoint, build, regenerate; a signal ends it at once."""
    config, given = flags.parse_config(flags.SampleConfig, __doc__)
    from guided_diffusion.training.distributed import find_ranks  # with torch

    with Interrupts(at_once=True):  # what is done is on the disk already
        try:
            regenerate(config, given, find_ranks())
        except Interrupted:
            log("stopped; the same command goes on with what is missing")
            raise


def regenerate(config, given, ranks):
    """Regenerate this process's share of the pictures, or look at what that would do (--dry_run)."""
    from guided_diffusion import build
    from guided_diffusion.training.checkpoint import find_weights, trained_config
    from guided_diffusion.training.distributed import find_share

    quiet = ranks.rank > 0  # one process of a job logs and shows a progress bar
    log_main = (lambda line: None) if quiet else log
    weights = find_weights(config.model_path, config.dry_run and config.allow_missing_weights, log_main)
    trained, source = trained_config(weights)
    warnings = flags.adopt_training_config(config, given, trained, source) if trained else []
    flags.check_adopted(config, given)
    warnings += flags.unused_flags(config, given) + flags.surprises(config, given, trained)
    if config.s > 1 and trained.get("drop_rate") == 0:
        warnings.append(f"--s {config.s:g} guides a model trained without --drop_rate, which never saw empty semantics")
    if not trained and os.path.exists(weights):
        warnings.append(f"no config.json beside {weights}: prediction, schedule and noise bank come from the flags")
    for line in warnings:
        log_main(f"warning: {line}")
    if config.role != "receive":
        build.draw_toy_scenes(config, given, log)
    if not config.results_path and not config.dry_run:
        raise InputError("--results_path is empty: name a folder for pictures, panel.png and results.csv")
    check_folder(config.results_path, "results_path")

    if config.dry_run:
        from guided_diffusion.dry_run import dry_run

        if not quiet:
            dry_run(config, log=print, weights=weights)
        return
    from guided_diffusion import build_link
    from guided_diffusion.evaluation.run import run_pictures

    make_parts = build_link.receiving_parts if config.role == "receive" else build_link.sampling_parts
    parts = make_parts(config, weights, log_main, ranks)
    run_pictures(config, weights, parts, log, find_share(ranks, config.share_array), quiet)


if __name__ == "__main__":
    run_script(main)
