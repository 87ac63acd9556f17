"""What is settled before torch is loaded."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TINY, TRAIN, as_arguments

from guided_diffusion.config import SampleConfig, TrainConfig, parse_config
from guided_diffusion.console import InputError
from guided_diffusion.prepare import check_places, check_values

ROOT = Path(__file__).resolve().parent.parent
# Runs a script's main with each of some lists of arguments; prints [what it said, whether torch was there] of each.
PROBE = """
import contextlib, importlib, io, json, sys
script = importlib.import_module(sys.argv[1])
told = []
for arguments in json.loads(sys.argv[2]):
    sys.argv, said = ["script", *arguments], io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.suppress(SystemExit):
        script.run_script(script.main)
    told.append([said.getvalue(), "torch" in sys.modules])
print(json.dumps(told))
"""


def refuse(script, folder, cases):
    """Check that a script refuses each list of arguments with its words, without torch."""
    command = [sys.executable, "-c", PROBE, script, json.dumps([arguments for arguments, _ in cases])]
    done = subprocess.run(
        command, cwd=folder, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120
    )
    for (arguments, words), (said, torch_is_there) in zip(cases, json.loads(done.stdout), strict=True):
        assert words in said and said.count("\n") == 1, (arguments, said)
        assert not torch_is_there, arguments


def test_sampling_refuses_without_torch(trained, scenes, tmp_path):
    (tmp_path / "empty").mkdir()
    given = ["--data_dir", str(scenes), "--model_path", str(trained), "--results_path", "out"]
    refuse(
        "image_sample",
        tmp_path,
        [
            (["--model_path", "gone.pt"], "--model_path gone.pt: no such file"),
            (["--model_path", "empty"], "the folder has no ema_*.pt file"),
            ([*given, "--num_channels", "64"], "--num_channels 64 contradicts the checkpoint"),
            ([*given, "--noise_index", "16"], "--noise_index 16"),
            ([*given, "--timestep_respacing", "fast"], "--timestep_respacing fast"),
            ([*given, "--data_dir", "gone"], "--data_dir gone does not exist"),
            ([*given, "--data_dir", "empty"], "empty"),
            ([*given, "--results_path", ""], "--results_path is empty"),
        ],
    )


def test_training_refuses_without_torch(trained, scenes, tmp_path):
    given = as_arguments({"data_dir": scenes, "checkpoint_dir": "run", **TINY, **TRAIN})
    refuse(
        "image_train",
        tmp_path,
        [
            ([*given, "--data_dir", "gone"], "--data_dir gone does not exist"),
            ([*given, "--channel_mult", "1,x"], "--channel_mult 1,x"),
            ([*given, "--ema_rate", "2"], "--ema_rate 2"),
            ([*given, "--checkpoint_dir", str(trained)], "holds a run that reached step 4"),
        ],
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "flags, words",
    [
        ({"attention_resolutions": "8,x"}, "--attention_resolutions 8,x"),
        ({"channel_mult": "0,1"}, "--channel_mult 0,1"),
        ({"timestep_respacing": "ddim999"}, "no whole stride"),
        ({"ema_rate": ""}, "--ema_rate is empty"),
    ],
)
def test_values_that_make_no_sense(flags, words):
    with pytest.raises(InputError, match=words):
        check_values(parse_config(TrainConfig, "", as_arguments(flags))[0])


def test_a_receivers_steps_are_the_messages_to_decide():
    flags = {"timestep_respacing": "odd", "role": "receive", "messages": "there"}
    check_values(parse_config(SampleConfig, "", as_arguments(flags))[0])


def test_remote_folders_and_those_of_an_extractor_are_left_to_their_readers(tmp_path):
    for flags in ({"data_dir": "gs://bucket/none"}, {"data_dir": tmp_path, "extractor": "labels.pt"}):
        check_places(parse_config(SampleConfig, "", as_arguments(flags))[0])
    with pytest.raises(InputError, match="--data_dir"):
        check_places(parse_config(SampleConfig, "", as_arguments({"data_dir": tmp_path}))[0])


def test_a_folder_with_both_splits_is_accepted(scenes):
    for config_class in (TrainConfig, SampleConfig):
        check_places(
            parse_config(
                config_class,
                "",
                as_arguments(
                    {"data_dir": scenes, "checkpoint_dir": "none"}
                    if config_class is TrainConfig
                    else {"data_dir": scenes}
                ),
            )[0]
        )
