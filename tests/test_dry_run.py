"""The dry run."""

from conftest import TINY, TRAIN, as_arguments

from guided_diffusion.config import SampleConfig, TrainConfig, parse_config
from guided_diffusion.dry_run import dry_run


def test_dry_run_of_training_reports_and_writes_nothing(scenes, tmp_path):
    flags = {"data_dir": scenes, "checkpoint_dir": tmp_path / "none", **TINY, **TRAIN}
    config, _ = parse_config(TrainConfig, "", as_arguments(flags))
    lines = []
    dry_run(config, lines.append)
    text = "\n".join(lines)
    for words in ("pictures: 6 of 16x32", "class   7", "parameters: ", "memory estimate: "):
        assert words in text
    assert not (tmp_path / "none").exists()


def test_dry_run_of_sampling_checks_weights_where_they_exist(scenes, trained):
    flags = {"data_dir": scenes, **TINY}
    config, _ = parse_config(SampleConfig, "", as_arguments(flags))
    lines = []
    dry_run(config, lines.append, weights=str(trained / "ema_0.9_000004.pt"))
    dry_run(config, lines.append, weights="nowhere/ema.pt")
    assert any("ema_0.9_000004.pt: fits" in line for line in lines)
    assert any("nowhere/ema.pt: does not exist" in line for line in lines)
