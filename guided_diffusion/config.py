"""Flags (see `flags`) turned into argparse, presets and config.json.

Standard library only, so that `--help` answers at once.
"""

import argparse
import dataclasses
import glob
import hashlib
import itertools
import json
import math
import os

from .console import InputError
from .files import atomic_write
from .flags import (
    CODECS,
    LINKS,
    METRICS,
    POOLS,
    BankFlags,
    ChannelFlags,
    DataFlags,
    DiffusionFlags,
    ModelFlags,
    SampleConfig,
    SourceFlags,
    TrainConfig,
    TrainFlags,
)
from .presets import PRESETS

MAX_CONFIG_BYTES = 2**20

# What a checkpoint fixes: sampling with other values would be another model.
_FREE = {
    "dropout",
    "use_checkpoint",
    "class_cond",
    "timestep_respacing",
    "use_kl",
    "rescale_learned_sigmas",
    "noise_bank_cache",
}
FIXED_BY_TRAINING = [
    f.name
    for group in (ModelFlags, DiffusionFlags, BankFlags)
    for f in dataclasses.fields(group)
    if f.name not in _FREE
]


def model_and_diffusion_defaults():
    """Return the default of every flag that `create_model_and_diffusion` takes."""
    return {f.name: f.default for group in (ModelFlags, DiffusionFlags) for f in dataclasses.fields(group)}


class _OneLineParser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}; see --help\n")


def _boolean(text):
    lowered = text.lower()
    if lowered not in ("true", "false", "1", "0", "yes", "no"):
        raise argparse.ArgumentTypeError(f"expected True or False, found {text!r}")
    return lowered in ("true", "1", "yes")


def create_parser(config_class, description):
    """Return an argparse parser with one group per flag class. Flags that are not given stay out of its namespace."""
    parser = _OneLineParser(description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    own = {f.name: f for f in dataclasses.fields(config_class)}
    for group_class in config_class.__mro__[1:-1]:
        group = parser.add_argument_group(group_class.__doc__)
        for f in (own[inherited.name] for inherited in dataclasses.fields(group_class)):
            kind = _boolean if f.type is bool else f.type
            metavar = "True|False" if f.type is bool else None if f.metadata["choices"] else f.name.upper()
            shown = repr(f.default) if f.type is str else f.default
            text = f"{f.metadata['help']} (default: {shown})".replace("%", "%%")
            group.add_argument(f"--{f.name}", type=kind, choices=f.metadata["choices"], metavar=metavar, help=text)
    return parser


def parse_config(config_class, description, arguments=None):
    """Parse flags over a preset over the defaults.

    :return: the config, and the set of flags that were given explicitly.
    """
    given = vars(create_parser(config_class, description).parse_args(arguments))
    preset = PRESETS.get(given.get("preset", ""), {})
    names = {f.name for f in dataclasses.fields(config_class)}
    own = preset.get("train" if config_class is TrainConfig else "sample", {})
    starting = {k: v for k, v in {**preset.get("both", {}), **own}.items() if k in names}
    config = config_class(**{**starting, **given})
    settle(config, set(given))
    return config, set(given)


def settle(config, given):
    """Resolve flags that name the same thing, and refuse values that cannot be meant. Changes `config` in place."""
    if not config.class_cond:
        raise InputError("--class_cond False: this network is conditional; leave the flag out or set it to True")
    if config.predict_xstart:
        if "prediction" in given and config.prediction != "x0":
            raise InputError(
                f"--predict_xstart True is --prediction x0, but --prediction {config.prediction} was given"
            )
        config.prediction = "x0"
    elif {"predict_xstart", "prediction"} <= given and config.prediction == "x0":
        raise InputError("--predict_xstart False contradicts --prediction x0: drop one of them")
    config.predict_xstart = config.prediction == "x0"
    if config.use_fp16 and "precision" in given and config.precision not in ("", "fp16"):
        raise InputError(f"--use_fp16 True is --precision fp16, but --precision {config.precision} was given")
    if not config.use_fp16 and {"use_fp16", "precision"} <= given and config.precision == "fp16":
        raise InputError("--use_fp16 False contradicts --precision fp16: drop one of them")
    if not config.precision or ("use_fp16" in given and "precision" not in given):
        config.precision = "fp16" if config.use_fp16 else "fp32"
    for name, low in (
        ("image_size", 1),
        ("num_classes", 1),
        ("num_channels", 1),
        ("num_res_blocks", 1),
        ("diffusion_steps", 1),
        ("noise_bank_size", 0),
        ("noise_bank_cache", 0),
        ("num_workers", 0),
        ("batch_size", 1),
        ("num_samples", 1),
        ("log_interval", 1),
        ("save_interval", 1),
        ("lr", 0),
        ("weight_decay", 0),
        ("total_steps", 0),
        ("lr_anneal_steps", 0),
        ("lr_warmup_steps", 0),
        ("eval_interval", 0),
        ("eval_items", 1),
        ("patience", 0),
        ("min_delta", 0),
        ("preview_items", 0),
        ("preview_steps", 1),
        ("s", 1),
        ("stop_tol", 0),
        ("stop_patience", 1),
        ("stop_min_steps", 1),
        ("panel_items", 0),
        ("candidates", 1),
        ("feedback_steps", 0),
        ("step_candidates", 1),
        ("step_atoms", 1),
        ("selected_steps", 0),
        ("tail_steps", 0),
        ("keep_checkpoints", 0),
        ("save_failures", 1),
        ("label_memory", 0),
    ):
        if not getattr(config, name, low) >= low:
            raise InputError(f"--{name} {getattr(config, name)}: must be at least {low}")
    if getattr(config, "microbatch", -1) < 1 and getattr(config, "microbatch", -1) != -1:
        raise InputError(f"--microbatch {config.microbatch}: must be at least 1, or -1 for the whole batch")
    if not math.isfinite(getattr(config, "label_memory", 0)):
        raise InputError(f"--label_memory {config.label_memory}: expected a number of GiB")
    if config.num_classes > 256:
        raise InputError(f"--num_classes {config.num_classes}: label maps have 8 bits, so at most 256 classes")
    for name in ("drop_rate", "dropout", "eta"):
        if not 0 <= getattr(config, name, 0) <= 1:
            raise InputError(f"--{name} {getattr(config, name)}: must be between 0 and 1")
    for name in ("seed", "noise_bank_seed"):
        if not -(2**63) <= getattr(config, name) < 2**63:
            raise InputError(f"--{name} {getattr(config, name)}: must fit in 64 bits")

    if isinstance(config, SampleConfig):
        _settle_sampler(config, given)
        _settle_link(config, given)
    else:
        _check_nominal_snr(config.snr)


def _settle_sampler(config, given):
    both = {"sampler", "use_ddim"} <= given and config.sampler
    if both and config.use_ddim and config.sampler != "ddim":
        raise InputError(f"--use_ddim True is --sampler ddim, but --sampler {config.sampler} was given")
    if both and not config.use_ddim and config.sampler == "ddim":
        raise InputError("--use_ddim False contradicts --sampler ddim: drop one of them")
    if not config.sampler or ("use_ddim" in given and "sampler" not in given):
        config.sampler = "ddim" if config.use_ddim else "ddpm"
    config.use_ddim = config.sampler == "ddim"


def _check_nominal_snr(snr):
    if not snr >= 1:
        raise InputError(f"--snr {snr:g}: GESCO's table covers 1 dB to 100 dB (no noise); choose a value in that range")


def parts_of(text):
    """Split a flag's value at its commas."""
    return [part.strip() for part in str(text).split(",") if part.strip()]


def _settle_link(config, given):
    for name, choices in (("link", LINKS), ("pool", POOLS), ("metrics", METRICS), ("baseline", CODECS)):
        parts = parts_of(getattr(config, name))
        odd = [part for part in parts if part not in choices]
        if odd or (not parts and name in ("link", "pool")):
            raise InputError(f"--{name} {odd[0] if odd else repr('')}: choose from {', '.join(choices)}")
    try:
        snrs = [float(part) for part in parts_of(config.snr)]
    except ValueError:
        raise InputError(f"--snr {config.snr}: expected dB, or several values separated by commas") from None
    if not snrs or not all(map(math.isfinite, snrs)):
        raise InputError(f"--snr {config.snr}: expected at least one finite value in dB")
    if config.role == "link" and "analog" in parts_of(config.link):
        for snr in snrs:
            _check_nominal_snr(snr)
    if not 0.2 <= config.code_rate <= 0.95:
        raise InputError(f"--code_rate {config.code_rate:g}: 5G LDPC codes have rates from 0.2 to 0.95")
    if config.role == "receive" and not config.messages:
        raise InputError("--role receive needs --messages: the folder with the .dgo files of --role transmit")
    if config.role != "link" and len(points(config)) > 1:
        raise InputError(
            f"--role {config.role}: one run makes one set of messages; drop the lists of --link, --pool and --snr"
        )
    _settle_selection(config)
    if "noise_bank_size" in given:
        check_bank(config, given)


def _settle_selection(config):
    index = config.noise_index
    if config.selection == "both" and index == "random":
        config.noise_index = index = "best"
    if config.selection == "per_step" and index != "random":
        raise InputError(f"--selection per_step starts from entry 0; for --noise_index {index} set --selection both")
    if index not in ("random", "best") and not (index.isascii() and index.isdecimal()):
        raise InputError(f"--noise_index {index}: expected random, best or a number")
    if config.selection == "initial":
        return
    if config.step_atoms > config.step_candidates:
        raise InputError(f"--step_atoms {config.step_atoms}: more than --step_candidates {config.step_candidates}")
    if config.sampler == "dpm++" or (config.sampler == "ddim" and config.eta != 1):
        found = config.sampler if config.sampler == "dpm++" else f"{config.eta:g}"
        raise InputError(f"--selection {config.selection} needs ancestral sampling, or DDIM with --eta 1 (not {found})")
    if config.stop_tol:
        raise InputError(f"--selection {config.selection}: the steps to choose noise for are fixed; drop --stop_tol")


def check_bank(config, given):
    """Refuse flags that ask for more than the noise bank has; to be called once the bank's size is known."""
    index, size = config.noise_index, config.noise_bank_size
    if index not in ("random", "best") and size and int(index) >= size:
        raise InputError(f"--noise_index {index}: expected random, best or a number from 0 to {size - 1}")
    if size == 0:
        if index == "best" or config.selection != "initial":
            raise InputError("--noise_bank_size 0: noise selection needs a noise bank")
        if config.role != "link" or parts_of(config.link) != ["analog"]:
            raise InputError(
                "--noise_bank_size 0: a message names its noise by a bank index; only --link analog works without"
            )
        return
    for name in ("candidates", "step_candidates"):
        if name in given and getattr(config, name) > size:
            raise InputError(f"--{name} {getattr(config, name)}: the noise bank has {size} entries")
        setattr(config, name, min(getattr(config, name), size))
    if config.selection != "initial" and config.step_atoms > config.step_candidates:
        raise InputError(f"--step_atoms {config.step_atoms}: the noise bank has {size} entries")


def points(config):
    """Return a copy of a sampling config for each link, pool and SNR that it lists, each with a folder of its own.

    A single point keeps the folder; in the copies `snr` is a float.
    """
    snrs = dict.fromkeys(float(part) for part in parts_of(config.snr))  # each once
    found = []
    for link in dict.fromkeys(parts_of(config.link)):
        pools = dict.fromkeys(parts_of(config.pool)) if link == "analog" else ["None"]
        found += itertools.product([link], pools, snrs if link != "ideal" else [math.inf])
    return [
        dataclasses.replace(
            config,
            link=link,
            pool=pool,
            snr=snr,
            results_path=_point_folder(config.results_path, link, pool, snr, len(found) == 1),
        )
        for link, pool, snr in found
    ]


def _point_folder(root, link, pool, snr, single):
    if single:
        return root
    words = [
        link,
        *([pool] if pool != "None" else []),
        *([f"{snr!r}dB".replace(".0dB", "dB")] if math.isfinite(snr) else []),
    ]
    return os.path.join(root, "_".join(words))


def adopt_training_config(config, given, trained, path, also=()):
    """Take from a checkpoint's config.json what training fixed. Changes `config` in place.

    :param trained: dict read from config.json.
    :param also: further names to take over.
    :return: a line for each flag of source coding that differs from training's.
    :raises InputError: a flag was given with another value (the message names both), or the file holds an invalid one.
    """
    # What training saw before these flags were there.
    trained = {"label_scale": 1, "edge_levels": 256, "edge_threshold": 0.3, "edge_scale": 1, **trained}
    choices = {f.name: f.metadata["choices"] for f in dataclasses.fields(config)}
    source, differing = {f.name for f in dataclasses.fields(SourceFlags)}, []
    for name in [*FIXED_BY_TRAINING, *source, *also]:
        if name not in trained:
            continue
        value, asked = trained[name], getattr(config, name)
        if type(value) is not type(asked) or (choices[name] and value not in choices[name]):
            raise InputError(f"{path}: {name} is {value!r}, which this flag does not take; restore the file")
        if name in given and name in source:
            if asked != value:
                differing.append(f"--{name} {asked} is not what the checkpoint was trained with ({value}, {path})")
            continue
        if name in given and asked != value:
            raise InputError(
                f"--{name} {asked} contradicts the checkpoint, trained with {value} ({path}); drop the flag"
            )
        setattr(config, name, value)
    settle(config, given - {"prediction", "predict_xstart", "precision", "use_fp16"})
    return sorted(differing)


def adopt_resumed(config, given):
    """Take over what the config.json of a run to be resumed fixes. Changes `config` in place.

    :return: one line for every other training flag that differs from the earlier run's.
    :raises InputError: a flag contradicts what the checkpoint fixes.
    """
    resumed = config.resume_checkpoint
    folder = config.checkpoint_dir if resumed == "auto" else os.path.dirname(resumed)
    path = os.path.join(folder, "config.json")
    if not resumed or not os.path.exists(path) or not glob.glob(os.path.join(glob.escape(folder), "model*.pt")):
        return []
    trained = load_config(path)
    lines = adopt_training_config(
        config, given, trained, path, also=("use_kl", "rescale_learned_sigmas", "timestep_respacing")
    )
    watched = {f.name for group in (TrainFlags, ChannelFlags, DataFlags) for f in dataclasses.fields(group)}
    watched |= {"precision", "dropout"}
    watched -= {
        "resume_checkpoint",
        "resume_partial",
        "checkpoint_dir",
        "total_steps",
        "num_workers",
        "batch_size",
        "cache_dir",
    }
    changed = [name for name in sorted(watched & trained.keys()) if getattr(config, name) != trained[name]]
    return lines + [
        f"resuming with --{name} {getattr(config, name)}; the earlier run had {trained[name]}" for name in changed
    ]


def print_config(config):
    """Print the configuration as JSON to standard output."""
    print(json.dumps(dataclasses.asdict(config), indent=1))


def _digest(values):
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def save_config(config, path):
    """Write the config as JSON, with a digest that tells a damaged file from a good one."""
    values = dataclasses.asdict(config)
    with atomic_write(path) as f:
        f.write(json.dumps(values | {"sha256": _digest(values)}, indent=1) + "\n")


def load_config(path):
    """Read a config.json. Returns a dict.

    :raises InputError: it is unreadable, no JSON object, or not as `save_config` wrote it (older files have no digest).
    """
    try:
        with open(path) as f:
            values = json.loads(f.read(MAX_CONFIG_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read as a configuration ({error}); restore it or move it away") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(values).__name__}; restore it or move it away")
    if values.pop("sha256", None) not in (None, _digest(values)):
        raise InputError(
            f"{path}: differs from its SHA-256, so it is damaged or was edited; restore it, or remove the line"
            ' "sha256" to use it as it is'
        )
    return values
