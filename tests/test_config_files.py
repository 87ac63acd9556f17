"""What a run takes from an earlier one, and config.json."""

import dataclasses
import random
import re

import pytest
from test_config import parse, trained

from guided_diffusion.config import (
    SampleConfig,
    TrainConfig,
    adopt_resumed,
    adopt_training_config,
    load_config,
    results_settings,
    save_config,
)
from guided_diffusion.console import InputError

# -- earlier runs -----------------------------------------------------------------------------------------------------


def test_results_settings_leave_out_what_may_change():
    settings = results_settings(SampleConfig())
    assert {"s", "snr", "seed", "timestep_respacing", "data_dir", "num_channels"} <= {*settings}
    assert not {"results_path", "model_path", "batch_size", "device", "metrics", "dropout"} & {*settings}


def test_adopt_training_config_takes_what_training_fixed():
    config, given = parse(SampleConfig, "--timestep_respacing ddim5 --batch_size 3 --dropout 0.5")
    adopt_training_config(
        config, given, trained("--preset toy --rescale_timesteps True --noise_bank_size 50"), "config.json"
    )
    assert (config.image_size, config.rescale_timesteps, config.prediction, config.noise_bank_size) == (
        32,
        True,
        "x0",
        50,
    )
    assert (config.timestep_respacing, config.batch_size, config.dropout) == ("ddim5", 3, 0.5)  # the user's


@pytest.mark.parametrize(
    "flag", ["--num_channels 64", "--prediction v", "--noise_bank_seed 1", "--predict_xstart False"]
)
def test_adopt_training_config_refuses_another_value(flag):
    config, given = parse(SampleConfig, flag)
    with pytest.raises(InputError, match=rf"{flag} contradicts the checkpoint, trained with .* \(config.json\)"):
        adopt_training_config(config, given, trained(), "config.json")


@pytest.mark.parametrize(("name", "value"), [("num_channels", "32"), ("unet_model", "foo"), ("image_size", None)])
def test_adopt_training_config_names_a_value_of_the_wrong_type(name, value):
    config, given = parse(SampleConfig)
    with pytest.raises(InputError, match=f"config.json: {name} is {value!r}, which this flag does not take"):
        adopt_training_config(config, given, {**trained(), name: value}, "config.json")


def test_adopt_training_config_warns_of_other_source_coding():
    config, given = parse(SampleConfig)
    assert adopt_training_config(config, given, trained("--edge_levels 2 --label_scale 2"), "config.json") == []
    assert (config.edge_levels, config.label_scale) == (2, 2)
    config, given = parse(SampleConfig, "--edge_levels 2 --label_scale 4")
    lines = adopt_training_config(config, given, trained("--edge_levels 2"), "config.json")
    assert lines == ["--label_scale 4 is not what the checkpoint was trained with (1, config.json)"]
    assert (config.edge_levels, config.label_scale) == (2, 4)


def test_adopt_training_config_fills_in_for_older_files():
    config, given = parse(SampleConfig, "--num_res_blocks 1")
    adopt_training_config(config, given, {"num_channels": 64}, "config.json")
    assert (config.num_channels, config.num_res_blocks) == (64, 1)
    assert (config.edge_levels, config.label_scale) == (256, 1)  # before source coding, training saw all edges


@pytest.mark.parametrize("resume", ["auto", "model000010.pt"])
def test_adopt_resumed_keeps_the_architecture_and_tells_other_changes(tmp_path, resume):
    save_config(TrainConfig(**trained()), tmp_path / "config.json")
    (tmp_path / "model000010.pt").touch()
    line = f"--resume_checkpoint {resume if resume == 'auto' else tmp_path / resume} --checkpoint_dir {tmp_path}"
    config, given = parse(TrainConfig, f"{line} --preset toy --lr 0.5 --dropout 0.1 --batch_size 1 --seed 3")
    assert adopt_resumed(config, given) == [
        "resuming with --dropout 0.1; the earlier run had 0.0",
        "resuming with --lr 0.5; the earlier run had 0.001",
    ]
    assert (config.num_channels, config.prediction) == (32, "x0")
    for flag in ("--num_channels 64", "--use_kl True"):
        config, given = parse(TrainConfig, f"{line} {flag}")
        with pytest.raises(InputError, match=f"{flag} contradicts the checkpoint"):
            adopt_resumed(config, given)


def test_adopt_resumed_ignores_the_folder_of_a_fresh_run(tmp_path):
    save_config(TrainConfig(**trained()), tmp_path / "config.json")
    config, given = parse(TrainConfig, f"--checkpoint_dir {tmp_path}")
    assert adopt_resumed(config, given) == [] and config.num_channels == 128


# -- config.json ------------------------------------------------------------------------------------------------------


def test_save_config_and_load_config_are_inverse(tmp_path):
    config, _ = parse(TrainConfig, "--preset toy --lr 0.002 --data_dir 'a b/é'")
    save_config(config, tmp_path / "config.json")
    assert TrainConfig(**load_config(tmp_path / "config.json")) == config
    (tmp_path / "config.json").write_text('{"lr": 0.1}')  # without a SHA-256, as other programs write it
    assert load_config(tmp_path / "config.json") == {"lr": 0.1}


@pytest.mark.parametrize("contents", [None, b"[" * 10**6, b"[1]", b"", b'{"lr": ' + b"9" * 5000 + b"}", b"\xff\xfe"])
def test_load_config_names_a_file_that_is_none(tmp_path, contents):
    path = tmp_path / "config.json"
    if contents is not None:
        path.write_bytes(contents)
    with pytest.raises(InputError, match=f"{re.escape(str(path))}: cannot be read as a configuration"):
        load_config(path)


def test_load_config_recognises_flipped_bits(tmp_path):
    path, draw = tmp_path / "config.json", random.Random(0)
    config = TrainConfig(noise_bank_seed=150, num_channels=64)
    save_config(config, path)
    good, refused = path.read_bytes(), 0
    for _ in range(300):
        bad = bytearray(good)
        bad[draw.randrange(len(bad))] ^= 1 << draw.randrange(8)
        path.write_bytes(bad)
        try:
            # White space may change, or the SHA-256's own name.
            assert load_config(path).items() >= dataclasses.asdict(config).items()
        except InputError:
            refused += 1
    assert refused > 200
