"""Curves of a sweep: each measure against the SNR, and against the rate, one line per link, pool and codec."""

import csv
import math

from ..files import atomic_write

TITLES = {"psnr_db": "PSNR (dB)", "ssim": "SSIM", "ms_ssim": "MS-SSIM", "lpips": "LPIPS", "kid": "KID", "fid": "FID"}
TITLES |= {f"{name}_features": f"{name.upper()}, features of your own" for name in ("kid", "fid")}
TITLES |= {"miou": "mIoU", "bad_pictures": "share of pictures with lost parts"}
AXES = {"snr_db": "SNR (dB; analog: nominal, digital: Es/N0)"}
AXES |= {"uses_per_pixel": "channel uses per pixel, at the highest SNR", "bpp": "bits per pixel, at the highest SNR"}
CLEAN = 100  # dB, from which on nothing is lost
COLUMNS = 4  # panels side by side


def write_curves(folder, summaries):
    """Write curves.csv, and curves.png where there is a curve: with 95 % intervals, if the summaries have them.

    :param summaries: list of (link, pool, snr_db, summary).
    :return: a line that says what was written.
    """
    lines = {}
    for link, pool, snr, summary in sorted(summaries, key=lambda entry: entry[2]):
        found = {link if pool == "None" else f"{link}, pool {pool}": summary}
        found |= {f"{link}, {codec}": own for codec, own in summary.get("baselines", {}).items()}
        for name, own in found.items():
            lines.setdefault(name, []).append(_point(snr, own, summary["pictures"]))
    found = dict.fromkeys(name for line in lines.values() for point in line for name in point)
    levels = [name for name in found if name.startswith("swd_") and name[4:].isdigit()]
    measures = {name: title for name, title in TITLES.items() if name in found}
    measures |= {name: f"SWD, level {name[4:]}{' (finest)' if name == levels[0] else ''}" for name in levels}
    bounds = [f"{name}_{end}" for name in measures for end in ("low", "high")]
    columns = [name for name in ("snr_db", *measures, "bpp", "uses_per_pixel", *bounds) if name in found]
    with atomic_write(folder / "curves.csv") as f:
        writer = csv.DictWriter(f, ["line", *columns], restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerows({"line": name, **point} for name, line in lines.items() for point in line)
    path = folder / "curves.png"
    path.unlink(missing_ok=True)  # of an earlier, longer sweep
    try:
        drawn = _draw(lines, measures, path)
    except ImportError:
        return f"curves.csv is in {folder}; for curves.png, pip install matplotlib"
    if not drawn:
        return f"curves.csv is in {folder}; no curves.png: no measure has two SNRs or rates"
    return f"curves.csv and curves.png are in {folder}"


def _point(snr, own, pictures):
    """Return a line's columns at one SNR, of its part of a summary."""
    point = {"snr_db": snr, **own["mean"], **own["set"]}
    for name, ends in {**own.get("interval_95", {}), **own.get("set_interval_95", {})}.items():
        point |= zip((f"{name}_low", f"{name}_high"), ends, strict=True)
    point["bad_pictures"] = own["without_picture" if "without_picture" in own else "with_problems"] / pictures
    if "bandwidth_ratio" in point:
        point["uses_per_pixel"] = 3 * point["bandwidth_ratio"]
    return point


def _series(lines, x, measure):
    """Return what one panel shows: name -> list of (x, value, low, high); {} where the values of x are all the same."""
    found = {}
    for name, line in lines.items():
        points = [p for p in line if x in p and isinstance(p.get(measure), float | int) and math.isfinite(p[measure])]
        points = points if x == "snr_db" else points[-1:]
        if points:
            keys = (x, measure, f"{measure}_low", f"{measure}_high")
            found[name] = [tuple(p.get(key, p[measure]) for key in keys) for p in points]
    at = [p[0] for points in found.values() for p in points if math.isfinite(p[0])]
    least = 0 if x == "snr_db" else 0.05 * max(at, default=0)  # codecs fill the same budget but for some percent
    return found if at and max(at) - min(at) > least else {}


def _draw(lines, measures, path):
    """Draw the panels that have something to show; return whether there were any."""
    from matplotlib.figure import Figure

    rate = "uses_per_pixel" if any(p.get("uses_per_pixel") for line in lines.values() for p in line) else "bpp"
    shown = [("snr_db", measures), (rate, measures.keys() - {"bad_pictures"})]
    blocks = [[(x, m, found) for m in measures if m in names and (found := _series(lines, x, m))] for x, names in shown]
    most = max(map(len, blocks))
    if not most:
        return False
    width = math.ceil(most / math.ceil(most / COLUMNS))
    rows = [block[k : k + width] for block in blocks for k in range(0, len(block), width)]
    figure, handles = Figure(figsize=(4 * width, 3.2 * len(rows) + 0.5), layout="constrained"), {}
    for k, panels in enumerate(rows):
        for j, (x, measure, series) in enumerate(panels, k * width + 1):
            axis = figure.add_subplot(len(rows), width, j, xlabel=AXES[x], ylabel=measures[measure])
            _panel(axis, x, series, [*lines])
            handles |= zip(*reversed(axis.get_legend_handles_labels()), strict=True)
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=COLUMNS)
    with atomic_write(path, "wb") as f:
        figure.savefig(f, format="png", dpi=110)
    return True


def _panel(axis, x, series, names):
    places = {p[0]: p[0] for points in series.values() for p in points if math.isfinite(p[0])}
    if x == "snr_db":
        noisy = [snr for snr in places if snr < CLEAN] or [CLEAN]
        beside = max(noisy) + max(2, (max(noisy) - min(noisy)) / 6)  # at its place it would squeeze the others
        places = {snr: snr if snr < CLEAN else beside for snr in sorted(places)}
        axis.set_xticks([*places.values()], [f"{snr:g}" if snr < CLEAN else "clean" for snr in places], fontsize=8)
    for name, points in series.items():
        color, (at, values, low, high) = f"C{names.index(name)}", zip(*points, strict=True)
        if math.isinf(at[0]):  # no SNR to speak of: a level
            axis.axhline(values[0], color=color, linestyle="--", linewidth=1, label=name)
            axis.axhspan(low[0], high[0], color=color, alpha=0.1, linewidth=0)
            continue
        at = [places[value] for value in at]
        axis.plot(at, values, color=color, marker="o", markersize=4, label=name)
        axis.fill_between(at, low, high, color=color, alpha=0.15, linewidth=0)
        axis.vlines(at, low, high, color=color, linewidth=1)
    if x != "snr_db":
        axis.set_xlim(left=0)
    axis.grid(alpha=0.3)
