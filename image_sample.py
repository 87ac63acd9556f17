"""Send a split's pictures as semantics and a noise index, and regenerate them at the other end (Diff-GOn).

Start small: python image_sample.py --preset toy
"""

import sys

from guided_diffusion import config as flags
from guided_diffusion.console import InputError, Interrupted, Interrupts, log, run_script
from guided_diffusion.files import check_folder


def main():
    """Parse flags, take the architecture from the checkpoint, build, regenerate; a signal ends it at once."""
    config, given = flags.parse_config(flags.SampleConfig, __doc__)
    if config.results_path:
        check_folder(config.results_path, "results_path")
    elif not config.dry_run:
        raise InputError("--results_path is empty: name a folder for pictures, panel.png and results.csv")
    from guided_diffusion.training.distributed import find_ranks  # with torch

    with Interrupts(at_once=True):  # what is done is on the disk already
        try:
            regenerate(config, given, find_ranks())
        except Interrupted:
            log("stopped; the same command goes on with what is missing")
            raise


def regenerate(config, given, ranks):
    """Regenerate this process's share of the pictures, or look at what that would do (--dry_run)."""
    from guided_diffusion import build, build_link
    from guided_diffusion.training.checkpoint import find_weights
    from guided_diffusion.training.distributed import find_share

    quiet = ranks.rank > 0  # one process of a job logs and shows a progress bar
    log_main = (lambda line: None) if quiet else log
    hint = "; the dry run can do without: --allow_missing_weights True" * config.dry_run
    weights = find_weights(config.model_path, config.dry_run and config.allow_missing_weights, log_main, hint)
    for line in build_link.adopt_checkpoint(config, given, weights) + flags.unused_flags(config, given):
        log_main(f"warning: {line}")
    if config.role != "receive":
        build.draw_toy_scenes(config, given, log)
    if config.dry_run:
        from guided_diffusion.dry_run import dry_run

        if not quiet:
            dry_run(config, log=print, weights=weights)
        return
    from guided_diffusion.evaluation.run import run_pictures

    make_parts = build_link.receiving_parts if config.role == "receive" else build_link.sampling_parts
    parts = make_parts(config, weights, log_main, ranks)
    if failures := run_pictures(config, weights, parts, log, find_share(ranks, config.share_array), quiet):
        sys.exit("\n".join(failures))  # with code 1


if __name__ == "__main__":
    run_script(main)
