"""Curves of a sweep: each measure against the SNR, and against the rate, one line per link, pool and codec."""

import math

from ..files import atomic_write
from .results import ResultsFolder

CLEAN = 40  # dB, where all above is drawn: GESCO's 100 dB would squeeze the others
TITLES = {"snr_db": f"SNR (dB, at most {CLEAN}; digital: Es/N0)", "psnr_db": "PSNR (dB)", "ssim": "SSIM"}
TITLES |= {"ms_ssim": "MS-SSIM", "lpips": "LPIPS", "kid": "KID", "kid_features": "KID of --features", "fid": "FID"}
TITLES |= {"fid_features": "FID of --features", "miou": "mIoU", "bad_pictures": "share of pictures with lost parts"}
RATES = {"uses_per_pixel": "channel uses per pixel, at the highest SNR", "bpp": "bits per pixel, at the highest SNR"}
SIDE_BY_SIDE = 4  # panels


def write_curves(folder, summaries):
    """Write curves.csv, and curves.png where a measure has two SNRs or rates, both with 95 % intervals.

    :param summaries: list of (link, pool, snr_db, summary).
    :return: a line that says what was written.
    """
    rows, path = [], folder / "curves.png"
    for link, pool, snr, summary in sorted(summaries, key=lambda entry: entry[2]):
        parts = {link if pool == "None" else f"{link}, pool {pool}": summary}
        parts |= {f"{link}, {codec}": own for codec, own in summary.get("baselines", {}).items()}
        for name, own in parts.items():
            bad = own["without_picture" if "without_picture" in own else "with_problems"]
            rows.append({"line": name, "snr_db": snr, "bad_pictures": bad / summary["pictures"]})
            rows[-1] |= own["mean"] | own["set"]
            for measure, ends in (own["interval_95"] | own["set_interval_95"]).items():
                rows[-1] |= zip((f"{measure}_low", f"{measure}_high"), ends, strict=True)
            if "bandwidth_ratio" in own["mean"]:  # channel uses for each of a pixel's three values
                rows[-1]["uses_per_pixel"] = 3 * own["mean"]["bandwidth_ratio"]
    rows.sort(key=lambda row: row["line"])
    found = dict.fromkeys(column for row in rows for column in row)
    titles = TITLES | {name: f"SWD, {name[4:]}-row level" for name in found if name.removeprefix("swd_").isdigit()}
    columns = [f"{name}{end}" for name in titles | RATES for end in ("", "_low", "_high") if f"{name}{end}" in found]
    ResultsFolder(folder).write_table("curves.csv", ["line", *columns], rows)
    path.unlink(missing_ok=True)  # of an earlier, longer sweep
    try:
        _draw(rows, titles, path)
    except ImportError:
        return f"curves.csv is in {folder}; for curves.png, pip install matplotlib"
    return f"curves.csv {'and curves.png are' if path.exists() else '(one SNR and rate: no curves.png) is'} in {folder}"


def _series(rows, x, y):
    """Return what a panel shows, name -> list of (x, y, low, high), x differing; {} where that is no curve."""
    found = {}
    for row in rows:
        if x in row and y in row and math.isfinite(float(row[y])):
            point = min(row[x], CLEAN), row[y], row.get(f"{y}_low", row[y]), row.get(f"{y}_high", row[y])
            found.setdefault(row["line"], {})[point[0] if x == "snr_db" else None] = point
    found = {line: [*points.values()] for line, points in found.items()}
    if x == "snr_db":
        return found if any(len(points) > 1 for points in found.values()) else {}
    rates = [points[0][0] for points in found.values()]
    return found if rates and min(rates) < 0.95 * max(rates) else {}  # codecs leave some percent of a budget


def _draw(rows, titles, path):
    """Draw the panels that have something to show, if there are any."""
    from matplotlib.figure import Figure

    names = [*dict.fromkeys(row["line"] for row in rows)]
    rate = "uses_per_pixel" if any(row.get("uses_per_pixel") for row in rows) else "bpp"
    shown = [y for y in [*titles][1:] if y != "bad_pictures" or any(row[y] for row in rows)]
    panels = [(x, y, found) for x in ("snr_db", rate) for y in shown if (found := _series(rows, x, y))]
    width, height, handles = min(SIDE_BY_SIDE, len(panels)), math.ceil(len(panels) / SIDE_BY_SIDE), {}
    figure = Figure(figsize=(4 * width, 3.2 * height + 0.5), layout="constrained")
    for place, (x, y, series) in enumerate(panels, 1):
        axis = figure.add_subplot(height, width, place, xlabel=(titles | RATES)[x], ylabel=titles[y])
        axis.grid(alpha=0.3)
        for name, points in series.items():
            (at, values, low, high), color = zip(*points, strict=True), f"C{names.index(name)}"
            if x == "snr_db" and len(at) == 1:  # as of the ideal link: a level
                handles[name] = axis.axhline(values[0], color=color, linestyle="--", linewidth=1)
                axis.axhspan(low[0], high[0], color=color, alpha=0.1, linewidth=0)
            else:
                (handles[name],) = axis.plot(at, values, color=color, marker="o", markersize=4)
                axis.fill_between(at, low, high, color=color, alpha=0.15, linewidth=0)
                axis.vlines(at, low, high, color=color, linewidth=1)
    if panels:
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=SIDE_BY_SIDE)
        with atomic_write(path, "wb") as f:
            figure.savefig(f, format="png", dpi=110)
