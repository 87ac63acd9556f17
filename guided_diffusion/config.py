"""Configurations: flags (see `flags`) parsed over presets, resolved, validated, kept as config.json.

Standard library only, so that `--help` answers at once.
"""

import argparse
import dataclasses
import difflib
import glob
import hashlib
import itertools
import json
import math
import os
import sys
from pathlib import Path

from .console import InputError
from .files import CONFIG, atomic_write, is_archive, read_archive
from .flags import PRESETS, DiffusionFlags, ModelFlags, SampleConfig, SharedFlags, TrainConfig

NETWORK_FLAGS = (*dataclasses.fields(ModelFlags), *dataclasses.fields(DiffusionFlags))


def model_and_diffusion_defaults():
    """Return the default of every flag that `create_model_and_diffusion` takes."""
    return {f.name: f.default for f in NETWORK_FLAGS}


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        message = " ".join(message.split())
        message += " ''" * message.endswith("arguments:")  # empty words
        unknown, near = message.removeprefix("unrecognized arguments: ").split()[0].partition("=")[0], []
        if unknown.startswith("--"):
            near = [name for name in self._option_string_actions if name.startswith(unknown)]
            near = near or difflib.get_close_matches(unknown, self._option_string_actions, 1, 0.8)
        hint = f"did you mean {near[0]}? " if near else ""
        raise InputError(f"{message}; {hint}see --help")


def _boolean(text):
    if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
        raise argparse.ArgumentTypeError(f"expected True or False, found {text!r}")
    return text.lower() in ("true", "1", "yes")


def _parser(config_class, doc):
    usage = "%(prog)s [--FLAG VALUE ...]"
    parser = _Parser(usage=usage, description=doc, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    groups = [group for group in config_class.__mro__[1:-1] if group is not SharedFlags]
    for group_class in groups:
        group = parser.add_argument_group(group_class.__doc__)
        for name in group_class.__dataclass_fields__:
            f = config_class.__dataclass_fields__[name]  # which may declare it anew
            choices = None if f.metadata["each"] else f.metadata["choices"]
            metavar = "True|False" if f.type is bool else None if choices else name.upper()
            shown = repr(f.default) if f.type is str else f.default
            listed = f": any of {', '.join(f.metadata['choices'])}" if f.metadata["each"] is str else ""
            text = f"{f.metadata['help']}{listed} (default: {shown})".replace("%", "%%")
            kind = _boolean if f.type is bool else f.type
            group.add_argument(f"--{name}", type=kind, choices=choices, metavar=metavar, help=text)
    return parser


def parse_config(config_class, doc, arguments=None):
    """Parse flags over a preset over the defaults.

    :param doc: the script's description. :param arguments: list of words; None: the command line's.
    :return: the config, resolved and validated, and the set of flags that were given explicitly.
    """
    parser, words = _parser(config_class, doc), sys.argv[1:] if arguments is None else arguments
    explicit = vars(parser.parse_args(words))
    both, *own = PRESETS.get(explicit.get("preset"), ("", "", ""))
    preset = f"{both} {own[config_class is SampleConfig]}".split()
    config, given = config_class(**vars(parser.parse_args([*preset, *words]))), {*explicit}
    resolve(config, given)
    validate(config)
    return config, given


def parts_of(text):
    """Split a flag's value at its commas."""
    return [part.strip() for part in str(text).split(",") if part.strip()]


def numbers(text, name, kind):
    """Return the numbers of a flag's value, which commas separate."""
    try:
        return [kind(part) for part in parts_of(text)]
    except ValueError:
        raise InputError(f"--{name} {text}: expected numbers separated by commas") from None


def check_flag(f, value):
    """Raise InputError unless a value is among the choices, and in the range, of its flag (a dataclass field)."""
    kind, choices, low, high = (f.metadata[word] for word in ("each", "choices", "low", "high"))
    for part in numbers(value, f.name, kind) if kind else [value]:
        if choices and part not in choices:
            raise InputError(f"--{f.name} {part}: choose from {', '.join(map(str, choices))}")
        if (low, high) != (-math.inf, math.inf) and not low <= part <= high:
            allowed = f"at least {low}" if high == math.inf else f"between {low} and {high}"
            raise InputError(f"--{f.name} {value}: must be {allowed}")


def resolve(config, given):
    """Give flags that name the same thing one value. Changes `config` in place."""
    pairs = [("predict_xstart", "prediction", "x0", ""), ("use_fp16", "precision", "fp16", "fp32")]
    if isinstance(config, SampleConfig):
        pairs.append(("use_ddim", "sampler", "ddim", "ddpm"))
    for old, new, value, other in pairs:
        asked, chosen = getattr(config, old), getattr(config, new)
        if {old, new} <= given and chosen and asked != (chosen == value):
            raise InputError(f"--{old} {asked} contradicts --{new} {chosen}: drop one of them")
        if not chosen or (new not in given and (asked or old in given)):
            chosen = value if asked else other or chosen
        setattr(config, new, chosen)
        setattr(config, old, chosen == value)
    if isinstance(config, SampleConfig) and config.selection == "both" and config.noise_index == "random":
        config.noise_index = "best"
    for target, other in (("target_bpp", "target_bytes"), ("target_bytes", "target_bpp")):
        if target in given and other not in given:  # but a preset's
            setattr(config, other, type(getattr(config, other))())


def validate(config):
    """Refuse values that cannot be meant, by InputError."""
    for f in dataclasses.fields(config):
        check_flag(f, getattr(config, f.name))
    for name in {"ema_rate", "link", "pool", "snr", "send"} & vars(config).keys():
        if not parts_of(getattr(config, name)):
            raise InputError(f"--{name} {getattr(config, name)}: give at least one")
    if isinstance(config, SampleConfig):
        _validate_link(config)
        _validate_selection(config)


def _validate_link(config):
    snrs, links = numbers(config.snr, "snr", float), parts_of(config.link)
    if config.role == "link" and "analog" in links and min(snrs) < 1:
        raise InputError(f"--snr {config.snr}: GESCO's table, of --link analog, begins at 1 dB")
    if config.role == "receive" and not config.messages:
        raise InputError("--role receive needs --messages: the folder with the .dgo files of --role transmit")
    if config.role != "link" and len(sweep(config)) > 1:
        found = f"--role {config.role}: one run makes one set of messages"
        raise InputError(f"{found}; drop the lists of --link, --pool and --snr")


def check_adopted(config, given=()):
    """Refuse flags that contradict what the network is, once a checkpoint's config.json has told."""
    if config.color_layer and (config.prediction == "eps" or config.learn_sigma):
        found = f"--prediction {config.prediction} --learn_sigma {config.learn_sigma}"
        raise InputError(f"--color_layer True needs --prediction v or x0 and --learn_sigma False (now {found})")
    if isinstance(config, SampleConfig):
        _check_target(config)
        _check_bank(config, given)


def _check_target(config):
    if config.start_time > config.diffusion_steps:
        raise InputError(f"--start_time {config.start_time}: there are {config.diffusion_steps} --diffusion_steps")
    if config.role == "receive":
        return
    if config.target_bpp and config.target_bytes:
        raise InputError(f"--target_bpp {config.target_bpp:g} and --target_bytes {config.target_bytes}: give one")
    if config.send == "color" and not config.color_layer:
        raise InputError("--send color: this network has no colour layer; send labels")
    zeros = {"label_scale": "labels", "color_step": "color"} if not config.target_bpp + config.target_bytes else {}
    for name, part in zeros.items():
        if part in config.send and getattr(config, name) == 0 and (part == "labels" or config.color_layer):
            raise InputError(f"--{name} 0: a target decides; give --target_bpp or --target_bytes, or another --{name}")


def _validate_selection(config):
    index, selection = config.noise_index, config.selection
    if index not in ("random", "best") and not (index.isascii() and index.isdecimal()):
        raise InputError(f"--noise_index {index}: expected random, best or a number")
    if selection == "per_step" and index != "random":
        raise InputError(f"--selection per_step starts from entry 0; for --noise_index {index} set --selection both")
    ancestral = config.sampler == "ddpm" or (config.sampler == "ddim" and config.eta == 1)
    if selection != "initial" and not ancestral:
        found = f"--sampler {config.sampler} --eta {config.eta:g}"
        raise InputError(f"--selection {selection} needs --sampler ddpm, or ddim with --eta 1 (now {found})")
    if selection != "initial" and config.stop_tol:
        raise InputError(f"--selection {selection}: the steps to choose noise for are fixed; drop --stop_tol")


def _check_bank(config, given):
    index, size = config.noise_index, config.noise_bank_size
    if size == 0:
        if index == "best" or config.selection != "initial":
            raise InputError("--noise_bank_size 0: noise selection needs a noise bank")
        if config.role != "link" or parts_of(config.link) != ["analog"]:
            raise InputError("--noise_bank_size 0: a message names a bank index; only --link analog works without")
        return
    if index not in ("random", "best") and int(index) >= size:
        raise InputError(f"--noise_index {index}: expected random, best or a number from 0 to {size - 1}")
    for name in ("candidates", "step_candidates"):
        if name in given and getattr(config, name) > size:
            raise InputError(f"--{name} {getattr(config, name)}: the noise bank has {size} entries")
        setattr(config, name, min(getattr(config, name), size))
    if config.selection != "initial" and config.step_atoms > config.step_candidates:
        raise InputError(f"--step_atoms {config.step_atoms}: there are {config.step_candidates} --step_candidates")


def sweep(config):
    """Return a copy of a sampling config for each link, pool and SNR (then a float) that it lists.

    Each has a folder of its own for results; a single one keeps that of the config.
    """
    found, snrs = [], dict.fromkeys(map(float, parts_of(config.snr)))  # each once
    for link in dict.fromkeys(parts_of(config.link)):
        pools = dict.fromkeys(parts_of(config.pool)) if link == "analog" else ["None"]
        found += itertools.product([link], pools, snrs if link != "ideal" else [math.inf])
    copies = [dataclasses.replace(config, link=link, pool=pool, snr=snr) for link, pool, snr in found]
    for copy in copies if len(copies) > 1 else ():
        pool = "" if copy.pool == "None" else f"_{copy.pool}"
        snr = f"_{copy.snr!r}dB".replace(".0dB", "dB") if math.isfinite(copy.snr) else ""
        copy.results_path = os.path.join(config.results_path, f"{copy.link}{pool}{snr}")
    return copies


CONDITIONS = {  # name: what holds where it does not, and the condition on a config
    "training": ("sampling has no loss and no backward pass", lambda c: isinstance(c, TrainConfig)),
    "no_snr": ("--snr alone sets the channel in sampling", lambda c: isinstance(c, TrainConfig)),
    "loader": ("sampling loads its pictures in the main process", lambda c: isinstance(c, TrainConfig)),
    "loss_scaling": ("torch's GradScaler has its own growth rule", lambda c: False),
    "whole_pictures": (
        "random crops are cut from the files",
        lambda c: isinstance(c, SampleConfig) or not c.is_train or c.dataset_mode == "cityscapes",
    ),
    "split_batch": ("it is no smaller than the batch", lambda c: c.batch_size > 2 or c.microbatch < c.batch_size),
    "last_step": ("training ends with --lr_anneal_steps", lambda c: not 0 < c.lr_anneal_steps < c.total_steps),
    "selecting": ("nothing is selected", lambda c: c.noise_index == "best" or c.selection != "initial"),
    "no_selecting": ("the local picture is made anyway", lambda c: not _holds("selecting", c)[0]),
    "many_candidates": ("so few candidates all run whole chains", lambda c: c.candidates > 4),
    "bits": ("analog planes have no bits", lambda c: c.role != "link" or {*parts_of(c.link)} - {"analog"}),
    "step_noise": ("no step has noise", lambda c: c.sampler == "ddpm" or (c.sampler == "ddim" and c.eta > 0)),
    "lpips": ("nothing asks for lpips", lambda c: "lpips" in [*parts_of(c.metrics), c.distance]),
    "segmenting": (
        "it belongs to --distance segmenter and --metrics miou",
        lambda c: "miou" in parts_of(c.metrics) or (c.distance == "segmenter" and _holds("selecting", c)[0]),
    ),
}


def _holds(need, config):
    """Return whether one of a flag's needs is met, and what holds where it is not."""
    if need in CONDITIONS:
        reason, condition = CONDITIONS[need]
        return bool(condition(config)), reason
    name, _, values = need.partition("=")
    if not hasattr(config, name):
        return True, ""
    value = getattr(config, name)
    met = {*parts_of(value)} & {*values.split("|")} if values else value
    return bool(met), f"it needs --{name} {values.replace('|', ' or ')}".rstrip() + f" (now {value!r})"


def unused_flags(config, given):
    """Return one line for every explicit flag that changes nothing in this run."""
    lines = []
    for f in dataclasses.fields(config):
        if f.name not in given or getattr(config, f.name) is False:
            continue
        reasons = [reason for met, reason in (_holds(need, config) for need in f.metadata["needs"]) if not met]
        if "message" in f.metadata["fixed_by"] and getattr(config, "role", "") == "receive":
            reasons.insert(0, "with --role receive the message decides")
        if reasons:
            lines.append(f"--{f.name} {getattr(config, f.name)} has no effect: {reasons[0]}")
    return lines


def results_settings(config):
    """Return the flags of a sampling config that identify a results folder, as a dict."""
    fields = [f for f in dataclasses.fields(config) if "sampling" not in f.metadata["free"]]
    return {f.name: getattr(config, f.name) for f in fields}


def surprises(config, given, trained=None):
    """Return lines on edges that GESCO sent, and a clean --snr; `trained` (sampling): its config.json, or {}."""
    lines, own_flags = [], {"image_size", "num_channels"} <= given and "preset" not in given
    foreign = own_flags if trained is None else not trained and config.role != "receive"
    if foreign and "edge_levels" not in given and not config.edge_levels and not config.no_instance:
        there = "was 256 (all of them) in GESCO and Diff-GO-n; --preset gesco sets it"
        lines.append(f"--edge_levels is 0 here (no image edges) and {there}")
    if "analog" in parts_of(getattr(config, "link", "analog")) and max(numbers(config.snr, "snr", float)) > 100:
        lines.append(f"--snr {config.snr}: from 100 dB on GESCO's table has no noise")
    return lines


def adopt_training_config(config, given, trained, source, fixed=("training", "source")):
    """Take from a checkpoint's config.json what training fixed. Changes `config` in place.

    :param trained, source: dict read from config.json, and its path. :param fixed: words of `fixed_by`.
    :return: a line for each flag of source coding that differs from training's.
    :raises InputError: a flag was given with another value (the message names both), or the file holds an invalid one.
    """
    # What training saw before these flags were there.
    before = {"label_scale": 1, "label_smooth": 0, "edge_levels": 256, "edge_threshold": 0.3, "edge_scale": 1}
    differing, trained = [], before | {"color_layer": False, "spade_channels": 128} | trained
    for f in dataclasses.fields(config):
        name, choices, asked = f.name, f.metadata["choices"], getattr(config, f.name)
        if name not in trained or not {*f.metadata["fixed_by"]} & {*fixed}:
            continue
        value = trained[name]
        if type(value) is not type(asked) or (choices and value not in choices):
            raise InputError(f"{source}: {name} is {value!r}, which this flag does not take; restore the file")
        if name not in given:
            setattr(config, name, value)
        elif asked != value and "source" in f.metadata["fixed_by"]:
            differing.append(f"--{name} {asked} is not what the checkpoint was trained with ({value}, {source})")
        elif asked != value:
            raise InputError(f"--{name} {asked} contradicts the checkpoint, trained with {value} ({source}); drop it")
    resolve(config, given - {"prediction", "predict_xstart", "precision", "use_fp16"})
    validate(config)
    return sorted(differing)


def adopt_resumed(config, given):
    """Take over what the config.json of a run to be resumed fixes; return a line for each other flag that differs."""
    resumed = config.resume_checkpoint
    folder = config.checkpoint_dir if resumed == "auto" else os.path.dirname(resumed)
    path = os.path.join(folder, "config.json")
    if not resumed or not os.path.exists(path) or not glob.glob(os.path.join(glob.escape(folder), "model*.pt")):
        return []
    trained = load_config(path)
    lines = adopt_training_config(config, given, trained, path, ("training", "source", "resumed"))
    for f in sorted(dataclasses.fields(config), key=lambda f: f.name):
        value, earlier = getattr(config, f.name), trained.get(f.name)
        compared = "source" not in f.metadata["fixed_by"] and "training" not in f.metadata["free"]
        if compared and f.name in trained and value != earlier:
            lines.append(f"resuming with --{f.name} {value}; the earlier run had {earlier}")
    return lines


def _sha256(values):
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def save_config(config, path):
    """Write the config as JSON, with its SHA-256, which tells a damaged file from a good one."""
    values = dataclasses.asdict(config)
    with atomic_write(path) as f:
        f.write(json.dumps(values | {"sha256": _sha256(values)}, indent=1) + "\n")


def load_config(path):
    """Read a config.json, or an archive's, as a dict.

    :raises InputError: it is not as `save_config` wrote it, nor without a SHA-256.
    """
    try:
        values = dict(json.loads(read_archive(path, CONFIG) if is_archive(path) else Path(path).read_bytes()))
    except (OSError, TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read as a configuration ({error}); restore it or move it away") from None
    if values.pop("sha256", None) not in (None, _sha256(values)):
        hint = 'restore it, or remove the line "sha256" to use it as it is'
        raise InputError(f"{path}: damaged or edited (it differs from its SHA-256); {hint}")
    return values
