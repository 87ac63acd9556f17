"""Curves of a sweep: the table, and which panels the figure has."""

import math
import sys

import pytest
from PIL import Image

from guided_diffusion.evaluation import curves
from guided_diffusion.evaluation.curves import write_curves


def point(psnr, problems=0, ratio=0.5, **more):
    mean = {"psnr_db": psnr, "bandwidth_ratio": ratio}
    return {"mean": mean, "set": {"miou": 0.5}, "pictures": 4, "with_problems": problems, **more}


JPEG = {"jpeg": {"mean": {"psnr_db": 15.0}, "set": {}, "without_picture": 2}}
SUMMARIES = [
    ("analog", "None", 10.0, point(20.0, interval_95={"psnr_db": [19.5, 20.25]})),
    ("analog", "med", 10.0, point(19.0)),
    ("digital", "None", 5.0, point("inf", 1, 0.25, baselines=JPEG)),
    ("ideal", "None", math.inf, point(21.0)),
]


@pytest.fixture
def panels(monkeypatch):
    """What each panel was given: list of (axis, name -> points)."""
    pytest.importorskip("matplotlib")
    drawn, panel = [], curves._panel
    monkeypatch.setattr(curves, "_panel", lambda axis, x, *rest: drawn.append((axis, rest[0])) or panel(axis, x, *rest))
    return drawn


def test_write_curves_as_a_table(tmp_path):
    assert str(tmp_path) in write_curves(tmp_path, SUMMARIES)
    assert (tmp_path / "curves.csv").read_text().splitlines() == [
        "line,snr_db,psnr_db,miou,bad_pictures,uses_per_pixel,psnr_db_low,psnr_db_high",
        "digital,5.0,inf,0.5,0.25,0.75,,",
        '"digital, jpeg",5.0,15.0,,0.5,,,',
        "analog,10.0,20.0,0.5,0.0,1.5,19.5,20.25",
        '"analog, pool med",10.0,19.0,0.5,0.0,1.5,,',
        "ideal,inf,21.0,0.5,0.0,1.5,,",
    ]


def test_write_curves_has_every_band_of_swd(tmp_path, panels):
    swd = point(21.0) | {"set": {"swd_32": 58.0, "swd_16": 9.0}, "set_interval_95": {"swd_16": [8.0, 9.5]}}
    assert "png are" in write_curves(
        tmp_path, [("analog", "None", snr, point(21.0) | swd) for snr in (100.0, 1.0, 4.0)]
    )
    titles = ["PSNR (dB)", "share of pictures with lost parts", "SWD, level 32 (finest)", "SWD, level 16"]
    assert [axis.get_ylabel() for axis, _ in panels] == titles  # one rate: no panels over it
    assert panels[3][1] == {"analog": [(1.0, 9.0, 8.0, 9.5), (4.0, 9.0, 8.0, 9.5), (100.0, 9.0, 8.0, 9.5)]}
    axis = panels[0][0]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["1", "4", "clean"] and axis.get_xlim()[1] < 10


def test_write_curves_over_the_rate_and_nothing_empty(tmp_path, panels):
    assert "png are" in write_curves(tmp_path, SUMMARIES)
    found = [(axis.get_xlabel()[:3], axis.get_ylabel()[:4]) for axis, _ in panels]
    assert found == [("SNR", "PSNR"), ("SNR", "mIoU"), ("SNR", "shar"), ("cha", "mIoU")]  # psnr: inf at the other rate
    with Image.open(tmp_path / "curves.png") as figure:
        assert figure.width > 400
    line = write_curves(tmp_path, SUMMARIES[:2])
    assert "no curves.png" in line and not (tmp_path / "curves.png").exists() and len(panels) == 4


def test_write_curves_hints_at_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    line = write_curves(tmp_path, SUMMARIES)
    assert "pip install matplotlib" in line and "\n" not in line
