"""docs/equal_bits.py: its cells are flags of image_sample.py, run once, and become tables and figures."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import as_arguments
from PIL import Image

from guided_diffusion.config import SampleConfig, parse_config, unused_flags
from guided_diffusion.console import InputError
from guided_diffusion.data.pictures import save_picture
from guided_diffusion.flags import METRICS

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


@pytest.mark.skipif("swd" not in METRICS, reason="the study needs measures that are not there yet")
def test_cells_are_flags_that_have_an_effect(study, options):
    for part, cell in every(study):
        config, given = parse_config(SampleConfig, "", study.cell_flags(part, cell, options))
        assert unused_flags(config, given) == [], (part, cell)


def test_cells_differ_and_have_folders_of_their_own(study, options):
    cells = every(study)
    assert len({study.folder_of(*cell, options) for cell in cells}) == len(cells) > 15
    for part in study.CELLS:
        own = [tuple(study.cell_flags(*cell, options)) for cell in cells if cell[0] == part]
        assert len({*own}) == len(own)


def test_codecs_cross_the_air_without_their_containers(study, options):
    words = study.cell_flags("link", "awgn", options)
    assert words[words.index("--baseline") + 1] == "jxl,jpeg-bare,webp-bare,avif-bare"


def test_parse_refuses_unknown_parts_and_a_lacking_extractor(study):
    needed = [
        word for name in ("data_dir", "model_path", "output", "segmenter", "features") for word in (f"--{name}", "x")
    ]
    with pytest.raises(InputError, match="--parts speed: choose from rates, "):
        study.parse([*needed, "--parts", "rates,speed"])
    with pytest.raises(InputError, match="needs --extractor"):
        study.parse(needed)
    assert study.parse([*needed, "--parts", "rates,panel"]).num_samples == 40


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


def finish(folder, shift=0.0, snr=None, codecs=("webp-bare", "avif-bare"), pictures=8):
    """Write what a run leaves in a results folder."""

    air = {} if snr is None else {"channel_uses": 3276.8}

    def measured(value, bits):
        mean = {"psnr_db": value, "ssim": 0.5, "bpp": bits / 32768, **air}
        whole = {"kid_features": 0.01, "miou": value / 100, "miou_real": 0.41, "swd_128": 58.0}
        ends = {"interval_95": {"psnr_db": [value - 1, value + 1]}}
        return {"mean": mean, "set": whole, **ends, "set_interval_95": {"miou": [0.1, 0.3]}}

    lost = 0 if snr is None or snr > 6 else pictures
    summary = {"picture": "128x256", "pictures": pictures, "with_problems": lost, **measured(20 + shift, 3200)}
    parts = {"header": 80, "labels": 1000, "edges": 0, "indices": 20, "color": 2100, "total": 3200}
    summary["mean"] |= {f"bits_{part}": bits for part, bits in parts.items()}
    if snr is not None:
        summary["snr_db"] = f"{snr:g}"
    found = {"container_bytes": 30, "without_picture": lost and pictures // 2}
    summary["baselines"] = {codec: {**found, **measured(22 + shift, 3100)} for codec in codecs}
    for own in summary["baselines"].values():
        own["mean"]["bits"] = 3100
    (folder / "messages").mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps(summary))
    with open(folder / "results.csv", "w", newline="") as f:
        writer = csv.writer(f)
        writer.writerows([["name", "bits_total"], *([f"p{k}", 3200 + k] for k in range(pictures))])
    for k in range(pictures):
        (folder / "messages" / f"p{k}.dgo").write_bytes(bytes([k]))
        for n, kind in enumerate(["images", "samples", *(f"baseline_{codec}" for codec in codecs)]):
            save_picture(np.full((16, 32, 3), 20 * k + n, np.uint8), folder / kind / f"p{k}.png")


def done(study, options, part, cell):
    (study.folder_of(part, cell, options) / "command.txt").write_text("done")


@pytest.fixture
def finished(study, options):
    """A study of which rates, realism and one link are done."""
    pytest.importorskip("matplotlib")
    for k, cell in enumerate(study.CELLS["rates"]):
        finish(study.folder_of("rates", cell, options), k)
        done(study, options, "rates", cell)
    for cell in study.CELLS["realism"]:
        finish(study.folder_of("realism", cell, options), codecs=())
        done(study, options, "realism", cell)
    for snr in (10, 2, 6):
        finish(study.folder_of("link", "awgn", options) / f"digital_{snr}dB", snr / 10, snr)
    done(study, options, "link", "awgn")
    finish(study.folder_of("ablation", "map alone", options))  # not done
    return Path(options.output)


def test_report_writes_a_row_for_every_line_of_every_cell(study, options, finished):
    study.report(options)
    study.report(options)  # anew, not appended
    with open(finished / "equal_bits.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert len(rows) == 4 * 3 + 3 + 3 * 3
    row = next(row for row in rows if (row["cell"], row["line"]) == ("0.20 bpp", "ours"))
    assert (row["part"], row["psnr_db"], row["psnr_db_low"], row["miou_high"]) == ("rates", "22", "21", "0.3")
    assert float(row["bpp_max"]) == pytest.approx(3207 / 32768) and row["uses_per_pixel"] == ""
    air = [row for row in rows if row["part"] == "link" and row["line"] == "webp-bare"]
    found = [(row["snr_db"], float(row["lost"]), float(row["uses_per_pixel"])) for row in air]
    assert found == [("2", 0.5, pytest.approx(0.1)), ("6", 0.5, pytest.approx(0.1)), ("10", 0, pytest.approx(0.1))]


def test_tables_say_what_the_parts_are_to_show(study, options, finished):
    study.report(options)
    text = (finished / "tables.md").read_text()
    assert [line for line in text.splitlines() if line[:2] == "##"] == ["## rates", "## realism", "## link"]
    assert sum(line.startswith("| 0.10 bpp |") for line in text.splitlines()) == 1
    assert "- 0.10 bpp: 0.0977 bits per pixel in the mean, at most 0.0979" in text
    assert "3 runs of 8 messages, equal: True" in text
    assert "| awgn, ours | 0.100 | 6 dB |" in text and "| awgn, webp-bare | 0.100 | none |" in text
    changed = study.folder_of("realism", "realism 1", options) / "messages" / "p3.dgo"
    changed.write_bytes(b"other")
    study.report(options)
    assert "3 runs of 8 messages, equal: False" in (finished / "tables.md").read_text()


def test_figures_are_drawn_and_the_panel_has_six_pictures(study, options, finished):
    study.report(options)
    assert all(Image.open(finished / f"{name}.png").size[0] > 500 for name in ("rates", "link"))
    panel = np.asarray(Image.open(finished / "panel.png"))  # tiles are enlarged to 192 pixels and more
    shown = {int(value) for value in panel[:, 100::196].reshape(-1, 3)[:, 0]}
    assert {20 * k + n for k in (0, 1, 3, 4, 6, 7) for n in range(4)} <= shown | {*range(4)}
    assert not {20 * k for k in (2, 5)} & shown
