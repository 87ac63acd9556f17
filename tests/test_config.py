"""Flags, presets and validation."""

import dataclasses
import re
import shlex

import pytest

from guided_diffusion import config as table
from guided_diffusion.config import (
    PRESETS,
    SampleConfig,
    TrainConfig,
    adopt_training_config,
    check_adopted,
    check_flag,
    model_and_diffusion_defaults,
    parse_config,
    surprises,
    sweep,
    unused_flags,
)
from guided_diffusion.console import InputError

BOTH = [TrainConfig, SampleConfig]

# The flags of the family's two public scripts, with a value that is not the default.
MODEL = """--image_size 256 --num_classes 151 --num_channels 64 --num_res_blocks 3 --num_heads 2 --num_heads_upsample 1
    --num_head_channels 64 --attention_resolutions 32,16,8 --channel_mult 1,2 --dropout 0.1 --class_cond True
    --use_checkpoint True --use_scale_shift_norm False --resblock_updown True --use_new_attention_order True
    --no_instance True --one_hot_label False --unet_model spadeboth"""
DIFFUSION = """--learn_sigma True --diffusion_steps 500 --noise_schedule cosine --timestep_respacing ddim50
    --use_kl True --predict_xstart True --rescale_timesteps True --rescale_learned_sigmas True"""
SHARED = "--use_fp16 True --snr 12.5 --add_noise True --noise_to label --data_dir /data --dataset_mode coco"
TRAIN = """--schedule_sampler loss-second-moment --lr 0.0002 --weight_decay 0.05 --lr_anneal_steps 10 --batch_size 4
    --microbatch 2 --ema_rate 0.9,0.99 --drop_rate 0.1 --log_interval 5 --save_interval 50 --resume_checkpoint auto
    --fp16_scale_growth 0.002 --is_train False --checkpoint_dir /runs"""
SAMPLE = """--clip_denoised False --num_samples 12 --use_ddim True --model_path /m.pt --results_path /r --is_train True
    --s 2.5 --pool max --batch_size 3"""


def parse(config_class, line=""):
    return parse_config(config_class, "test", shlex.split(line))


def values_of(line):
    words = shlex.split(line)
    return {name.removeprefix("--"): value for name, value in zip(words[::2], words[1::2], strict=True)}


def trained(line="--preset toy --rescale_timesteps True"):
    return dataclasses.asdict(parse(TrainConfig, line)[0])


# -- flags ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("config_class", "own"), [(TrainConfig, TRAIN), (SampleConfig, SAMPLE)])
def test_flags_of_the_family_are_accepted(config_class, own):
    line = f"{MODEL} {DIFFUSION} {SHARED} {own}"
    config, given = parse(config_class, line)
    assert given == {*values_of(line)}
    for name, value in values_of(line).items():
        found = getattr(config, name)
        assert str(found) == value and type(found) is type(getattr(config_class(), name)), name
        assert name == "class_cond" or found != getattr(config_class(), name), name


def test_model_and_diffusion_defaults_are_those_of_the_flags():
    defaults = model_and_diffusion_defaults()
    ours = {"prediction", "color_layer", "spade_channels"}  # which the family has not
    assert {*defaults} == {*values_of(MODEL), *values_of(DIFFUSION)} | ours
    assert all(value == getattr(TrainConfig(), name) for name, value in defaults.items())


@pytest.mark.parametrize("config_class", BOTH)
def test_flag_table_is_consistent(config_class):
    fields = {f.name: f for f in dataclasses.fields(config_class)}
    words = {"fixed_by": {"user", "training", "source", "resumed", "message"}, "free": {"training", "sampling"}}
    known = {name for each in BOTH for name in each.__dataclass_fields__}
    for name, f in fields.items():
        assert f.metadata["help"] and type(f.default) is f.type, name
        check_flag(f, f.default)
        assert all({*f.metadata[kind]} <= words[kind] for kind in words), name
        assert {need.partition("=")[0] for need in f.metadata["needs"]} <= {*table.CONDITIONS, *known}, name


@pytest.mark.parametrize("config_class", BOTH)
def test_help_groups_flags_and_shows_defaults(config_class, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(config_class, "--help")
    text = " ".join(capsys.readouterr().out.split()).replace("- ", "-")  # argparse breaks lines at hyphens
    assert stopped.value.code == 0
    for expected in ("Network", "Noise bank", "channel", "not a signal-to-noise ratio", "(default: 150)"):
        assert expected in text
    assert all(f"--{f.name} " in text for f in dataclasses.fields(config_class))
    assert f"validation split (default: {config_class is TrainConfig})" in text


def test_parse_config_reads_booleans():
    for text, value in (("True", True), ("1", True), ("yes", True), ("false", False), ("No", False)):
        assert parse(TrainConfig, f"--learn_sigma {text}")[0].learn_sigma is value


@pytest.mark.parametrize(
    ("config_class", "line", "named"),
    [
        (TrainConfig, "--lerning_rate 1", "--lerning_rate"),
        (TrainConfig, "--lern_rate 1", "--lern_rate 1; see"),  # nothing is near
        (SampleConfig, "--image_siz 64", "--image_siz 64; did you mean --image_size? see"),  # no abbreviations
        (TrainConfig, "--bachsize=4", "--bachsize=4; did you mean --batch_size? see"),
        (SampleConfig, "'' ' '", "unrecognized arguments: ''; see"),  # an empty shell variable
        (SampleConfig, "--model x", "--model x; did you mean --model_path? see"),
        (SampleConfig, "--learn_sigma", "--learn_sigma: expected one argument"),
        (TrainConfig, "--class_cond False", "--class_cond: invalid choice: False (choose from True)"),
        (TrainConfig, "--noise_schedule quadratic", "--noise_schedule: invalid choice: 'quadratic'"),
    ],
)
def test_parse_config_refuses_in_one_line(config_class, line, named):
    with pytest.raises(InputError, match=re.escape(named)) as caught:
        parse(config_class, line)
    assert "\n" not in str(caught.value)


# -- presets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_agree_between_the_scripts(preset):
    (train, given), (sample, _) = (parse(config_class, f"--preset {preset}") for config_class in BOTH)
    fixed = [f.name for f in dataclasses.fields(TrainConfig) if "training" in f.metadata["fixed_by"]]
    assert [getattr(train, name) for name in fixed] == [getattr(sample, name) for name in fixed]
    assert given == {"preset"} and train.checkpoint_dir == sample.model_path
    assert train.drop_rate == 0.1 * (preset != "gesco")
    assert train.add_noise == (preset not in ("camvid", "gesco")) == sample.use_ddim


def test_presets_give_way_to_explicit_flags():
    config, given = parse(TrainConfig, "--image_size 64 --lr 0.5 --preset toy")
    assert (config.image_size, config.lr, config.num_channels) == (64, 0.5, 32)
    assert given == {"preset", "image_size", "lr"}


# -- resolving and validating -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config_class", "line", "name", "value"),
    [
        (TrainConfig, "", "prediction", "eps"),
        (TrainConfig, "--preset cityscapes --predict_xstart True", "prediction", "x0"),
        (TrainConfig, "", "precision", "fp32"),
        (TrainConfig, "--use_fp16 True", "precision", "fp16"),
        (TrainConfig, "--preset cityscapes --use_fp16 True", "precision", "fp16"),
        (SampleConfig, "", "sampler", "ddpm"),
        (SampleConfig, "--use_ddim True", "sampler", "ddim"),
        (SampleConfig, "--use_ddim False --sampler dpm++", "sampler", "dpm++"),
        (SampleConfig, "--preset toy --use_ddim False", "sampler", "ddpm"),
        (SampleConfig, "--preset toy --sampler dpm++", "sampler", "dpm++"),
        (SampleConfig, "--selection both", "noise_index", "best"),
        (SampleConfig, "--selection both --noise_index 7", "noise_index", "7"),
    ],
)
def test_resolve_gives_flags_of_one_meaning_one_value(config_class, line, name, value):
    config, given = parse(config_class, line)
    assert getattr(config, name) == value
    assert config.predict_xstart is (config.prediction == "x0") and config.use_fp16 is (config.precision == "fp16")
    assert config_class is TrainConfig or config.use_ddim is (config.sampler == "ddim")
    adopt_training_config(config, given, {}, "config.json")  # resolves once more
    assert getattr(config, name) == value


@pytest.mark.parametrize(
    ("config_class", "line", "message"),
    [
        (TrainConfig, "--predict_xstart True --prediction v", "--predict_xstart True contradicts --prediction v"),
        (SampleConfig, "--use_fp16 True --precision bf16", "--use_fp16 True contradicts --precision bf16"),
        (TrainConfig, f"--seed {2**63}", f"--seed {2**63}: must be between"),
        (TrainConfig, "--lr nan", "--lr nan: must be at least 0"),
        (SampleConfig, "--label_memory inf", "--label_memory inf: must be between"),
        (TrainConfig, "--attention_resolutions 8,x", "--attention_resolutions 8,x: expected numbers"),
        (TrainConfig, "--ema_rate 0.9,1", "--ema_rate 0.9,1: must be between 0 and 0.999999"),
        (SampleConfig, "--snr loud", "--snr loud: expected numbers"),
        (SampleConfig, "--snr -3 --link digital,analog", "--snr -3: GESCO's table, of --link analog, begins at 1 dB"),
        (SampleConfig, "--link radio", "--link radio: choose from analog, digital, ideal"),
        (SampleConfig, "--role receive", "--role receive needs --messages"),
        (SampleConfig, "--send ''", "--send : give at least one"),
        (SampleConfig, "--noise_index ²", "--noise_index ²: expected random, best or a number"),
        (SampleConfig, "--selection per_step --noise_index best", "--selection per_step starts from entry 0; .* both"),
        (SampleConfig, "--selection per_step --sampler dpm++ --eta 1", "per_step needs --sampler ddpm"),
        (SampleConfig, "--selection both --stop_tol 0.1", "--selection both: .* drop --stop_tol"),
    ],
)
def test_validate_names_flag_and_value(config_class, line, message):
    with pytest.raises(InputError, match=message):
        parse(config_class, line)


@pytest.mark.parametrize(
    "line",
    [
        "--snr 10,",
        "--snr -3 --link digital",
        "--selection per_step --sampler ddim --eta 1",
        "--preset camvid --send labels --label_scale 1 --target_bpp 0",
        "--preset camvid --target_bytes 400",
    ],
)
def test_validate_accepts_what_makes_sense(line):
    check_adopted(*parse(SampleConfig, line))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--noise_index 1000 --noise_bank_size 1000", "--noise_index 1000: expected .* from 0 to 999"),
        ("--noise_index best --candidates 9 --noise_bank_size 8", "--candidates 9: the noise bank has 8"),
        ("--link digital --noise_bank_size 0", "--noise_bank_size 0: .* only --link analog"),
        ("--selection per_step --noise_bank_size 4 --step_atoms 5", "--step_atoms 5: there are 4"),
        ("--send color", "--send color: this network has no colour layer"),
        ("--preset toy --color_step 0", "--color_step 0: a target decides"),
        ("--preset camvid --target_bpp 0", "--label_scale 0: a target decides"),
        ("--target_bpp 0.1 --target_bytes 9", "--target_bpp 0.1 and --target_bytes 9: give one"),
        ("--start_time 1001", "--start_time 1001: there are 1000 --diffusion_steps"),
        ("--color_layer True", "--color_layer True needs --prediction v or x0 .*--prediction eps"),
    ],
)
def test_check_adopted_names_flag_and_value(line, message):
    with pytest.raises(InputError, match=message):
        check_adopted(*parse(SampleConfig, line))


def test_check_adopted_follows_what_training_fixed():
    config, given = parse(SampleConfig, "--noise_index best --candidates 2000 --send color --color_layer True")
    adopt_training_config(config, given, trained("--preset toy --noise_bank_size 5000"), "config.json")
    check_adopted(config, given)
    assert config.candidates == 2000
    config, given = parse(SampleConfig, "--noise_index best")
    config.noise_bank_size = 8
    check_adopted(config, given)
    assert (config.candidates, config.step_candidates) == (8, 8)


# -- unused flags -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config_class", "line", "unused"),
    [
        (TrainConfig, "--fp16_scale_growth 1e-3", "fp16_scale_growth"),
        (TrainConfig, "--snr 10 --noise_to label", "snr noise_to"),
        (TrainConfig, "--patience 3 --eval_items 4", "patience eval_items"),
        (TrainConfig, "--patience 3 --eval_interval 10 --min_delta 0.1 --snr 10 --add_noise True", ""),
        (TrainConfig, "--microbatch 2 --batch_size 2", "microbatch"),
        (TrainConfig, "--num_heads 2 --num_head_channels 32", "num_heads"),
        (TrainConfig, "--rescale_learned_sigmas True --learn_sigma True --use_kl True", "rescale_learned_sigmas"),
        (TrainConfig, "--edge_threshold 0.2 --edge_scale 2", "edge_threshold edge_scale"),
        (TrainConfig, "--no_instance True --edge_levels 2 --add_noise True --noise_to label", "edge_levels noise_to"),
        (TrainConfig, "--cache_dir c --dataset_mode coco", "cache_dir"),
        (SampleConfig, "--preset cityscapes", ""),
        (SampleConfig, "--add_noise True --noise_to label --snr 10", "add_noise noise_to"),
        (SampleConfig, "--use_checkpoint True --dropout 0.1 --use_kl True", "use_checkpoint dropout use_kl"),
        (SampleConfig, "--link ideal --snr 10 --pool med", "snr pool"),
        (SampleConfig, "--candidates 4 --distance ssim --feedback_steps 3", "candidates distance feedback_steps"),
        (SampleConfig, "--candidates 4 --feedback_steps 3 --noise_index best", "feedback_steps"),
        (SampleConfig, "--distance ssim --selection per_step --local_picture True", "local_picture"),
        (SampleConfig, "--use_ddim True --tail_steps 3", "tail_steps"),
        (SampleConfig, "--step_candidates 4 --step_atoms 1 --selected_steps 3 --selection per_step", ""),
        (SampleConfig, "--features f --fid_weights w --lpips_weights l", "features fid_weights lpips_weights"),
        (SampleConfig, "--features f.pt --metrics kid --link digital --snr 10 --stop_tol 0.1 --stop_patience 2", ""),
        (SampleConfig, "--role receive --messages m --s 2 --extractor e.pt --sampler ddim", "s extractor sampler"),
        (SampleConfig, "--role receive --messages m --metrics psnr --seed 3 --cache_dir c", "metrics seed cache_dir"),
    ],
)
def test_unused_flags_get_one_line_each(config_class, line, unused):
    lines = unused_flags(*parse(config_class, line))
    assert sorted(text.split()[0] for text in lines) == sorted(f"--{name}" for name in unused.split())
    assert all("has no effect: " in text for text in lines)


def test_unused_flags_name_what_a_flag_needs():
    lines = unused_flags(*parse(SampleConfig, "--step_atoms 2 --eta 0.5"))
    assert "--step_atoms 2 has no effect: it needs --selection per_step or both (now 'initial')" in lines
    assert "--eta 0.5 has no effect: it needs --sampler ddim (now 'ddpm')" in lines


def test_surprises_name_other_edges_and_a_clean_snr():
    theirs = "--image_size 64 --num_channels 64"
    for line, trained, words in (
        (theirs, None, ["--preset gesco sets it"]),
        ("--image_size 64 --snr 100", None, []),
        (f"{theirs} --edge_levels 0", None, []),
        (f"{theirs} --preset toy --snr 120", None, ["--snr 120"]),
        ("", {}, ["--preset gesco sets it"]),
        (theirs, {"image_size": 64}, []),
        ("--preset gesco --snr 5,101", {}, ["--snr 5,101: from 100 dB on"]),
        ("--link digital --snr 120 --edge_levels 2", {}, []),
    ):
        found = surprises(*parse(TrainConfig if trained is None else SampleConfig, line), trained)
        assert len(found) == len(words) and all(word in text for word, text in zip(words, found, strict=True)), line


# -- sweep ------------------------------------------------------------------------------------------------------------


def test_sweep_gives_every_link_pool_and_snr_a_folder_and_equal_ones_one():
    line = "--snr 10,2.5,10.0 --pool None,med,med --link analog,digital,ideal --results_path r"
    found = {copy.results_path: (copy.link, copy.pool, copy.snr) for copy in sweep(parse(SampleConfig, line)[0])}
    assert found == {
        "r/analog_10dB": ("analog", "None", 10.0),
        "r/analog_2.5dB": ("analog", "None", 2.5),
        "r/analog_med_10dB": ("analog", "med", 10.0),
        "r/analog_med_2.5dB": ("analog", "med", 2.5),
        "r/digital_10dB": ("digital", "None", 10.0),
        "r/digital_2.5dB": ("digital", "None", 2.5),
        "r/ideal": ("ideal", "None", float("inf")),
    }
    (one,) = sweep(parse(SampleConfig, "--snr 10 --pool med --results_path r")[0])
    assert (one.snr, one.pool, one.link, one.results_path) == (10.0, "med", "analog", "r")
