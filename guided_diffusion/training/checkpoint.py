"""Checkpoint files: names, whole writes, safe reads, and which of them are kept.

A checkpoint of step N is model{N}.pt, ema_{rate}_{N}.pt (plain state dicts, as SDM loads them), opt{N}.pt,
state{N}.pt (everything else that resuming needs) and manifest{N}.json, whose presence marks a checkpoint saved whole.
"""

import math
import os
import re
import warnings
from contextlib import ExitStack, suppress
from pathlib import Path

import torch

from ..console import InputError
from ..diffusion.unet import ResBlock, SPADEGroupNorm, SPADEResBlock
from ..files import atomic_write
from .manifest import (
    EMA_FILE,
    PARTS,
    HashedWriter,
    contents_problem,
    file_name,
    manifest_name,
    manifest_text,
    problem_of,
    read_manifest,
    saved_steps,
    unfinished_text,
    weights_entry,
)
from .safe_reading import check_contents

# GESCO and Diff-GO-n files carry an unused SPADE over 3 label channels in every encoder block.
LEGACY_KEY = re.compile(r"input_blocks\.\d+\.\d+\.spade_norm\.")
TEMPORARY_FILE = re.compile(
    r"(?:(?:model|opt|state|ema_.+_)\d{6,}\.pt|manifest\d{6,}\.json|config\.json|progress\.csv)(?:\.[0-9a-f]{8})?\.tmp"
)


def save_parts(directory, step, parts, facts=None):
    """Write the parts of a checkpoint and its manifest, whole or not at all.

    Every file is written under a temporary name before the first takes its own; the manifest is renamed last. So a save that
    fails frees what it took and leaves every earlier file, and one that is killed leaves a step that is not taken for whole
    (also where that step was whole before, if it dies between two renames: do not save again what is saved).

    :param parts: dict from kind ("model", "ema_0.9999_", "opt", "state") to what torch.save takes.
    :param facts: what the manifest shall note besides: {"config": flags, "val_score": float or None}.
    :raises OSError: naming the file that could not be written.
    """
    directory, entries, writer = Path(directory), {}, None
    path = directory / manifest_name(step)
    try:
        with ExitStack() as files:  # closes, and so renames, in the opposite order
            manifest = files.enter_context(atomic_write(path))
            opened = {}
            for kind in sorted(parts, key=lambda kind: kind != "state"):
                path = directory / file_name(kind, step)
                opened[kind] = files.enter_context(atomic_write(path, "wb"))
            for kind, contents in parts.items():
                path = directory / file_name(kind, step)
                writer = HashedWriter(opened[kind])
                torch.save(contents, writer)
                opened[kind].flush()
                os.fsync(opened[kind].fileno())  # a disk may say only now that it is full
                entries[path.name] = writer.entry()
            path = directory / manifest_name(step)
            manifest.write(manifest_text(step, entries, facts))
            manifest.flush()
            os.fsync(manifest.fileno())
            if not path.exists():  # tells what is cut short from here on from what an older version left
                with atomic_write(path) as f:
                    f.write(unfinished_text(step))
    except (OSError, RuntimeError) as error:
        reason = (writer and writer.error) or error
        raise OSError(f"{path}: cannot be written ({reason}); free space or change --checkpoint_dir") from None


def load_file(path, entry=None):
    """Read what torch.save wrote, without running code from the file, or taking more memory than the file's size.

    :param entry: its manifest's entry, which it must equal; None: not verified.
    :raises InputError: naming the file.
    """
    try:
        with open(path, "rb") as f, warnings.catch_warnings():
            problem = contents_problem(f, Path(path).name, entry) if entry else ""
            if problem:
                raise InputError(f"{path}: it is damaged ({problem}); restore it, or use another checkpoint")
            check_contents(f)
            f.seek(0)
            warnings.simplefilter("ignore")  # torch remarks on odd pickles before it refuses them
            return torch.load(f, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; check --model_path or --resume_checkpoint") from None
    except Exception as error:  # damaged and refused files raise many kinds
        reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
        raise InputError(f"{path}: cannot be read as a checkpoint of plain tensors ({reason})") from None


def check_weights(model, weights, where):
    """Return a state dict without the family's unused keys, after checking that it fits a model.

    :param where: the file's name, for messages.
    :raises InputError: naming the first missing, unexpected or differently shaped key.
    """
    if not isinstance(weights, dict) or not all(isinstance(key, str) for key in weights):
        raise InputError(f"{where}: expected a state dict, found {type(weights).__name__}")
    weights = {key: value for key, value in weights.items() if not LEGACY_KEY.match(key)}
    own = model.state_dict()
    for problem, keys in (("missing", own.keys() - weights.keys()), ("unexpected", weights.keys() - own.keys())):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise InputError(f"{where}: {problem} key {min(keys)}{more}; do the network's flags match the file?")
    for key, value in weights.items():
        if not torch.is_tensor(value) or value.shape != own[key].shape:
            found = tuple(value.shape) if torch.is_tensor(value) else type(value).__name__
            raise InputError(f"{where}: key {key} has shape {found}, the network expects {tuple(own[key].shape)}")
    return weights


def load_weights(model, weights):
    """Load a state dict of the guided-diffusion family into a model.

    A model on the meta device takes over the tensors of the state dict themselves: no time goes into initial values, and
    no memory into a copy.

    :param model: the network; its own precision is kept.
    :param weights: a state dict, or the path of a file with one (read with weights_only; one that a manifest beside it
        lists must be as it was written).
    :raises InputError: naming the first missing, unexpected or differently shaped key, or the damaged file. The unused
        `input_blocks.*.spade_norm.*` of GESCO and Diff-GO-n files are ignored.
    """
    where = "state dict"
    if not isinstance(weights, dict):
        where, weights = str(weights), load_file(weights, weights_entry(weights))
    weights, own = check_weights(model, weights, where), model.state_dict()
    weights = {key: value.to(own[key].dtype) for key, value in weights.items()}
    model.load_state_dict(weights, assign=any(value.is_meta for value in own.values()))


def with_legacy_keys(weights, model):
    """Return a state dict with the zero spade_norm tensors that GESCO's and Diff-GO-n's own loaders insist on."""
    weights = dict(weights)
    for name, block in model.input_blocks.named_modules():
        if isinstance(block, ResBlock) and not isinstance(block, SPADEResBlock):
            channels = block.in_layers[0].num_channels
            with torch.device("meta"):  # for the shapes alone: initial values would shift torch's global stream
                norm = SPADEGroupNorm(channels, 3, 1)
            for key, value in norm.state_dict().items():
                weights[f"input_blocks.{name}.spade_norm.{key}"] = torch.zeros(value.shape)
    return weights


def prune_checkpoints(directory, keep):
    """Delete older checkpoints; return the steps that were removed, oldest first.

    Kept are the newest `keep` whole ones (by the sizes of their files), the whole one with the lowest "val_score" in its
    manifest, every step that is newer than these, and steps without a readable manifest. A manifest is deleted last, so
    that the next call finishes a deletion that was interrupted.

    :param keep: at least 1; 0 deletes nothing.
    """
    if not keep:
        return []
    manifests = {}
    for step in sorted(saved_steps(directory, ["manifest"])):
        with suppress(InputError):
            manifests[step] = read_manifest(directory, step)
    whole = [step for step in manifests if not problem_of(directory, step, digests=False)]
    scores = {step: manifests[step].get("val_score") for step in whole}
    scored = [step for step in whole if scores[step] is not None and math.isfinite(scores[step])]
    kept = {*whole[-keep:], *([min(reversed(scored), key=scores.get)] if scored else [])}
    removed = [step for step in manifests if step < max(whole, default=0) and step not in kept]
    for step in removed:
        averages = [path for path in Path(directory).glob(f"ema_*_{step:06d}.pt") if EMA_FILE.fullmatch(path.name)]
        for path in (*(Path(directory) / file_name(kind, step) for kind in PARTS), *averages):
            path.unlink(missing_ok=True)
        (Path(directory) / manifest_name(step)).unlink()
    return removed


def sweep_temporary_files(directory):
    """Remove what a killed run left half-written."""
    for path in Path(directory).glob("*.tmp"):
        if TEMPORARY_FILE.fullmatch(path.name):
            path.unlink(missing_ok=True)


def load_parts(directory, step, ema_rates, partial=False, take=None):
    """Read all parts of one checkpoint, the model first, each verified by the manifest where there is one.

    :param partial: go on without the parts other than the model that are missing or damaged.
    :param take: function (kind, contents) that is given each part as it comes, so that only one is in memory at a time.
    :return: dict from kind to contents, empty with `take`; and the list of the file names that were missing or damaged.
    :raises InputError: naming the missing or damaged file.
    """
    parts, missing = {}, []
    take = take or parts.__setitem__
    entries = _entries(directory, step, partial)
    for kind in ["model", "opt", "state", *(f"ema_{rate}_" for rate in ema_rates)]:
        path = Path(directory) / file_name(kind, step)
        unlisted = entries is not None and path.name not in entries  # left over from another save
        if kind != "model" and (unlisted or not path.exists()):
            missing.append(path.name)
            continue
        try:
            contents = load_file(path, (entries or {}).get(path.name))
        except InputError:
            if kind == "model" or not partial:
                raise
            missing.append(path.name)
        else:
            take(kind, contents)
    if missing and not partial:
        raise InputError(
            f"{directory}: checkpoint {step} lacks {', '.join(missing)}; restore them, or start those parts afresh"
            " with --resume_partial True"
        )
    return parts, missing


def _entries(directory, step, partial):
    try:
        manifest = read_manifest(directory, step)
    except InputError:
        if not partial:
            raise
        manifest = None
    return None if manifest is None else manifest["files"]
