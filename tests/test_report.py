"""What a run amounts to: means, intervals, the summary, codecs at the same bits."""

import csv
import json
import math

import numpy as np
import pytest
from PIL import Image

from guided_diffusion.data.pictures import from_uint8, save_picture
from guided_diffusion.evaluation.metrics import Metrics, bootstrap_interval
from guided_diffusion.evaluation.report import BASELINE_COLUMNS, Measures, means, summary_lines
from guided_diffusion.evaluation.results import ResultsFolder
from guided_diffusion.random_streams import generator

CLASSES, SIZE = 3, (32, 48)


def stream(path):
    return generator(0, "channel", int(path[1:]))


def measures(names="psnr,ssim", codecs=(), **options):
    return Measures(Metrics(names.split(","), CLASSES, **options), codecs)


@pytest.fixture
def results(tmp_path):
    """A folder with three pictures, their labels, and worse samples; its rows with bits."""
    folder = ResultsFolder(tmp_path / "run")
    draw, rows = np.random.default_rng(0), []
    for k in range(3):
        small = draw.integers(256, size=(4, 6, 3)).astype(np.uint8)
        picture = np.asarray(Image.fromarray(small).resize(SIZE[::-1], Image.Resampling.BICUBIC))
        noisy = (picture + draw.normal(0, 10, picture.shape)).round().clip(0, 255).astype(np.uint8)
        for kind, pixels in (("images", picture), ("samples", noisy)):
            save_picture(pixels, folder.file(kind, f"n{k}"))
        label = (from_uint8(picture)[0, 0] > 0).numpy().astype(np.uint8)
        save_picture(label, folder.file("labels", f"n{k}"), np.zeros((CLASSES, 3), np.uint8))
        rows.append({"path": f"p{k}", "name": f"n{k}", "bits_total": str(8 * (400 + 200 * k)), "problems": ""})
    return folder, rows


def test_means_and_intervals_equal_numpys():
    values = [20.5, 21.0, 19.0, 30.25]
    rows = [{"psnr_db": str(v), "steps": k, "path": "x"} for k, v in enumerate(values)] + [{"psnr_db": ""}]
    interval = {"psnr_db": list(bootstrap_interval(values))}
    assert means(rows) == {"mean": {"psnr_db": np.mean(values), "steps": 1.5}, "interval_95": interval}
    rows = [{"psnr_db": "inf", "mismatch_db": value} for value in ("inf", "50", "60")]
    assert means(rows) == {"mean": {"psnr_db": "inf", "mismatch_db": 55}, "interval_95": {"mismatch_db": [50, 60]}}


def brightness(images):
    return (images[:, :1] > 0).long()


def test_whole_set_measures_the_files(results):
    folder, rows = results
    assert measures().whole_set(folder, rows) == {"set": {}, "set_interval_95": {}}
    features = {"features": lambda images: images.mean((2, 3))}
    found = measures("fid,kid,miou", **features, segmenter=brightness).whole_set(folder, rows)["set"]
    assert found["miou_real"] == 1.0 and 0.5 < found["miou"] < 1
    assert 0 < found["fid_features"] < 0.01 and "kid_features" in found
    same = measures("fid", **features).whole_set(folder, rows, "images")["set"]
    assert same["fid_features"] == pytest.approx(0, abs=1e-6)


def test_summarise_writes_what_it_returns(results):
    folder, rows = results
    rows = [row | {"psnr_db": str(20 + k)} for k, row in enumerate(rows)]
    rows[1]["problems"] = "labels"
    summary = measures("miou", segmenter=brightness).summarise(folder, rows, [], {"link": "ideal"})
    assert json.loads((folder.path / "summary.json").read_text()) == summary
    assert (summary["link"], summary["pictures"], summary["with_problems"]) == ("ideal", 3, 1)
    assert summary["mean"] == {"bits_total": 8 * 600, "psnr_db": 21} and summary["set"]["miou_real"] == 1
    low, high = summary["set_interval_95"]["miou"]
    assert low < summary["set"]["miou"] < high and "baselines" not in summary


def test_compare_keeps_within_the_messages_bits(results):
    folder, rows = results
    ours = measures(codecs=["jpeg", "webp"])
    found = ours.compare(folder, rows, None, stream)
    assert [(row["path"], row["codec"]) for row in found] == [(f"p{k}", c) for k in range(3) for c in ("jpeg", "webp")]
    with open(folder.path / "baselines.csv", newline="") as f:
        table = list(csv.DictReader(f))
    for row, written in zip(found, table, strict=True):
        assert tuple(written) == BASELINE_COLUMNS
        picture = Image.open(folder.file(f"baseline_{row['codec']}", row["name"]))
        assert picture.size == SIZE[::-1]
        if not row.get("problems"):
            assert 0 < int(row["bits"]) <= row["budget_bits"] and float(written["psnr_db"]) > 10
    summary = ours.summarise(folder, rows, found, {})
    assert set(summary["baselines"]) == {"jpeg", "webp"} and summary["baselines"]["jpeg"]["container_bytes"] > 100


def test_compare_does_not_code_again(results, monkeypatch):
    folder, rows = results
    ours = measures("psnr", codecs=["jpeg"])
    first = ours.compare(folder, rows, None, stream)
    calls, code = [], ours._code
    monkeypatch.setattr(ours, "_code", lambda *args: calls.append(args[1]["name"]) or code(*args))
    assert [row["psnr_db"] for row in ours.compare(folder, rows, None, stream)] == [r["psnr_db"] for r in first]
    assert calls == []
    folder.file("baseline_jpeg", "n1").unlink()
    ours.compare(folder, rows, None, stream)
    assert calls == ["n1"] and folder.file("baseline_jpeg", "n1").exists()


def test_compare_shows_grey_where_no_file_fits(results):
    folder, rows = results
    row = measures("psnr", codecs=["jpeg"]).compare(folder, [rows[0] | {"bits_total": "80"}], None, stream)[0]
    assert row["problems"] == "no picture within the bits" and "bits" not in row
    assert np.unique(np.asarray(Image.open(folder.file("baseline_jpeg", "n0")))).tolist() == [128]
    assert measures(codecs=["jpeg"]).compare(folder, [{"path": "p9", "name": "labels alone"}], None, stream) == []


@pytest.mark.parametrize("codec", ["jpeg", "webp-bare"])
@pytest.mark.parametrize("snr, problem", [(30, None), (-20, "picture")])
def test_compare_takes_the_messages_channel(results, snr, problem, codec):
    pytest.importorskip("sionna")
    from guided_diffusion.link.channel_coding import DigitalChannel

    (folder, rows), link = results, DigitalChannel(snr)
    row = measures("psnr", codecs=[codec]).compare(folder, rows[2:], link, stream)[0]
    assert row.get("problems") == problem
    assert row["channel_uses"] == link.segments("picture", row["bits"] // 8).uses > 0
    grey = np.unique(np.asarray(Image.open(folder.file(f"baseline_{codec}", "n2")))).tolist() == [128]
    assert grey == (problem is not None)


def test_summary_lines_are_means():
    bits = {"bits_header": 8, "bits_labels": "16", "bits_edges": 0, "bits_indices": 8, "bits_color": 0}
    bits |= {"bits_total": 32, "bpp": "0.5"}
    rows = [{"psnr_db": str(20 + k), "colour_error": "0.1", **bits} for k in range(3)]
    message = "message: 4 bytes (header 1, labels 2, indices 1), 0.500 bits per pixel"
    assert summary_lines(means(rows)) == [message, "mean PSNR 21.00 dB, mean colour error 0.100 of the range"]
    channel = {"channel_uses": 100, "bandwidth_ratio": 0.5, "realised_snr_db": math.inf, "blocks": 4, "block_errors": 1}
    baselines = {"jpeg": {"mean": {"psnr_db": "inf"}, "without_picture": 2}}
    summary = means([bits | channel]) | {"with_problems": 1, "pictures": 4, "baselines": baselines}
    summary["shared_once_bytes"] = {"weights": 5, "session": 571}
    assert summary_lines(summary) == [
        message,
        "session: 571 bytes, once for all messages",
        "channel: 100 complex uses per picture, bandwidth ratio 0.500; realised SNR inf dB",
        "1.0 of 4.0 blocks lost per picture; 1 pictures lack a part",
        "jpeg within the same bits: PSNR inf dB, 2 of 4 without a picture (counted as grey)",
    ]
