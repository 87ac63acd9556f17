"""Weights and their flags, toy scenes, and the folders that a run needs."""

import os

from .config import load_config
from .console import InputError
from .training.checkpoint_choice import newest_ema, resume_point
from .training.manifest import noted_config

# -- values -----------------------------------------------------------------------------------------------------------


def check_values(config):
    """Refuse a respacing that the schedule has not; all else is checked by `config.validate`."""
    if getattr(config, "role", "") != "receive":  # there the message decides
        from .diffusion.schedules import beta_schedule, space_timesteps

        space_timesteps(beta_schedule(config.noise_schedule, config.diffusion_steps), config.timestep_respacing)


# -- files ------------------------------------------------------------------------------------------------------------


def check_places(config):
    """Refuse a --data_dir that lacks the asked split, and a --checkpoint_dir that holds another run.

    Remote folders are left to those who read them: to look costs as much as to list.
    """
    if getattr(config, "checkpoint_dir", "") and not config.resume_checkpoint:
        resume_point(config.checkpoint_dir, "")
    if (
        "://" in config.data_dir
        or getattr(config, "role", "") == "receive"
        or getattr(config, "extractor", "gt") != "gt"
    ):
        return
    from .data.pairing import dataset_facts, find_pairs

    layouts, split = dataset_facts(config.dataset_mode).layouts, 0 if config.is_train else 1
    if not any(os.path.isdir(os.path.join(config.data_dir, each.labels.folders[split])) for each in layouts):
        find_pairs(config.dataset_mode, config.data_dir, config.is_train, config.no_instance)  # says what is wrong


def draw_toy_scenes(config, given, log):
    """Draw the scenes of the toy preset into its own folder, unless they are there or another folder was named."""
    if config.preset == "toy" and "data_dir" not in given and not os.path.exists(config.data_dir):
        from .data.toy_scenes import write_toy_scenes

        log(f"drawing toy scenes into {config.data_dir}")
        write_toy_scenes(config.data_dir)


def find_weights(model_path, may_lack=False, log=None):
    """Return the weights file that --model_path means: the file itself, or a folder's newest EMA file.

    :param may_lack: do not insist that it exists (dry runs).
    :param say: function of a line, told of damaged files that were passed over.
    """
    if not model_path and not may_lack:
        raise InputError("--model_path is empty: name a .pt file, or a folder with checkpoints")
    if os.path.isdir(model_path):
        return str(newest_ema(model_path, log))
    if not os.path.exists(model_path) and not may_lack:
        raise InputError(f"--model_path {model_path}: no such file; train first, or name another .pt file or folder")
    return model_path


def trained_config(weights):
    """Return the flags that a weights file was trained with, {} where nobody noted them, and the path of the note.

    They are in the config.json beside it, or, where that is lost, in the checkpoint's manifest.
    """
    beside = os.path.join(os.path.dirname(weights), "config.json")
    if os.path.exists(beside):
        return load_config(beside), beside
    return (noted_config(weights) if os.path.exists(weights) else {}), f"the manifest of {weights}"
