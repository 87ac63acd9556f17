"""Which checkpoint of a folder a run goes on from, and which weights are sampled: the newest whole ones.

Without torch, so that a path that makes no sense is refused at once.
"""

import re
from contextlib import suppress
from pathlib import Path

from ..console import InputError
from .manifest import (
    EMA_FILE,
    UNFINISHED,
    file_name,
    file_problem,
    manifest_name,
    predates_manifests,
    problem_of,
    read_manifest,
    saved_steps,
    weights_entry,
)
from .safe_reading import check_contents


def newest_checkpoint(directory, partial=False, log=None):
    """Return the newest step that `directory` can be resumed from, or None where it has no checkpoint at all.

    :param partial: be content with a readable model file, but not with one that differs from its manifest.
    :param say: function of a line, told of newer steps that are damaged, and of a step that could not be verified.
    :raises InputError: there are checkpoints, but none is whole. A first save that was cut short is no checkpoint yet.
    """
    log, passed, steps = log or (lambda line: None), [], saved_steps(directory)
    for step in sorted(steps, reverse=True):
        problem = problem_of(directory, step)
        if problem == UNFINISHED and not partial and steps == {step}:
            log(f"checkpoint {step} in {directory}: {problem}, and it was the first: starting afresh")
            return None
        if problem and (not partial or _model_problem(directory, step)):
            passed.append((step, problem))
            continue
        for damaged, why in passed:
            log(f"checkpoint {damaged} in {directory} is damaged or incomplete ({why}); going back to {step}")
        if problem:
            log(
                f"checkpoint {step} in {directory} is damaged or incomplete ({problem}); --resume_partial True goes on"
                " from what is left of it"
            )
        else:
            _say_whether_verified(directory, step, log)
        return step
    if passed:
        damaged, why = passed[0]
        raise InputError(
            f"{directory}: checkpoint {damaged} is damaged or incomplete ({why}), and no older one is whole;"
            " restore it, or go on from the weights alone with --resume_partial True"
        )
    return None


def _model_problem(directory, step):
    """Say why a step's model file alone is of no use, "" if it is."""
    path, entry = Path(directory) / file_name("model", step), None
    with suppress(InputError):  # an unreadable manifest is one more part that is lost
        entry = weights_entry(path)
    if entry is not None:
        return file_problem(path, entry)
    try:
        with open(path, "rb") as f:
            check_contents(f)
        return ""
    except Exception as error:  # damaged files raise many kinds
        return f"{path.name} cannot be read ({error})"


def resume_point(directory, asked, partial=False, log=None):
    """Return (folder, step) to resume from, or None to start afresh; never a start that would overwrite another run.

    :param directory: the run's --checkpoint_dir.
    :param asked: --resume_checkpoint: "", "auto", or the path of a model file.
    :param partial, say: see `newest_checkpoint`.
    :raises InputError: the folder holds a run and nothing was asked for, the file is missing or damaged, or the folder
        holds later steps than the one to resume from.
    """
    if asked == "auto":
        newest = newest_checkpoint(directory, partial, log)
        return None if newest is None else (str(directory), newest)
    latest = max(saved_steps(directory), default=None)
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
        raise InputError(
            f"--checkpoint_dir {directory} already holds {what}: choose an empty folder to branch off into"
        )
    problem = _model_problem(folder, step) if partial else problem_of(folder, step)
    if problem:
        other = (
            "use --resume_checkpoint auto to go on from the newest whole one" if same else "name an older model file"
        )
        raise InputError(f"--resume_checkpoint {asked}: the checkpoint is damaged or incomplete ({problem}); {other}")
    _say_whether_verified(folder, step, log or (lambda line: None))
    return str(folder), step


def _say_whether_verified(directory, step, log):
    if not (Path(directory) / manifest_name(step)).exists():
        log(f"checkpoint {step} in {directory} has no manifest (an older version wrote it) and could not be verified")


def parse_checkpoint_path(path):
    """Split a model file's path into (folder, step). Raises InputError for other names."""
    path = Path(path)
    match = re.fullmatch(r"model(\d{6,})\.pt", path.name)
    if not match:
        raise InputError(f"--resume_checkpoint {path}: expected a file called model<step>.pt, or auto")
    return path.parent, int(match[1])


def newest_ema(directory, log=None):
    """Return the path of a folder's newest whole EMA file; of several rates, the highest.

    :param say: function of a line, told of newer files that are damaged.
    :raises InputError: the folder has none, or none that is whole.
    """
    directory = Path(directory)
    listed = (name for step in saved_steps(directory, ["manifest"]) for name in _listed(directory, step))
    names = {*listed, *(path.name for path in directory.glob("ema_*.pt"))}  # a listed file may be lost
    found = [
        (int(match[2]), float(match[1]), directory / name) for name in names if (match := EMA_FILE.fullmatch(name))
    ]
    if not found:
        raise InputError(f"--model_path {directory}: the folder has no ema_*.pt file; train first, or name a file")
    passed = []
    for step, _, path in sorted(found, reverse=True):
        problem = _ema_problem(path, step)
        if problem:
            passed.append(problem)
            continue
        for why in passed if log else ():
            log(f"the newest averages in {directory} are damaged or incomplete ({why}); going back to {path.name}")
        return path
    raise InputError(
        f"--model_path {directory}: no ema_*.pt file is whole (newest: {passed[0]}); restore one, or name a file"
    )


def _listed(directory, step):
    """Return the names of the files that a step's manifest lists; none where it cannot be read."""
    with suppress(InputError):
        return (read_manifest(directory, step) or {"files": []})["files"]
    return []


def _ema_problem(path, step):
    """Say why an EMA file is not to be used, "" if it is whole."""
    try:
        manifest = read_manifest(path.parent, step)
    except InputError as error:
        return str(error)
    if manifest is None:
        return "" if predates_manifests(path.parent, step) else f"{path.name} has no manifest: {UNFINISHED}"
    entry = manifest["files"].get(path.name)
    return file_problem(path, entry) if entry else f"the manifest lists no {path.name}"
