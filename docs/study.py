"""What the studies share: the parts of a sampling run, and tables that grow row by row."""

import csv

from guided_diffusion import build_link
from guided_diffusion.config import SampleConfig, adopt_training_config, parse_config
from guided_diffusion.console import log
from guided_diffusion.training.checkpoint import find_weights, trained_config


def link_parts(options, log=log, **flags):
    """Return the config and the parts of a sampling run with the checkpoint's flags.

    :param options: names data_dir, model_path and output.
    :param log, flags: function of a line; further flags of image_sample.py.
    """
    flags = {
        "data_dir": options.data_dir,
        "model_path": options.model_path,
        "results_path": options.output,
        "link": "ideal",
        "metrics": "psnr",
        **flags,
    }
    config, given = parse_config(SampleConfig, "", [word for k, v in flags.items() for word in (f"--{k}", str(v))])
    weights = find_weights(config.model_path)
    adopt_training_config(config, given, *trained_config(weights))
    return config, build_link.sampling_parts(config, weights, log)


def rows_of(path):
    """Read a CSV of an earlier run."""
    if not path.exists():
        return []
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


def append(path, rows):
    """Add rows to a CSV."""
    new = not path.exists()
    with open(path, "a", newline="") as f:
        writer = csv.DictWriter(f, rows[0])
        if new:
            writer.writeheader()
        writer.writerows(rows)
