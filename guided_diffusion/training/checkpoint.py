"""Checkpoint files: names, whole writes, safe reads.

A checkpoint of step N is model{N}.pt, ema_{rate}_{N}.pt (plain state dicts, as SDM loads them), opt{N}.pt and
state{N}.pt (everything else that resuming needs; written last, so it marks a whole checkpoint).
"""

import re
import warnings
from pathlib import Path

import torch

from ..diffusion.unet import ResBlock, SPADEGroupNorm, SPADEResBlock
from ..errors import InputError
from ..files import whole_file

# GESCO and Diff-GO-n files carry an unused SPADE over 3 label channels in every encoder block.
LEGACY_KEY = re.compile(r"input_blocks\.\d+\.\d+\.spade_norm\.")
EMA_FILE = re.compile(r"ema_((?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)_(\d{6,})\.pt")


def file_name(kind, step):
    """Return the file name of one part, such as file_name("opt", 12) -> "opt000012.pt"."""
    return f"{kind}{step:06d}.pt"


def save_parts(directory, step, parts):
    """Write the parts of a checkpoint, each to a temporary name and then renamed; "state" last.

    :param parts: dict from kind ("model", "ema_0.9999_", "opt", "state") to what torch.save takes.
    """
    for kind in sorted(parts, key=lambda kind: kind == "state"):
        path = Path(directory) / file_name(kind, step)
        try:
            with whole_file(path, "wb") as f:
                torch.save(parts[kind], f)
        except (OSError, RuntimeError) as error:
            raise OSError(f"{path}: cannot be written ({error}); free space or change --checkpoint_dir") from None


def load_file(path):
    """Read what torch.save wrote, without running code from the file. Raises InputError naming the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch remarks on odd pickles before it refuses them
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; check --model_path or --resume_checkpoint") from None
    except Exception as error:  # torch raises many kinds for damaged and for refused files
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

    :param model: the network; its own precision is kept.
    :param weights: a state dict, or the path of a file with one (read with weights_only).
    :raises InputError: naming the first missing, unexpected or differently shaped key. The unused
        `input_blocks.*.spade_norm.*` of GESCO and Diff-GO-n files are ignored.
    """
    where = "state dict"
    if not isinstance(weights, dict):
        where, weights = str(weights), load_file(weights)
    model.load_state_dict(check_weights(model, weights, where))


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


def _steps(directory, kind):
    found = (re.fullmatch(rf"{kind}(\d{{6,}})\.pt", path.name) for path in Path(directory).glob(f"{kind}*.pt"))
    return {int(match[1]) for match in found if match}


def newest_checkpoint(directory, partial=False):
    """Return the newest step that `directory` can be resumed from, or None where it has no checkpoint at all.

    The state file is written last, so a step that has one was saved whole; what is missing of it now is for `load_parts`
    to say.

    :param partial: be content with a model file.
    :raises InputError: there are model files, but none with its state file.
    """
    models = _steps(directory, "model")
    usable = models if partial else models & _steps(directory, "state")
    if models and not usable:
        raise InputError(
            f"{directory}: no model file has its state file beside it; restore state{max(models):06d}.pt, or go on from the"
            " weights alone with --resume_partial True"
        )
    return max(usable, default=None)


def resume_point(directory, asked, partial=False):
    """Return (folder, step) to resume from, or None to start afresh; never a start that would overwrite another run.

    :param directory: the run's --checkpoint_dir.
    :param asked: --resume_checkpoint: "", "auto", or the path of a model file.
    :raises InputError: the folder holds a run and nothing was asked for, the file is missing, or the folder holds later
        steps than the one to resume from.
    """
    if asked == "auto":
        newest = newest_checkpoint(directory, partial)
        return None if newest is None else (str(directory), newest)
    latest = max(_steps(directory, "model"), default=None)
    if not asked:
        if latest is not None:
            raise InputError(
                f"--checkpoint_dir {directory} holds a run that reached step {latest}: go on with --resume_checkpoint auto,"
                " or choose another folder"
            )
        return None
    folder, step = parse_checkpoint_path(asked)
    if not Path(asked).exists():
        raise InputError(f"--resume_checkpoint {asked}: no such file")
    same = Path(directory).exists() and Path(folder).resolve() == Path(directory).resolve()
    if latest is not None and (not same or latest > step):
        what = f"steps up to {latest}" if same else f"another run (step {latest})"
        raise InputError(f"--checkpoint_dir {directory} already holds {what}: choose an empty folder to branch off into")
    return str(folder), step


def sweep_temporary_files(directory):
    """Remove what a killed run left half-written."""
    for path in Path(directory).glob("*.pt.tmp"):
        path.unlink(missing_ok=True)


def newest_ema(directory):
    """Return the path of a folder's newest EMA file; of several rates, the highest. Raises InputError if it has none."""
    found = [(int(match[2]), float(match[1]), path) for path in Path(directory).glob("ema_*.pt")
             if (match := EMA_FILE.fullmatch(path.name))]  # fmt: skip
    if not found:
        raise InputError(f"--model_path {directory}: the folder has no ema_*.pt file; train first, or name a file")
    return max(found)[2]


def parse_checkpoint_path(path):
    """Split a model file's path into (folder, step). Raises InputError for other names."""
    path = Path(path)
    match = re.fullmatch(r"model(\d{6,})\.pt", path.name)
    if not match:
        raise InputError(f"--resume_checkpoint {path}: expected a file called model<step>.pt, or auto")
    return path.parent, int(match[1])


def load_parts(directory, step, ema_rates, partial=False):
    """Read all parts of one checkpoint.

    :param partial: go on without the parts other than the model that are missing.
    :return: dict from kind to contents, and the list of missing file names.
    """
    parts, missing = {}, []
    for kind in ["model", "opt", "state", *(f"ema_{rate}_" for rate in ema_rates)]:
        path = Path(directory) / file_name(kind, step)
        if kind != "model" and not path.exists():
            missing.append(path.name)
            continue
        parts[kind] = load_file(path)
    if missing and not partial:
        raise InputError(
            f"{directory}: checkpoint {step} lacks {', '.join(missing)}; restore them, or start those parts afresh"
            " with --resume_partial True"
        )
    return parts, missing
