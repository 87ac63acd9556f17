"""Flags, presets and config.json."""

import dataclasses
import json
import random
import re
import shlex

import pytest

from guided_diffusion.config import (
    FIXED_BY_TRAINING,
    SampleConfig,
    TrainConfig,
    adopt_resumed,
    adopt_training_config,
    check_bank,
    create_parser,
    load_config,
    model_and_diffusion_defaults,
    parse_config,
    points,
    print_config,
    save_config,
)
from guided_diffusion.console import InputError
from guided_diffusion.idle_flags import unused_flags
from guided_diffusion.presets import PRESETS

BOTH = [TrainConfig, SampleConfig]

# The flags of the family's two public scripts, with a value that is not the default.
MODEL = {
    "image_size": 256,
    "num_classes": 151,
    "num_channels": 64,
    "num_res_blocks": 3,
    "num_heads": 2,
    "num_heads_upsample": 1,
    "num_head_channels": 64,
    "attention_resolutions": "32,16,8",
    "channel_mult": "1,2",
    "dropout": 0.1,
    "class_cond": True,
    "use_checkpoint": True,
    "use_scale_shift_norm": False,
    "resblock_updown": True,
    "use_fp16": True,
    "use_new_attention_order": True,
    "no_instance": True,
    "one_hot_label": False,
    "unet_model": "spadeboth",
}
DIFFUSION = {
    "learn_sigma": True,
    "diffusion_steps": 500,
    "noise_schedule": "cosine",
    "timestep_respacing": "ddim50",
    "use_kl": True,
    "predict_xstart": True,
    "rescale_timesteps": True,
    "rescale_learned_sigmas": True,
}
CHANNEL = {"snr": 12.5, "add_noise": True, "noise_to": "label"}
DATA = {"data_dir": "/data", "dataset_mode": "coco"}
TRAIN = {
    "schedule_sampler": "loss-second-moment",
    "lr": 2e-4,
    "weight_decay": 0.05,
    "lr_anneal_steps": 10,
    "batch_size": 4,
    "microbatch": 2,
    "ema_rate": "0.9,0.99",
    "drop_rate": 0.1,
    "log_interval": 5,
    "save_interval": 50,
    "resume_checkpoint": "auto",
    "fp16_scale_growth": 2e-3,
    "is_train": False,
    "checkpoint_dir": "/runs",
}
SAMPLE = {
    "clip_denoised": False,
    "num_samples": 12,
    "use_ddim": True,
    "model_path": "/m.pt",
    "results_path": "/r",
    "is_train": True,
    "s": 2.5,
    "pool": "max",
    "batch_size": 3,
    "snr": "12.5",
}
FAMILY = [
    (config_class, name, value)
    for config_class, own in ((TrainConfig, TRAIN), (SampleConfig, SAMPLE))
    for name, value in {**MODEL, **DIFFUSION, **CHANNEL, **DATA, **own}.items()
]

TRAIN_COMMAND = """
  --data_dir "path/to/dataset_folder" --checkpoint_dir "./checkpoints" --dataset_mode cityscapes
  --lr 1e-4 --batch_size 1 --attention_resolutions 32,16,8 --diffusion_steps 1000 --image_size 256 --learn_sigma True
  --noise_schedule linear --num_channels 256 --num_head_channels 64 --num_res_blocks 2 --resblock_updown True
  --use_fp16 True --use_scale_shift_norm True --use_checkpoint True --save_interval 1000 --num_classes 35
  --class_cond True --no_instance False --one_hot_label True"""
SAMPLE_COMMAND = """
  --data_dir "path/to/dataset_folder" --dataset_mode cityscapes --attention_resolutions 32,16,8
  --diffusion_steps 1000 --image_size 256 --learn_sigma True --noise_schedule linear --num_channels 256
  --num_head_channels 64 --num_res_blocks 2 --resblock_updown True --use_fp16 True --use_scale_shift_norm True
  --num_classes 35 --class_cond True --no_instance False --batch_size 1 --num_samples 100
  --model_path ./checkpoints/ema_0.9999_100000.pt --results_path ./results/results_100000 --s 2 --one_hot_label True
  --snr 100 --pool None --unet_model unet"""


def parse(config_class, line=""):
    return parse_config(config_class, "test", shlex.split(line))


def refused(capsys, config_class, line):
    """Parse a line that argparse refuses; return the message after checking exit code and form."""
    with pytest.raises(SystemExit) as stopped:
        parse(config_class, line)
    captured = capsys.readouterr()
    assert stopped.value.code == 2
    assert captured.out == "" and captured.err.count("\n") == 1 and captured.err.endswith("\n")
    return captured.err


# -- flags ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("config_class", "name", "value"), FAMILY, ids=lambda v: getattr(v, "__name__", str(v)))
def test_every_flag_of_the_family(config_class, name, value):
    config, given = parse(config_class, f"--{name} {value}")
    found = getattr(config, name)
    assert found == value and type(found) is type(value) and given == {name}
    assert name in ("class_cond", "use_fp16") or value != getattr(config_class(), name)


@pytest.mark.parametrize(("config_class", "line"), [(TrainConfig, TRAIN_COMMAND), (SampleConfig, SAMPLE_COMMAND)])
def test_the_familys_commands(config_class, line):
    config, given = parse(config_class, line)
    assert len(given) == line.count("--")
    assert (config.image_size, config.num_channels, config.learn_sigma, config.precision) == (256, 256, True, "fp16")
    assert config.prediction == "eps" and config.attention_resolutions == "32,16,8"
    assert unused_flags(config, given) == []


@pytest.mark.parametrize("config_class", BOTH)
def test_defaults_that_others_rely_on(config_class):
    config, given = parse(config_class)
    assert given == set()
    assert config.one_hot_label is True and config.num_classes == 35 and config.class_cond is True
    assert (config.noise_bank_size, config.noise_bank_seed, float(config.snr), config.unet_model) == (
        1000,
        150,
        100,
        "unet",
    )
    assert (config.prediction, config.predict_xstart, config.precision) == ("eps", False, "fp32")
    assert config.is_train is (config_class is TrainConfig)
    if config_class is SampleConfig:
        assert config.pool == "None" and config.s == 1.0 and config.use_ddim is False


@pytest.mark.parametrize("config_class", BOTH)
def test_every_flag_has_a_help_text_and_a_default_of_its_type(config_class):
    for f in dataclasses.fields(config_class):
        assert f.metadata["help"] and type(f.default) is f.type, f.name
        assert f.metadata["choices"] is None or f.default in f.metadata["choices"], f.name


@pytest.mark.parametrize("config_class", BOTH)
def test_help_groups_flags_and_shows_defaults(config_class, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(config_class, "--help")
    text = " ".join(capsys.readouterr().out.split()).replace("- ", "-")  # argparse breaks lines at hyphens
    assert stopped.value.code == 0
    for expected in ("Network", "Noise bank", "Channel", "not a signal-to-noise ratio", "(default: 150)"):
        assert expected in text
    for f in dataclasses.fields(config_class):
        assert f"--{f.name} " in text
    assert f"validation split (default: {config_class is TrainConfig})" in text


def test_defaults_of_model_and_diffusion_are_those_of_the_flags():
    defaults = model_and_diffusion_defaults()
    assert set(defaults) == (set(MODEL) | set(DIFFUSION) | {"prediction"}) - {"use_fp16"}
    assert all(value == getattr(TrainConfig(), name) for name, value in defaults.items())


@pytest.mark.parametrize(
    ("text", "value"),
    [("True", True), ("true", True), ("1", True), ("yes", True), ("False", False), ("0", False), ("No", False)],
)
def test_booleans(text, value):
    assert parse(TrainConfig, f"--learn_sigma {text}")[0].learn_sigma is value


@pytest.mark.parametrize("config_class", BOTH)
@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("--lerning_rate 1", "--lerning_rate"),
        ("--image_siz 64", "--image_siz"),  # no abbreviations
        ("--learn_sigma maybe", "--learn_sigma: expected True or False, found 'maybe'"),
        ("--learn_sigma", "--learn_sigma: expected one argument"),
        ("--noise_schedule quadratic", "--noise_schedule: invalid choice: 'quadratic'"),
        ("--dataset_mode kitti", "--dataset_mode: invalid choice: 'kitti'"),
        ("--preset big", "--preset: invalid choice: 'big'"),
        ("--num_classes 3.5", "--num_classes: invalid int value: '3.5'"),
        ("stray", "stray"),
    ],
)
def test_bad_flags_are_one_line_and_exit_code_2(capsys, config_class, line, named):
    assert named in refused(capsys, config_class, line)


@pytest.mark.parametrize(
    ("config_class", "line"), [(TrainConfig, "--pool med"), (TrainConfig, "--s 2"), (SampleConfig, "--lr 1e-4")]
)
def test_flags_of_the_other_script_are_unknown(capsys, config_class, line):
    assert line.split()[0] in refused(capsys, config_class, line)


# -- presets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config_class", BOTH)
@pytest.mark.parametrize("preset", PRESETS)
def test_presets_set_fields_that_exist(preset, config_class):
    config, given = parse(config_class, f"--preset {preset}")
    own = PRESETS[preset]["train" if config_class is TrainConfig else "sample"]
    for name, value in {**PRESETS[preset]["both"], **own}.items():
        assert getattr(config, name) == value, name
        assert type(value) is type(getattr(config_class(), name)), name
    assert given == {"preset"}


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_agree_between_the_scripts(preset):
    (train, _), (sample, _) = (parse(config_class, f"--preset {preset}") for config_class in BOTH)
    assert {name: getattr(train, name) for name in FIXED_BY_TRAINING} == {
        name: getattr(sample, name) for name in FIXED_BY_TRAINING
    }
    assert train.checkpoint_dir == sample.model_path
    assert train.drop_rate == 0.1 and train.add_noise


@pytest.mark.parametrize("line", ["--preset toy --image_size 32 --lr 0.5", "--image_size 32 --lr 0.5 --preset toy"])
def test_explicit_flags_override_presets(line):
    config, given = parse(TrainConfig, line)
    assert (config.image_size, config.lr, config.num_channels) == (32, 0.5, 32)
    assert given == {"preset", "image_size", "lr"}


def test_an_explicit_default_overrides_a_preset():
    assert parse(TrainConfig, "--preset toy --prediction eps --noise_schedule linear")[0].prediction == "eps"
    assert parse(TrainConfig, "--preset cityscapes --precision fp32")[0].precision == "fp32"
    assert parse(TrainConfig, "--preset cityscapes --use_fp16 True")[0].precision == "fp16"
    assert parse(TrainConfig, "--preset toy --predict_xstart True")[0].prediction == "x0"


# -- settling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "prediction"),
    [("--predict_xstart True", "x0"), ("--prediction x0", "x0"), ("--prediction v", "v"), ("", "eps")],
)
def test_predict_xstart_and_prediction_say_the_same(line, prediction):
    config, _ = parse(TrainConfig, line)
    assert config.prediction == prediction and config.predict_xstart is (prediction == "x0")


@pytest.mark.parametrize(
    ("line", "sampler"),
    [
        ("", "ddpm"),
        ("--use_ddim True", "ddim"),
        ("--use_ddim False", "ddpm"),
        ("--sampler ddim", "ddim"),
        ("--sampler dpm++", "dpm++"),
        ("--use_ddim True --sampler ddim", "ddim"),
        ("--use_ddim False --sampler dpm++", "dpm++"),
        ("--use_ddim True --sampler ''", "ddim"),
        ("--preset toy", "ddim"),
        ("--preset toy --use_ddim False", "ddpm"),
        ("--preset toy --sampler ddpm", "ddpm"),
        ("--preset toy --sampler dpm++", "dpm++"),
    ],
)
def test_use_ddim_and_sampler_say_the_same(line, sampler):
    config, given = parse(SampleConfig, line)
    assert config.sampler == sampler and config.use_ddim is (sampler == "ddim")
    adopt_training_config(config, given, trained(), "config.json")  # settles once more
    assert config.sampler == sampler and config.use_ddim is (sampler == "ddim")


@pytest.mark.parametrize(
    ("line", "precision"),
    [
        ("", "fp32"),
        ("--use_fp16 True", "fp16"),
        ("--precision bf16", "bf16"),
        ("--use_fp16 True --precision fp16", "fp16"),
    ],
)
def test_use_fp16_and_precision_say_the_same(line, precision):
    assert parse(TrainConfig, line)[0].precision == precision


@pytest.mark.parametrize(
    ("config_class", "line", "message"),
    [
        (TrainConfig, "--class_cond False", "--class_cond False: this network is conditional"),
        (TrainConfig, "--predict_xstart True --prediction v", "--predict_xstart True .* --prediction v"),
        (SampleConfig, "--use_fp16 True --precision bf16", "--use_fp16 True .* --precision bf16"),
        (TrainConfig, "--predict_xstart False --prediction x0", "--predict_xstart False .* --prediction x0"),
        (TrainConfig, "--use_fp16 False --precision fp16", "--use_fp16 False .* --precision fp16"),
        (TrainConfig, f"--seed {2**63}", f"--seed {2**63}: must fit in 64 bits"),
        (SampleConfig, f"--noise_bank_seed {-(2**63) - 1}", "--noise_bank_seed -.*: must fit in 64 bits"),
        (TrainConfig, "--image_size 0", "--image_size 0: must be at least 1"),
        (TrainConfig, "--num_classes -1", "--num_classes -1: must be at least 1"),
        (TrainConfig, "--batch_size 0", "--batch_size 0: must be at least 1"),
        (SampleConfig, "--batch_size 0", "--batch_size 0: must be at least 1"),
        (TrainConfig, "--diffusion_steps 0", "--diffusion_steps 0: must be at least 1"),
        (TrainConfig, "--noise_bank_size -1", "--noise_bank_size -1: must be at least 0"),
        (TrainConfig, "--lr -0.5", "--lr -0.5: must be at least 0"),
        (TrainConfig, "--lr nan", "--lr nan: must be at least 0"),
        (SampleConfig, "--label_memory inf", "--label_memory inf: expected a number of GiB"),
        (TrainConfig, "--save_interval 0", "--save_interval 0: must be at least 1"),
        (TrainConfig, "--drop_rate 1.5", "--drop_rate 1.5: must be between 0 and 1"),
        (TrainConfig, "--drop_rate nan", "--drop_rate nan: must be between 0 and 1"),
        (TrainConfig, "--dropout -0.1", "--dropout -0.1: must be between 0 and 1"),
        (SampleConfig, "--eta 2", "--eta 2.0: must be between 0 and 1"),
        (SampleConfig, "--s 0.5", "--s 0.5: must be at least 1"),
        (SampleConfig, "--num_samples 0", "--num_samples 0: must be at least 1"),
        (SampleConfig, "--stop_tol -1", "--stop_tol -1.0: must be at least 0"),
        (SampleConfig, "--snr loud", "--snr loud: expected dB"),
        (SampleConfig, "--snr 10,", None),
        (SampleConfig, "--snr ,", "--snr ,: expected at least one"),
        (SampleConfig, "--snr 10,inf --link digital", "--snr 10,inf: expected at least one finite"),
        (SampleConfig, "--snr 10,0.5", "--snr 0.5: GESCO's table"),
        (SampleConfig, "--snr -3 --link digital", None),
        (SampleConfig, "--snr -3 --link digital,analog", "--snr -3: GESCO's table"),
        (TrainConfig, "--snr 0.5", "--snr 0.5: GESCO's table"),
        (SampleConfig, "--link radio", "--link radio: choose from analog, digital, ideal"),
        (SampleConfig, "--pool None,big", "--pool big: choose from None, med"),
        (SampleConfig, "--metrics psnr,beauty", "--metrics beauty: choose from psnr"),
        (SampleConfig, "--baseline gif", "--baseline gif: choose from jpeg"),
        (SampleConfig, "--code_rate 0.1", "--code_rate 0.1: 5G LDPC"),
        (SampleConfig, "--role receive", "--role receive needs --messages"),
        (SampleConfig, "--role transmit --snr 10,20", "--role transmit: one run makes one set"),
        (SampleConfig, "--noise_index ²", "--noise_index ²: expected random, best or a number"),
        (SampleConfig, "--noise_index 1000 --noise_bank_size 1000", "--noise_index 1000: expected .* from 0 to 999"),
        (SampleConfig, "--noise_index best --candidates 9 --noise_bank_size 8", "--candidates 9: the noise bank has 8"),
        (SampleConfig, "--noise_index best --noise_bank_size 0", "--noise_bank_size 0: noise selection needs"),
        (SampleConfig, "--link digital --noise_bank_size 0", "--noise_bank_size 0: .* only --link analog"),
        (SampleConfig, "--selection per_step --noise_index best", "--selection per_step starts from entry 0; .* both"),
        (SampleConfig, "--selection per_step --use_ddim True", "--selection per_step needs ancestral"),
        (SampleConfig, "--selection per_step --use_ddim True --eta 1", None),
        (SampleConfig, "--selection per_step --sampler ddim --eta 1", None),
        (SampleConfig, "--selection per_step --sampler dpm++ --eta 1", r"per_step needs ancestral .* \(not dpm\+\+\)"),
        (SampleConfig, "--use_ddim True --sampler dpm++", r"--use_ddim True is --sampler ddim, but --sampler dpm\+\+"),
        (SampleConfig, "--use_ddim True --sampler ddpm", "--use_ddim True is --sampler ddim, but --sampler ddpm"),
        (SampleConfig, "--use_ddim False --sampler ddim", "--use_ddim False contradicts --sampler ddim"),
        (SampleConfig, "--selection per_step --step_candidates 4 --step_atoms 5", "--step_atoms 5: more than"),
        (SampleConfig, "--selection both --stop_tol 0.1", "--selection both: .* drop --stop_tol"),
    ],
)
def test_values_that_cannot_be_meant(config_class, line, message):
    if message is None:
        parse(config_class, line)
        return
    with pytest.raises(InputError, match=message):
        parse(config_class, line)


# -- points of a sweep ------------------------------------------------------------------------------------------------


def test_a_single_point_keeps_its_folder():
    (point,) = points(parse(SampleConfig, "--snr 10 --pool med --results_path r")[0])
    assert (point.snr, point.pool, point.link, point.results_path) == (10.0, "med", "analog", "r")


def test_equal_points_are_run_once():
    found = points(parse(SampleConfig, "--snr 10,10.0,10.0000001 --pool None,None --results_path r")[0])
    assert [p.results_path for p in found] == ["r/analog_10dB", "r/analog_10.0000001dB"]


def test_the_banks_size_is_checked_once_it_is_known():
    config, given = parse(SampleConfig, "--noise_index best --candidates 2000")
    adopt_training_config(config, given, trained("--noise_bank_size 5000"), "config.json")
    check_bank(config, given)
    assert config.candidates == 2000
    config, given = parse(SampleConfig, "--noise_index 1500")
    with pytest.raises(InputError, match=r"--noise_index 1500: .* 0 to 999"):
        check_bank(config, given)


def test_every_link_pool_and_snr_gets_a_folder_of_its_own():
    found = points(parse(SampleConfig, "--snr 10,2.5 --pool None,med --link analog,digital,ideal --results_path r")[0])
    assert [(p.link, p.pool, p.snr) for p in found] == [
        ("analog", "None", 10.0),
        ("analog", "None", 2.5),
        ("analog", "med", 10.0),
        ("analog", "med", 2.5),
        ("digital", "None", 10.0),
        ("digital", "None", 2.5),
        ("ideal", "None", float("inf")),
    ]
    assert [p.results_path for p in found] == [
        "r/analog_10dB",
        "r/analog_2.5dB",
        "r/analog_med_10dB",
        "r/analog_med_2.5dB",
        "r/digital_10dB",
        "r/digital_2.5dB",
        "r/ideal",
    ]


def test_selecting_both_searches_for_the_start():
    assert parse(SampleConfig, "--selection both")[0].noise_index == "best"
    assert parse(SampleConfig, "--selection both --noise_index 7")[0].noise_index == "7"


# -- config.json ------------------------------------------------------------------------------------------------------


def test_config_json_round_trip(tmp_path):
    config, _ = parse(TrainConfig, "--preset toy --lr 0.002 --data_dir 'a b/é'")
    save_config(config, tmp_path / "config.json")
    loaded = load_config(tmp_path / "config.json")
    assert loaded == dataclasses.asdict(config)
    assert TrainConfig(**loaded) == config
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_print_config_is_json(capsys):
    print_config(parse(SampleConfig, "--preset toy")[0])
    assert json.loads(capsys.readouterr().out)["timestep_respacing"] == "25"


@pytest.mark.parametrize(("content", "found"), [("{", "cannot be read"), ("[1]", "found list"), ("", "cannot be read")])
def test_a_damaged_config_json_is_named(tmp_path, content, found):
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(InputError, match=rf"config\.json: .*{found}"):
        load_config(path)


def test_a_binary_and_a_missing_config_json_are_named(tmp_path):
    with pytest.raises(InputError, match=r"config\.json: cannot be read"):
        load_config(tmp_path / "config.json")
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"config\.json: cannot be read"):
        load_config(tmp_path / "config.json")


def trained(line="--preset toy --learn_sigma True"):
    return dataclasses.asdict(parse(TrainConfig, line)[0])


def test_sampling_takes_what_training_fixed():
    config, given = parse(SampleConfig, "--timestep_respacing ddim5 --batch_size 3")
    adopt_training_config(config, given, trained("--preset toy --learn_sigma True --noise_bank_size 50"), "config.json")
    assert (config.image_size, config.learn_sigma, config.prediction, config.noise_bank_size) == (32, True, "x0", 50)
    assert (config.timestep_respacing, config.batch_size, config.is_train) == ("ddim5", 3, False)


def test_training_values_win_over_the_sampling_preset():
    config, given = parse(SampleConfig, "--preset toy")
    adopt_training_config(config, given, trained("--preset toy --num_channels 64"), "config.json")
    assert config.num_channels == 64


def test_flags_that_agree_are_accepted():
    config, given = parse(SampleConfig, "--learn_sigma True --num_channels 32")
    adopt_training_config(config, given, trained(), "config.json")
    assert config.num_channels == 32


@pytest.mark.parametrize(
    ("line", "asked", "value"),
    [
        ("--num_channels 64", "--num_channels 64", "32"),
        ("--learn_sigma False", "--learn_sigma False", "True"),
        ("--prediction eps", "--prediction eps", "x0"),
        ("--noise_bank_seed 7", "--noise_bank_seed 7", "150"),
        ("--image_size 128", "--image_size 128", "32"),
        ("--noise_bank_size 0", "--noise_bank_size 0", "1000"),
    ],
)
def test_a_contradiction_names_both_values(line, asked, value):
    config, given = parse(SampleConfig, line)
    with pytest.raises(InputError, match=rf"{asked} contradicts .* {value} \(runs/config\.json\)"):
        adopt_training_config(config, given, trained(), "runs/config.json")


@pytest.mark.parametrize(("name", "value"), [("num_channels", "32"), ("learn_sigma", 1), ("image_size", None)])
def test_a_value_of_the_wrong_type_is_named(name, value):
    config, given = parse(SampleConfig)
    with pytest.raises(InputError, match=f"config.json: {name} is {value!r}, which this flag does not take"):
        adopt_training_config(config, given, {**trained(), name: value}, "config.json")


def test_source_coding_comes_from_training_and_a_difference_is_said():
    config, given = parse(SampleConfig)
    assert adopt_training_config(config, given, trained("--edge_levels 2 --label_scale 2"), "config.json") == []
    assert (config.edge_levels, config.label_scale) == (2, 2)
    config, given = parse(SampleConfig, "--edge_levels 2 --label_scale 4")
    lines = adopt_training_config(config, given, trained("--edge_levels 2"), "config.json")
    assert lines == ["--label_scale 4 is not what the checkpoint was trained with (1, config.json)"]
    assert (config.edge_levels, config.label_scale) == (2, 4)


def test_before_source_coding_checkpoints_saw_all_edges():
    config, given = parse(SampleConfig)
    adopt_training_config(config, given, {"num_channels": 64}, "config.json")
    assert (config.edge_levels, config.label_scale) == (256, 1)


def test_an_older_config_json_may_lack_flags():
    config, given = parse(SampleConfig, "--num_res_blocks 1")
    adopt_training_config(config, given, {"num_channels": 64}, "config.json")
    assert (config.num_channels, config.num_res_blocks) == (64, 1)


@pytest.mark.parametrize("resume", ["auto", "model000010.pt"])
def test_a_resumed_run_keeps_its_architecture(tmp_path, resume):
    save_config(TrainConfig(**trained()), tmp_path / "config.json")
    (tmp_path / "model000010.pt").touch()
    resumed = resume if resume == "auto" else tmp_path / resume
    line = f"--resume_checkpoint {resumed} --checkpoint_dir {tmp_path}"
    config, given = parse(TrainConfig, line)
    adopt_resumed(config, given)
    assert (config.num_channels, config.prediction) == (32, "x0")
    config, given = parse(TrainConfig, f"{line} --num_channels 64")
    with pytest.raises(InputError, match=r"--num_channels 64 contradicts .* 32"):
        adopt_resumed(config, given)


def test_a_fresh_run_ignores_what_lies_in_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_config(TrainConfig(**trained()), tmp_path / "config.json")
    config, given = parse(TrainConfig, f"--checkpoint_dir {tmp_path}")
    adopt_resumed(config, given)
    assert config.num_channels == 128


def test_create_parser_keeps_flags_that_are_not_given_out():
    parsed = create_parser(TrainConfig, "test").parse_args(["--lr", "1"])
    assert vars(parsed) == {"lr": 1.0}


# -- damaged and malicious config.json ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "contents",
    [
        b"[" * 10**6,
        b"\x80\x04c__builtin__\nexec\n(S'boom'\ntR.",
        b" " * 2**21 + b"{}",
        b"",
        b'{"lr": ' + b"9" * 5000 + b"}",
        b"\xff\xfe",
    ],
)
def test_a_config_that_is_none_is_refused(tmp_path, contents):
    path = tmp_path / "config.json"
    path.write_bytes(contents)
    with pytest.raises(InputError, match=re.escape(str(path))):
        load_config(path)


def test_flipped_bits_in_a_config_are_recognised(tmp_path):
    path, draw = tmp_path / "config.json", random.Random(0)
    config = TrainConfig(noise_bank_seed=150, num_channels=64)
    save_config(config, path)
    good, refused = path.read_bytes(), 0
    for _ in range(300):
        bad = bytearray(good)
        bad[draw.randrange(len(bad))] ^= 1 << draw.randrange(8)
        path.write_bytes(bad)
        try:
            # White space may change, or the digest's own name.
            assert load_config(path).items() >= dataclasses.asdict(config).items()
        except InputError:
            refused += 1
    assert refused > 200


def test_a_config_without_a_digest_is_taken(tmp_path):
    (tmp_path / "config.json").write_text('{"lr": 0.1}')
    assert load_config(tmp_path / "config.json") == {"lr": 0.1}
