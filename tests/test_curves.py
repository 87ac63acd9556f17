"""Curves of a sweep: the table, and which panels the figure has."""

import math
import sys

from guided_diffusion.evaluation.curves import write_curves


def point(psnr, problems=0, **more):
    found = {"set": {"swd_16": 9.0}, "interval_95": {}, "set_interval_95": {"swd_16": [8.0, 9.5]}, "pictures": 4}
    return found | {"mean": {"psnr_db": psnr}, "with_problems": problems} | more


SUMMARIES = [
    ("analog", "None", 100.0, point(0, mean={"psnr_db": 15.0, "bandwidth_ratio": 0.5})),
    ("analog", "None", 10.0, point(20.0, interval_95={"psnr_db": [19.5, 20.25]})),
    ("digital", "med", 5.0, point("inf", 1, baselines={"jpeg": point(15.0, without_picture=2)})),
    ("ideal", "None", math.inf, point(21.0)),
]


def test_write_curves_as_a_table_alone_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    line = write_curves(tmp_path, SUMMARIES)
    assert str(tmp_path) in line and "pip install matplotlib" in line and "\n" not in line
    assert (tmp_path / "curves.csv").read_text().splitlines() == [
        "line,snr_db,psnr_db,psnr_db_low,psnr_db_high,bad_pictures,swd_16,swd_16_low,swd_16_high,uses_per_pixel",
        "analog,10.0,20.0,19.5,20.25,0.0,9.0,8.0,9.5,",
        "analog,100.0,15.0,,,0.0,9.0,8.0,9.5,1.5",
        '"digital, jpeg",5.0,15.0,,,0.5,9.0,8.0,9.5,',
        '"digital, pool med",5.0,inf,,,0.25,9.0,8.0,9.5,',
        "ideal,inf,21.0,,,0.0,9.0,8.0,9.5,",
    ]


def test_write_curves_draws_intervals_and_no_empty_panel(tmp_path, monkeypatch):
    panels = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda self, f, **options: panels.extend(self.axes))
    other = point(0, mean={"psnr_db": "inf", "bandwidth_ratio": 0.25})
    assert "png are" in write_curves(tmp_path, [*SUMMARIES, ("digital", "None", 5.0, other)])
    found = [(axis.get_xlabel()[:12], axis.get_ylabel()) for axis in panels]
    titles = ["PSNR (dB)", "share of pictures with lost parts", "SWD, 16-row level"]
    assert found == [*(("SNR (dB, at ", title) for title in titles), *(("channel uses", title) for title in titles[1:])]
    assert panels[2].get_lines()[0].get_xydata().tolist() == [[10, 9], [40, 9]]  # 100 dB does not squeeze the others
    assert [bar.tolist() for bar in panels[2].collections[1].get_segments()] == [[[x, 8], [x, 9.5]] for x in (10, 40)]
    high = [("digital", "None", 50.0, other), ("digital", "None", 100.0, other)]  # drawn at one place
    assert "no curves.png" in write_curves(tmp_path, [*SUMMARIES[1:], *high])
    assert not (tmp_path / "curves.png").exists() and len(panels) == 5
