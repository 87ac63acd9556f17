"""docs/equal_bits.py: its cells are flags of image_sample.py, and each is run until it is done."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import as_arguments

from guided_diffusion.config import SampleConfig, parse_config, unused_flags

DOCS = Path(__file__).resolve().parent.parent / "docs"
CODECS = "jpeg,webp,avif,jxl,jpeg-bare,webp-bare,avif-bare"


@pytest.fixture
def study(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS))
    return __import__("equal_bits")


@pytest.fixture
def options(study, tmp_path):
    files = dict.fromkeys(("segmenter", "features", "extractor", "model_path"), "net.pt")
    return study.parse(as_arguments({"data_dir": "scenes", "output": tmp_path, "codecs": CODECS, **files}))


def every(study):
    return [(part, cell) for part, cells in study.CELLS.items() for cell in cells]


def test_cells_are_flags_that_have_an_effect(study, options):
    for part, cell in every(study):
        config, given = parse_config(SampleConfig, "", study.cell_flags(part, cell, options))
        assert unused_flags(config, given) == [], (part, cell)


def test_cell_runs_until_it_is_done_with_these_flags(study, options, monkeypatch):
    codes, ran = [1, 0, 0], []

    def run(command):
        ran.append(command)
        study.folder_of("realism", "realism 0", options).mkdir(parents=True, exist_ok=True)
        return SimpleNamespace(returncode=codes.pop(0))

    monkeypatch.setattr(study.subprocess, "run", run)
    assert [study.run_cell("realism", "realism 0", options) for _ in range(3)] == [False, True, True]
    assert len(ran) == 2 and ran[0] == ran[1]
    assert ran[0][1:] == [
        str(DOCS.parent / "image_sample.py"),
        *study.cell_flags("realism", "realism 0", options),
        "--results_path",
        str(study.folder_of("realism", "realism 0", options)),
    ]
    options.num_samples = 50
    assert study.run_cell("realism", "realism 0", options) and len(ran) == 3
