"""Checkpoints: named parts saved and loaded by one loop, whole or not at all; which are kept, resumed and sampled.

A checkpoint of step N is model{N}.pt, ema_{rate}_{N}.pt (plain state dicts, as SDM loads them), opt{N}.pt, state{N}.pt
(all else that resuming needs) and manifest{N}.json: {"step", "files": {name: {"bytes", "sha256"}}, "val_score",
"sha256"}, the last one being that of the text without it. The model is renamed last: a step is there if its model is.
"""

import hashlib
import io
import json
import math
import os
import re
from contextlib import ExitStack
from pathlib import Path

import torch

from ..config import load_config
from ..console import InputError
from ..diffusion.unet import ResBlock, SPADEGroupNorm, SPADEResBlock
from ..files import WEIGHTS, atomic_write, file_digest, is_archive, read_archive

# GESCO and Diff-GO-n files carry an unused SPADE over 3 label channels in every encoder block.
LEGACY_KEY = re.compile(r"input_blocks\.\d+\.\d+\.spade_norm\.")
MODEL_FILE = re.compile(r"model(\d{6,})\.pt")
STEP_FILE = re.compile(r"(?:model|manifest)(\d{6,})\.(?:pt|json)")
EMA_FILE = re.compile(r"ema_((?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)_(\d{6,})\.pt")  # rate, step


def file_name(kind, step):
    """Return the file name of one part, such as file_name("opt", 12) -> "opt000012.pt"."""
    return f"manifest{step:06d}.json" if kind == "manifest" else f"{kind}{step:06d}.pt"


def manifest_text(contents):
    """Return the text of a manifest: JSON, with its own SHA-256 as the last entry."""
    plain = json.dumps(contents, indent=1)
    return json.dumps({**contents, "sha256": hashlib.sha256(plain.encode()).hexdigest()}, indent=1) + "\n"


def read_manifest(path, lenient=False):
    """Return a manifest's contents, {} where there is none; if it is not as written InputError, or {} if `lenient`."""
    try:
        text = path.read_text()
        contents = json.loads(text)
        del contents["sha256"]
        if text != manifest_text(contents) or path.name != file_name("manifest", contents["step"]):
            raise ValueError("it is not as it was written")
        return contents
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        if lenient:
            return {}
        raise InputError(f"{path}: the manifest cannot be read ({str(error)[:100]}); use another checkpoint") from None


def listed_files(directory, step, lenient=False):
    """Return the "files" of a step's manifest; see `read_manifest`."""
    return read_manifest(Path(directory) / file_name("manifest", step), lenient).get("files", {})


def _manifests(directory):
    """Return the readable manifests of a folder: dict from step to contents, oldest first."""
    found = (read_manifest(path, lenient=True) for path in Path(directory).glob("manifest*.json"))
    return dict(sorted((manifest["step"], manifest) for manifest in found if manifest))


def file_problem(path, listed, digests=True):
    """Say how a file differs from what a manifest lists, "" if it does not; without `digests` by its size alone."""
    if path.name not in listed:
        return f"no readable manifest lists {path.name}"
    entry = listed[path.name]
    try:
        size = path.stat().st_size
        if size != entry["bytes"]:
            return f"{path.name} has {size:,} bytes, the manifest says {entry['bytes']:,}"
        differs = digests and file_digest(path).hex() != entry["sha256"]
        return f"{path.name} differs from its SHA-256" if differs else ""
    except OSError as error:
        return f"{path.name} is missing or cannot be read ({error.strerror})"


def problem_of(directory, step, partial=False, digests=True):
    """Say what keeps a checkpoint from being whole, such as "it has no manifest"; "" if it is whole.

    :param partial: be content with the model, but not with one that differs from its manifest.
    :param digests: read every file, and compare its SHA-256; False looks at sizes alone.
    """
    try:
        listed = listed_files(directory, step, partial)
    except InputError as error:
        return str(error)
    if not listed and not partial:
        return "it has no manifest"
    needed = listed.keys() & {file_name("model", step)} if partial else listed
    problems = (file_problem(Path(directory) / name, listed, digests) for name in needed)
    return next(filter(None, problems), "")


def save_checkpoint(directory, step, parts, val_score=None):
    """Write the parts of a checkpoint and its manifest, whole or not at all.

    All files are written under temporary names before the first is renamed: a save that fails leaves the earlier ones.

    :param parts: dict from kind ("model", which comes first, "ema_0.9999_", "opt", "state") to an object with
        state_dict().
    :param val_score: what the manifest notes besides; the checkpoint of the lowest one is kept.
    :raises OSError: naming the file that could not be written.
    """
    first, *others = parts
    listed, path = {}, Path(directory)
    try:
        with ExitStack() as stack:  # closes, and so renames, in the opposite order
            paths = {kind: Path(directory) / file_name(kind, step) for kind in (first, "manifest", *others)}
            files = {kind: stack.enter_context(atomic_write(path, "wb")) for kind, path in paths.items()}
            for kind, part in parts.items():
                path = paths[kind]
                torch.save(part.state_dict(), files[kind])
                _flush(files[kind])
                listed[path.name] = {"bytes": files[kind].tell(), "sha256": file_digest(files[kind].name).hex()}
            path = paths["manifest"]
            files["manifest"].write(manifest_text({"step": step, "files": listed, "val_score": val_score}).encode())
            _flush(files["manifest"])
    except (OSError, RuntimeError) as error:
        cause = error.__context__ or error  # torch reports a failed write as an error of its own
        reason = getattr(cause, "strerror", None) or cause
        raise OSError(f"{path}: cannot be written ({reason}); free space or change --checkpoint_dir") from None


def _flush(f):
    f.flush()
    os.fsync(f.fileno())  # a disk may say only now that it is full


def prune_checkpoints(directory, keep):
    """Delete older checkpoints.

    Kept are the newest `keep` whole ones (0: all), the whole one of the lowest "val_score", all newer steps, and those
    without a readable manifest. Manifests are deleted last: the next call finishes a deletion that was interrupted.
    """
    manifests = _manifests(directory) if keep else {}
    whole = [step for step in manifests if not problem_of(directory, step, digests=False)]

    def score(step):
        found = manifests[step]["val_score"]
        return found if found is not None and math.isfinite(found) else math.inf

    kept = {*whole[-keep:], min(reversed(whole), key=score, default=None)}
    for step in [step for step in manifests if step < max(whole, default=0) and step not in kept]:
        for name in [*manifests[step]["files"], file_name("manifest", step)]:
            (Path(directory) / name).unlink(missing_ok=True)


def remove_temporary_files(directory):
    """Remove what a killed run left half-written (by `atomic_write`)."""
    for path in Path(directory).glob(f"*.{8 * '[0-9a-f]'}.tmp"):
        path.unlink(missing_ok=True)


def load_file(path, listed=None):
    """Read a file of torch.save without running code from it. Raises InputError, which does not name the path.

    :param listed: the files of its manifest; empty: not verified.
    """
    problem = file_problem(path, listed) if listed else ""
    if problem:
        raise InputError(f"it is damaged: {problem}")
    try:
        source = io.BytesIO(read_archive(path, WEIGHTS)) if is_archive(path) else path
        return torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged and refused files raise many kinds
        reason = f"{type(error).__name__}: {str(error).strip()}".split("\n")[0][:200]
        raise InputError(f"it cannot be read as plain tensors ({reason}); copy it again") from None


def restore_checkpoint(directory, step, parts, partial=False):
    """Load each part of a checkpoint into its object, one at a time, verified by the manifest where there is one.

    :param parts: dict from kind to an object with load_state_dict().
    :param partial: leave out parts other than the model that are missing, damaged, or do not fit.
    :return: the kinds that were left out.
    :raises InputError: naming the file.
    """
    listed, missing = listed_files(directory, step, partial), []
    for kind, part in parts.items():
        path, contents = Path(directory) / file_name(kind, step), None
        try:
            contents = load_file(path, listed)
            part.load_state_dict(contents)
        except (KeyError, RuntimeError, ValueError, AttributeError, TypeError) as error:
            contradicted = isinstance(error, InputError) and contents is not None  # by a flag
            if kind == "model" or not partial or contradicted:
                problem = error if isinstance(error, InputError) else f"it does not fit this run ({error})"
                hint = "" if contradicted else "; use another, or go on from the model alone by --resume_partial True"
                raise InputError(f"{path}: {problem}{hint}") from None
            missing.append(kind)
    return missing


def saved_steps(directory):
    """Return the set of steps of which a folder holds a model, or a manifest whose model was lost after its save."""
    names = {path.name for path in Path(directory).glob("m*")}
    steps = {int(match[1]) for match in map(STEP_FILE.fullmatch, names) if match}
    cut_short = {step for step in steps if any(name.startswith(f"{file_name('model', step)}.") for name in names)}
    return {step for step in steps if file_name("model", step) in names or step not in cut_short}


def resume_point(directory, asked, partial=False, log=lambda line: None):
    """Return (folder, step) to resume from, or None to start afresh; never a start that would overwrite another run.

    :param directory: the run's --checkpoint_dir.
    :param asked: --resume_checkpoint: "", "auto" (the newest whole checkpoint), or the path of a model file.
    :param partial, log: see `problem_of`; function of a line, for newer steps that are damaged.
    :raises InputError: the folder holds a run and nothing was asked for, nothing is whole, or there are later steps.
    """
    steps = sorted(saved_steps(directory), reverse=True)
    if not steps and asked in ("", "auto"):
        return None
    latest = steps[0] if steps else -1
    if not asked:
        hint = "go on with --resume_checkpoint auto, or choose another folder"
        raise InputError(f"--checkpoint_dir {directory} holds a run that reached step {latest}: {hint}")
    for step in steps if asked == "auto" else ():
        problem = problem_of(directory, step, partial)
        if not problem:
            return str(directory), step
        log(f"checkpoint {step} in {directory} is damaged or incomplete ({problem}); looking for an older one")
    if asked == "auto":
        hint = "restore one" if partial else "restore one, or use --resume_partial True"
        raise InputError(f"--checkpoint_dir {directory}: no checkpoint is whole; {hint}")
    match = MODEL_FILE.fullmatch(Path(asked).name)
    if not match or not Path(asked).exists():
        found = "no such file" if match else "expected a file called model<step>.pt, or auto"
        raise InputError(f"--resume_checkpoint {asked}: {found}")
    folder, step = Path(asked).parent, int(match[1])
    same = folder.resolve() == Path(directory).resolve()
    if steps and (not same or latest > step):
        found = f"steps up to {latest}" if same else f"another run (step {latest})"
        hint = "choose an empty folder to branch off into"
        raise InputError(f"--checkpoint_dir {directory} already holds {found}: {hint}")
    problem = problem_of(folder, step, partial)
    if problem:
        hint = "use an older one (auto finds the newest whole one), or go on from its model with --resume_partial True"
        raise InputError(f"--resume_checkpoint {asked}: it is damaged or incomplete ({problem}); {hint}")
    return str(folder), step


def check_weights(model, weights):
    """Return a state dict without GESCO's unused keys. Raises InputError naming the first key that differs."""
    if not isinstance(weights, dict) or not all(isinstance(key, str) for key in weights):
        raise InputError(f"expected a state dict, found {type(weights).__name__}")
    weights = {key: value for key, value in weights.items() if not LEGACY_KEY.match(key)}
    own = model.state_dict()
    for problem, keys in (("missing", own.keys() - weights.keys()), ("unexpected", weights.keys() - own.keys())):
        if keys:
            raise InputError(f"{problem} key {min(keys)} ({len(keys)} in all); do the network's flags match the file?")
    for key, value in weights.items():
        found = tuple(value.shape) if torch.is_tensor(value) else type(value).__name__
        if found != tuple(own[key].shape):
            raise InputError(f"key {key} has shape {found}, the network expects {tuple(own[key].shape)}")
    return weights


def load_weights(model, weights):
    """Load a state dict of the guided-diffusion family into a model, keeping the model's own precision.

    A model on the meta device takes over the tensors themselves, without initial values and without a copy.

    :param weights: a state dict, or the path of a file with one, which must be as a manifest beside it says.
    :raises InputError: naming the damaged file, or the first missing, unexpected or differently shaped key. The unused
        `input_blocks.*.spade_norm.*` of GESCO and Diff-GO-n files are ignored.
    """
    where = "state dict" if isinstance(weights, dict) else str(weights)
    try:
        if not isinstance(weights, dict):
            path = Path(weights)
            match = MODEL_FILE.fullmatch(path.name) or EMA_FILE.fullmatch(path.name)
            weights = load_file(path, listed_files(path.parent, int(match[match.lastindex])) if match else None)
        weights = check_weights(model, weights)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    own = model.state_dict()
    weights = {key: value.to(own[key].dtype) for key, value in weights.items()}
    model.load_state_dict(weights, assign=any(value.is_meta for value in own.values()))


def with_legacy_keys(weights, model):
    """Return a state dict with the zero spade_norm tensors that GESCO's and Diff-GO-n's own loaders insist on."""
    weights = dict(weights)
    for name, block in model.input_blocks.named_modules():
        if isinstance(block, ResBlock) and not isinstance(block, SPADEResBlock):
            with torch.device("meta"):  # for the shapes alone: initial values would shift torch's global stream
                norm = SPADEGroupNorm(block.in_layers[0].num_channels, 3, 1)
            for key, value in norm.state_dict().items():
                weights[f"input_blocks.{name}.spade_norm.{key}"] = torch.zeros(value.shape)
    return weights


def find_weights(model_path, may_lack=False, log=lambda line: None, hint=""):
    """Return the weights file that --model_path means: the file itself, or the newest whole EMA file of a folder.

    :param may_lack, log: do not insist that it exists (dry runs); function of a line, for newer, damaged averages.
    :param hint: what else to do where there is none.
    """
    if os.path.isdir(model_path):
        return _newest_average(Path(model_path), log)
    if may_lack or os.path.exists(model_path):
        return model_path
    found = "no such file" if model_path else "none is given (begin with --preset toy)"
    raise InputError(f"--model_path {model_path}: {found}; name a .pt file, or a folder with checkpoints{hint}")


def _newest_average(directory, log):
    """Return the newest whole EMA file, of several rates the highest; folders without any manifest are trusted."""
    listed = {name: entry for manifest in _manifests(directory).values() for name, entry in manifest["files"].items()}
    foreign = not any(directory.glob("manifest*.json"))
    names = {*listed, *(path.name for path in directory.glob("ema_*.pt"))}  # a listed file may be lost
    found = [(int(match[2]), float(match[1]), match[0]) for match in map(EMA_FILE.fullmatch, names) if match]
    for _, _, name in sorted(found, reverse=True):
        problem = "" if foreign else file_problem(directory / name, listed)
        if not problem:
            return str(directory / name)
        log(f"--model_path {directory}: {problem}; going back to an older average")
    problem = "no ema_*.pt file is whole" if found else "the folder has no ema_*.pt file"
    raise InputError(f"--model_path {directory}: {problem}; train first, or name a file")


def trained_config(weights):
    """Return the flags that a weights file was trained with, and the file that says so: config.json, or {} without."""
    beside = weights if is_archive(weights) else os.path.join(os.path.dirname(weights), "config.json")
    return (load_config(beside) if os.path.exists(beside) else {}), beside
