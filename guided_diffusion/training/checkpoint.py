"""Checkpoints: named parts saved and loaded by one loop, whole or not at all; which are kept, resumed and sampled.

A checkpoint of step N is model{N}.pt, ema_{rate}_{N}.pt (plain state dicts, as SDM loads them), opt{N}.pt, state{N}.pt
(all else that resuming needs) and, renamed last, manifest{N}.json: {"step", "files": {name: {"bytes", "sha256"}},
"config", "val_score", "sha256"}, the last one being that of the text without it.
"""

import hashlib
import json
import math
import os
import re
import warnings
from contextlib import ExitStack, suppress
from pathlib import Path

import torch

from ..config import load_config
from ..console import InputError
from ..diffusion.unet import ResBlock, SPADEGroupNorm, SPADEResBlock
from ..files import atomic_write, file_digest

# GESCO and Diff-GO-n files carry an unused SPADE over 3 label channels in every encoder block.
LEGACY_KEY = re.compile(r"input_blocks\.\d+\.\d+\.spade_norm\.")
PARTS = ("model", "opt", "state")  # and ema_{rate}_, one or more
STEP_FILE = re.compile(r"(?:model|opt|state|manifest)(\d{6,})\.(?:pt|json)")
EMA_FILE = re.compile(r"ema_((?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)_(\d{6,})\.pt")
UNFINISHED = "its save was cut short"


def file_name(kind, step):
    """Return the file name of one part, such as file_name("opt", 12) -> "opt000012.pt"."""
    return f"manifest{step:06d}.json" if kind == "manifest" else f"{kind}{step:06d}.pt"


def manifest_text(contents):
    """Return the text of a manifest: JSON, with its own SHA-256 as the last entry."""
    plain = json.dumps(contents, indent=1)
    return json.dumps({**contents, "sha256": hashlib.sha256(plain.encode()).hexdigest()}, indent=1) + "\n"


def read_manifest(directory, step):
    """Return a step's manifest, None where it has none. Raises InputError if it is not as it was written."""
    path = Path(directory) / file_name("manifest", step)
    try:
        text = path.read_text()
        contents = json.loads(text)
        del contents["sha256"]
        if text != manifest_text(contents) or contents["step"] != step:
            raise ValueError("it is not as it was written")
        return contents
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: the manifest cannot be read ({str(error)[:100]}); use another checkpoint") from None


def file_problem(path, entry, digests=True):
    """Say how a file differs from its manifest's entry, "" if it does not; without `digests` by its size alone."""
    try:
        size = path.stat().st_size
        if size != entry["bytes"]:
            return f"{path.name} has {size:,} bytes, the manifest says {entry['bytes']:,}"
        differs = digests and file_digest(path).hex() != entry["sha256"]
        return f"{path.name} differs from its SHA-256" if differs else ""
    except OSError as error:
        return f"{path.name} is missing or cannot be read ({error.strerror})"


def problem_of(directory, step, partial=False, digests=True):
    """Say what keeps a checkpoint from being whole, such as "the manifest lists no opt000004.pt"; "" if it is whole.

    :param partial: be content with the model, but not with one that differs from its manifest.
    :param digests: read every file, and compare its SHA-256; False looks at sizes alone.
    """
    directory, model, manifest = Path(directory), file_name("model", step), None
    try:
        manifest = read_manifest(directory, step)
    except InputError as error:
        if not partial:
            return str(error)
    if manifest is None or manifest.get("unfinished"):
        problem = UNFINISHED if manifest else "it has no manifest"
        return "" if partial and (directory / model).exists() else problem
    needed = [model] if partial else [file_name(kind, step) for kind in PARTS] + [*manifest["files"]]
    for name in needed:
        entry = manifest["files"].get(name)
        problem = file_problem(directory / name, entry, digests) if entry else f"the manifest lists no {name}"
        if problem:
            return problem
    return ""


def saved_steps(directory):
    """Return the set of steps of which a folder holds a model, optimizer, state or manifest file."""
    found = (STEP_FILE.fullmatch(path.name) for path in Path(directory).glob("*"))
    return {int(match[1]) for match in found if match}


def _manifests(directory):
    """Return the readable manifests of a folder: dict from step to contents, oldest first."""
    found = {}
    for step in sorted(saved_steps(directory)):
        with suppress(InputError):
            found[step] = read_manifest(directory, step)
    return {step: manifest for step, manifest in found.items() if manifest}


def _manifest_of(path):
    """Return the manifest beside a weights file, {} where there is none."""
    match = re.fullmatch(r"(?:model|ema_.+_)(\d{6,})\.pt", Path(path).name)
    return (read_manifest(Path(path).parent, int(match[1])) if match else None) or {}


class _HashedWriter:
    """A file to write to in sequence that knows size and SHA-256 of what it was given, and the error of a write."""

    def __init__(self, f):
        self.file, self.hash, self.bytes, self.error, self.flush = f, hashlib.sha256(), 0, None, f.flush

    def write(self, data):
        self.hash.update(data)
        self.bytes += len(data)
        try:
            return self.file.write(data)
        except OSError as error:  # torch.save reports it as another one
            self.error = error
            raise


def save_checkpoint(directory, step, parts, facts):
    """Write the parts of a checkpoint and its manifest, whole or not at all.

    All files are written under temporary names before the first is renamed, so a save that fails leaves every earlier
    file. While they are renamed, an unfinished manifest stands in: a step that is cut short is never taken for whole.

    :param parts: dict from kind ("model", "ema_0.9999_", "opt", "state") to an object with state_dict().
    :param facts: what the manifest notes besides: {"config": flags, "val_score": float or None}.
    :raises OSError: naming the file that could not be written.
    """
    directory, entries, writer = Path(directory), {}, None
    path = manifest = directory / file_name("manifest", step)
    try:
        with ExitStack() as files:  # closes, and so renames, in the opposite order: the manifest last
            whole = files.enter_context(atomic_write(manifest))
            for kind, part in parts.items():
                path = directory / file_name(kind, step)
                f = files.enter_context(atomic_write(path, "wb"))
                writer = _HashedWriter(f)
                torch.save(part.state_dict(), writer)
                f.flush()
                os.fsync(f.fileno())  # a disk may say only now that it is full
                entries[path.name] = {"bytes": writer.bytes, "sha256": writer.hash.hexdigest()}
            path = manifest
            whole.write(manifest_text({"step": step, "files": entries, **facts}))
            whole.flush()
            os.fsync(whole.fileno())
            with atomic_write(manifest) as f:
                f.write(manifest_text({"step": step, "files": {}, "unfinished": True}))
    except (OSError, RuntimeError) as error:
        reason = (writer and writer.error) or error
        raise OSError(f"{path}: cannot be written ({reason}); free space or change --checkpoint_dir") from None


def prune_checkpoints(directory, keep):
    """Delete older checkpoints; return the steps that were removed, oldest first.

    Kept are the newest `keep` whole ones (0: all), the whole one of the lowest "val_score", all newer steps, and those
    without a readable manifest. Manifests are deleted last: the next call finishes a deletion that was interrupted.
    """
    manifests = _manifests(directory) if keep else {}
    whole = [step for step in manifests if not problem_of(directory, step, digests=False)]
    scores = {step: manifests[step].get("val_score") for step in whole}
    scored = [step for step in reversed(whole) if scores[step] is not None and math.isfinite(scores[step])]
    kept = {*whole[-keep:], *sorted(scored, key=scores.get)[:1]}
    removed = [step for step in manifests if step < max(whole, default=0) and step not in kept]
    for step in removed:
        for name in [*manifests[step]["files"], file_name("manifest", step)]:
            (Path(directory) / name).unlink(missing_ok=True)
    return removed


def remove_temporary_files(directory):
    """Remove what a killed run left half-written."""
    for path in Path(directory).glob("*.tmp"):
        if re.fullmatch(r".+\.[0-9a-f]{8}\.tmp", path.name):  # of `atomic_write`
            path.unlink(missing_ok=True)


class DamagedFileError(InputError):
    """A file is missing, damaged, or of another run."""

    def __init__(self, path, problem):
        hint = "restore it, use another checkpoint, or go on without it by --resume_partial True"
        super().__init__(f"{path}: {problem}; {hint}")


def load_file(path, entry=None):
    """Read a file of torch.save without running code from it. Raises DamagedFileError naming the file.

    :param entry: its manifest's entry, which it must equal; None: not verified.
    """
    problem = file_problem(Path(path), entry) if entry else ""
    if problem or not os.path.exists(path):
        raise DamagedFileError(path, f"it is damaged ({problem})" if problem else "no such file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch remarks on odd pickles before it refuses them
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged and refused files raise many kinds
        reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
        raise DamagedFileError(path, f"it cannot be read as a checkpoint of plain tensors ({reason})") from None


def load_checkpoint(directory, step, parts, partial=False):
    """Load each part of a checkpoint into its object, one at a time, verified by the manifest where there is one.

    :param parts: dict from kind to an object with load_state_dict(); "model" comes first.
    :param partial: leave out parts other than the model that are missing, damaged, or do not fit.
    :return: the kinds that were left out.
    :raises InputError: naming the file, or the flag that contradicts it.
    """
    entries, missing = {}, []
    with suppress(*[InputError] * partial):
        entries = (read_manifest(directory, step) or {}).get("files", {})
    for kind, part in parts.items():
        path = Path(directory) / file_name(kind, step)
        try:
            if entries and path.name not in entries:
                raise DamagedFileError(path, "the manifest does not list it")
            _load_part(path, entries.get(path.name), part)
        except DamagedFileError:
            if kind == "model" or not partial:
                raise
            missing.append(kind)
    return missing


def _load_part(path, entry, part):
    contents = load_file(path, entry)
    try:
        part.load_state_dict(contents)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except (KeyError, RuntimeError, ValueError, AttributeError, TypeError) as error:
        raise DamagedFileError(path, f"it does not fit this run ({error})") from None


def resume_point(directory, asked, partial=False, log=None):
    """Return (folder, step) to resume from, or None to start afresh; never a start that would overwrite another run.

    :param directory: the run's --checkpoint_dir.
    :param asked: --resume_checkpoint: "", "auto" (the newest whole checkpoint), or the path of a model file.
    :param partial: be content with a readable model file, but not with one that differs from its manifest.
    :param log: function of a line, for newer steps that are damaged.
    :raises InputError: the folder holds a run and nothing was asked for, nothing is whole, or there are later steps.
    """
    steps, log = saved_steps(directory), log or (lambda line: None)
    if asked == "auto":
        return _newest_checkpoint(directory, steps, partial, log)
    latest = max(steps, default=None)
    if not asked and latest is None:
        return None
    if not asked:
        hint = "go on with --resume_checkpoint auto, or choose another folder"
        raise InputError(f"--checkpoint_dir {directory} holds a run that reached step {latest}: {hint}")
    match = re.fullmatch(r"model(\d{6,})\.pt", Path(asked).name)
    if not match or not Path(asked).exists():
        found = "no such file" if match else "expected a file called model<step>.pt, or auto"
        raise InputError(f"--resume_checkpoint {asked}: {found}")
    folder, step = Path(asked).parent, int(match[1])
    same = folder.resolve() == Path(directory).resolve()
    if latest is not None and (not same or latest > step):
        what = f"steps up to {latest}" if same else f"another run (step {latest})"
        raise InputError(
            f"--checkpoint_dir {directory} already holds {what}: choose an empty folder to branch off into"
        )
    problem = problem_of(folder, step, partial)
    if problem:
        hint = "use an older one (auto finds the newest whole one), or go on from its model with --resume_partial True"
        raise InputError(f"--resume_checkpoint {asked}: it is damaged or incomplete ({problem}); {hint}")
    return str(folder), step


def _newest_checkpoint(directory, steps, partial, log):
    passed = []
    for step in sorted(steps, reverse=True):
        problem = problem_of(directory, step, partial)
        if problem == UNFINISHED and len(steps) == 1:
            log(f"checkpoint {step} in {directory}: {problem}, and it was the first: starting afresh")
            return None
        if not problem:
            for line in passed:
                log(f"{line}; going back to {step}")
            return str(directory), step
        passed.append(f"checkpoint {step} in {directory} is damaged or incomplete ({problem})")
    if not passed:
        return None
    raise InputError(f"{passed[0]}, and no older one is whole; restore it, or use --resume_partial True")


# -- weights ----------------------------------------------------------------------------------------------------------


def check_weights(model, weights):
    """Return a state dict without GESCO's unused keys. Raises InputError naming the first key that differs."""
    if not isinstance(weights, dict) or not all(isinstance(key, str) for key in weights):
        raise InputError(f"expected a state dict, found {type(weights).__name__}")
    weights = {key: value for key, value in weights.items() if not LEGACY_KEY.match(key)}
    own = model.state_dict()
    for problem, keys in (("missing", own.keys() - weights.keys()), ("unexpected", weights.keys() - own.keys())):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise InputError(f"{problem} key {min(keys)}{more}; do the network's flags match the file?")
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
    if not isinstance(weights, dict):
        weights = load_file(weights, _manifest_of(weights).get("files", {}).get(Path(weights).name))
    try:
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


def find_weights(model_path, may_lack=False, log=None):
    """Return the weights file that --model_path means: the file itself, or the newest whole EMA file of a folder.

    :param may_lack: do not insist that it exists (dry runs).
    :param log: function of a line, for newer averages that are damaged.
    """
    if os.path.isdir(model_path):
        return _newest_average(Path(model_path), log or (lambda line: None))
    if may_lack or os.path.exists(model_path):
        return model_path
    found = "no such file" if model_path else "it is empty"
    raise InputError(f"--model_path {model_path}: {found}; name a .pt file, or a folder with checkpoints")


def _newest_average(directory, log):
    """Return the newest whole EMA file, of several rates the highest; folders without any manifest are trusted."""
    entries, problem = {}, ""
    for manifest in _manifests(directory).values():
        entries |= manifest["files"]
    names = {*entries, *(path.name for path in directory.glob("ema_*.pt"))}  # a listed file may be lost
    foreign = not any(directory.glob("manifest*.json"))
    found = [(int(match[2]), float(match[1]), match[0]) for match in map(EMA_FILE.fullmatch, names) if match]
    for _, _, name in sorted(found, reverse=True):
        listed = name in entries
        fault = file_problem(directory / name, entries[name]) if listed else f"no readable manifest lists {name}"
        if foreign or not fault:
            if problem:
                log(f"the newest averages in {directory} are damaged or incomplete ({problem}); going back to {name}")
            return str(directory / name)
        problem = problem or fault
    problem = f"no ema_*.pt file is whole (newest: {problem})" if found else "the folder has no ema_*.pt file"
    raise InputError(f"--model_path {directory}: {problem}; train first, or name a file")


def trained_config(weights):
    """Return the flags that a weights file was trained with ({}: unknown) and where: config.json, or the manifest."""
    beside = os.path.join(os.path.dirname(weights), "config.json")
    if os.path.exists(beside):
        return load_config(beside), beside
    return _manifest_of(weights).get("config") or {}, f"the manifest of {weights}"
