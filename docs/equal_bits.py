"""What bits per pixel buy, ours against classical codecs: tables and figures of docs/link.md (needs matplotlib).

python docs/equal_bits.py --data_dir camvid --model_path camvid.zip --segmenter judge.pt --features features.pt \\
    --extractor other.pt --output study --parts rates,realism

Each cell of `CELLS` is a plain run of image_sample.py into OUTPUT/PART/CELL, with its flags in command.txt once it is
done. Run again, the study goes on where it was interrupted. From all cells that are there it writes equal_bits.csv (a
row for us and each codec, with 95 % intervals in _low and _high), tables.md, rates.png, link.png and panel.png.
"""

import argparse
import contextlib
import json
import math
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import tables
from study import append, rows_of

from guided_diffusion.config import parts_of
from guided_diffusion.console import InputError, log, run_script
from guided_diffusion.data.pictures import save_picture
from guided_diffusion.evaluation.panels import picture_grid
from guided_diffusion.evaluation.results import ResultsFolder
from guided_diffusion.files import atomic_write

ROOT = Path(__file__).resolve().parent.parent
SHARED = (
    "--preset {preset} --data_dir {data_dir} --model_path {model_path} --num_samples {num_samples} --link ideal"
    " --target_bpp 0.10 --metrics psnr,ssim,kid,miou,swd,color_std --features {features} --segmenter {segmenter}"
)
PLAIN = "--sampler ddim --selection initial"  # no noise is chosen
DIGITAL = "--link digital --modulation 16qam --code_rate 0.5 --baseline {bare}"
CELLS = {  # part: name: flags; what they leave open is the preset's, the default of the table
    "rates": {
        f"{bpp} bpp": f"--target_bpp {bpp} {lower} --baseline {{codecs}}"
        for bpp, lower in (("0.05", "--step_atoms 1 --label_smooth 8"), ("0.10", ""), ("0.20", ""), ("0.40", ""))
    },
    "realism": {f"realism {realism}": f"--realism {realism}" for realism in ("0", "0.5")},
    "ablation": {
        "map alone": f"{PLAIN} --send labels",
        "layer alone": f"{PLAIN} --send color",
        "map and layer, no selection": PLAIN,
        "late start": "--start_time 800 --timestep_respacing 8",
        "late start, no selection": f"{PLAIN} --start_time 800 --timestep_respacing 8",
        "rare classes": "--selection_weight rare",
        "guidance 1.5": "--s 1.5",
    },
    "extractor": {"label maps of a segmenter": "--extractor {extractor}"},
    "link": {
        "awgn": f"{DIGITAL} --fading awgn --snr 2,4,5,6,7,10",
        "rayleigh": f"{DIGITAL} --fading rayleigh --snr 4,10,16,22,28",
    },
    "panel": {},
}
SHOWN = "rates", "0.10 bpp"  # in the panel
ON_AIR = {"psnr_db": "PSNR in dB", "miou": "mIoU", "lost": "share of pictures that lack a part"}


def cell_flags(part, cell, options):
    """Return the words of one cell's flags, but for --results_path."""
    codecs = parts_of(options.codecs)
    values = vars(options) | {"bare": ",".join(codec for codec in codecs if f"{codec}-bare" not in codecs)}
    return [word.format(**values) for word in f"{SHARED} {options.flags} {CELLS[part][cell]}".split()]


def folder_of(part, cell, options):
    """Return the results folder of one cell."""
    return Path(options.output) / part / cell.replace(" ", "_").replace(",", "")


def run_cell(part, cell, options):
    """Run one cell, unless it was done with these flags before; return whether it is done."""
    words, folder = cell_flags(part, cell, options), folder_of(part, cell, options)
    command, note = shlex.join(words), folder / "command.txt"
    if note.exists() and note.read_text() == command:
        return True
    log(f"{part}: {cell}")
    script = [sys.executable, str(ROOT / "image_sample.py"), *words, "--results_path", str(folder)]
    if subprocess.run(script).returncode:
        return False
    note.write_text(command)
    return True


def summaries(folder):
    """Return the points of a cell: list of (folder, summary), a sweep's by their SNR."""
    found = [(path.parent, json.loads(path.read_text())) for path in folder.rglob("summary.json")]
    return sorted(found, key=lambda point: float(point[1].get("snr_db", "inf")))


def table_rows(part, cell, folder):
    """Return the CSV's rows of one cell (dicts): at every SNR ours, and a row for each codec."""
    rows = []
    for place, summary in summaries(folder):
        pixels = math.prod(map(int, summary["picture"].split("x")))
        for name, found in {"ours": summary, **summary.get("baselines", {})}.items():
            lost = found.get("without_picture", summary["with_problems"]) / summary["pictures"]
            row = {"part": part, "cell": cell, "snr_db": summary.get("snr_db", ""), "line": name, "lost": lost}
            row |= {"pictures": summary["pictures"], **found["mean"], **found["set"]}
            for measure, ends in {**found["interval_95"], **found.get("set_interval_95", {})}.items():
                row |= dict(zip((f"{measure}_low", f"{measure}_high"), ends, strict=True))
            if "channel_uses" in row:
                row["uses_per_pixel"] = row["channel_uses"] / pixels
            if name == "ours":
                row["bpp_max"] = max(int(own["bits_total"]) for own in rows_of(place / "results.csv")) / pixels
            rows.append(row)
    return rows


def write_tables(path, done, rows):
    """Write tables.md: a table for each part, the codecs below us, and what else the parts are to show.

    :param done, rows: {(part, cell): folder}, and the CSV's rows.
    """
    with atomic_write(path) as f, contextlib.redirect_stdout(f):
        for part in dict.fromkeys(part for part, _ in done):
            print(f"## {part}\n")
            folders = {cell: folder for (own, cell), folder in done.items() if own == part}
            if part == "link":
                print_falls([row for row in rows if row["part"] == part])
                continue
            tables.main(*(f"{folder}={cell}" for cell, folder in folders.items()))
            print()
            if part == "rates":
                for row in (row for row in rows if row["part"] == part and row["line"] == "ours"):
                    print(f"- {row['cell']}: {row['bpp']:.4f} bits per pixel in the mean, at most {row['bpp_max']:.4f}")
                print()
            if part == "realism":
                sent = [{p.name: p.read_bytes() for p in folder.rglob("*.dgo")} for folder in folders.values()]
                print(f"{len(sent)} runs of {len(sent[0])} messages, equal: {all(own == sent[0] for own in sent)}\n")


def print_falls(rows):
    """Print the highest Es/N0 of the grid at which more than half of a line's pictures lack a part."""
    print("| | uses per pixel | more than half of the pictures lack a part up to Es/N0 |\n| --- | --- | --- |")
    for cell, name in dict.fromkeys((row["cell"], row["line"]) for row in rows):
        own = [row for row in rows if (row["cell"], row["line"]) == (cell, name)]
        worst = max((float(row["snr_db"]) for row in own if row["lost"] > 0.5), default=None)
        uses = np.mean([row["uses_per_pixel"] for row in own if "uses_per_pixel" in row])
        print(f"| {cell}, {name} | {uses:.3f} | {'none' if worst is None else f'{worst:g} dB'} |")
    print()


def draw_link(path, rows):
    """Draw measures against Es/N0, a line for us and for each codec."""
    from matplotlib.figure import Figure

    cells = [*dict.fromkeys(row["cell"] for row in rows)]
    figure = Figure(figsize=(12, 3.4 * len(cells)), layout="constrained")
    grid = figure.subplots(len(cells), len(ON_AIR), squeeze=False)
    for axes, cell in zip(grid, cells, strict=True):
        for axis, (measure, title) in zip(axes, ON_AIR.items(), strict=True):
            for name in dict.fromkeys(row["line"] for row in rows):
                own = [row for row in rows if (row["cell"], row["line"]) == (cell, name) and measure in row]
                values = [float(row[measure]) for row in own]
                axis.plot([float(row["snr_db"]) for row in own], values, marker="o", markersize=3, label=name)
            axis.set(xlabel=f"Es/N0 in dB, {cell}", ylabel=title)
            axis.grid(alpha=0.3)
    grid[0][0].legend(fontsize=7)
    figure.savefig(path, dpi=100)


def write_panels(output, folder, shown, count=6):
    """Write two panels of a cell's pictures: panel.png of `count` spread over all, beside WebP and AVIF at their bits.

    shown.png has those whose names hold one of the texts `shown`, and their label maps in place of WebP. The codecs
    are those without containers, if these were made.
    """
    results, rows, columns = ResultsFolder(folder), rows_of(folder / "results.csv"), {"original": "images"}
    for codec in ("webp", "avif"):
        made = [kind for kind in (f"{codec}-bare", codec) if (folder / f"baseline_{kind}").exists()]
        columns |= {f"{codec.upper()}, same bytes": f"baseline_{kind}" for kind in made[:1]}
    columns["ours"] = "samples"
    spread = np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(int)
    _write_panel(output / "panel.png", results, [rows[k] for k in spread], columns)
    rows = [row for row in rows if any(text in row["name"] for text in shown)]
    if rows:
        size = np.mean([int(row["bits_total"]) for row in rows]) / 8
        columns = {"original": "images", f"label map, a part of the {size:.0f} bytes sent": "received", **columns}
        columns.pop("WEBP, same bytes", None)
        _write_panel(output / "shown.png", results, rows, columns)


def _write_panel(path, results, rows, columns):
    pictures = [[results.pixels(kind, row["name"]) for kind in columns.values()] for row in rows]
    save_picture(picture_grid(pictures, list(columns)), path)


def report(options):
    """Write all tables and figures from the cells that are done."""
    from plot_link import rate

    output, every = Path(options.output), [(part, cell) for part, cells in CELLS.items() for cell in cells]
    done = {key: folder for key in every if ((folder := folder_of(*key, options)) / "command.txt").exists()}
    rows = [row for (part, cell), folder in done.items() for row in table_rows(part, cell, folder)]
    if not rows:
        return
    (output / "equal_bits.csv").unlink(missing_ok=True)
    columns = dict.fromkeys((name for row in rows for name in row), "")
    append(output / "equal_bits.csv", [columns | row for row in rows])
    write_tables(output / "tables.md", done, rows)
    rates = [str(folder) for (part, _), folder in done.items() if part == "rates"]
    if rates:
        rate(output / "rates.png", f"ours:{','.join(rates)}")
    air = [row for row in rows if row["part"] == "link"]
    if air:
        draw_link(output / "link.png", air)
    if SHOWN in done:
        write_panels(output, done[SHOWN], parts_of(options.shown))
    log(f"{len(done)} cells: equal_bits.csv, tables.md and figures are in {output}")


def parse(arguments=None):
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("data_dir", "model_path", "output", "segmenter", "features"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--extractor", default="", help="a segmenter's file, not the judge's: of the part extractor")
    parser.add_argument("--num_samples", type=int, default=40)
    parser.add_argument("--parts", default=",".join(CELLS), help="of %(default)s")
    parser.add_argument("--codecs", default="jpeg,webp,avif,jxl,jpeg-bare,webp-bare,avif-bare")
    parser.add_argument("--preset", default="camvid")
    parser.add_argument("--flags", default="--is_train True --only 0006r0", help="of all cells (default: %(default)s)")
    parser.add_argument("--shown", default="", help="parts of picture names, for shown.png")
    options = parser.parse_args(arguments)
    for part in parts_of(options.parts):
        if part not in CELLS:
            raise InputError(f"--parts {part}: choose from {', '.join(CELLS)}")
    if "extractor" in parts_of(options.parts) and not options.extractor:
        raise InputError("--parts extractor needs --extractor, a segmenter's file; give it, or name other parts")
    return options


def main():
    """Run what is missing of the parts that were asked for, then write tables and figures."""
    options = parse()
    wanted = [(part, cell) for part in parts_of(options.parts) for cell in CELLS[part]]
    wanted += [SHOWN] if "panel" in parts_of(options.parts) and SHOWN not in wanted else []
    failed = [f"{part}/{cell}" for part, cell in wanted if not run_cell(part, cell, options)]
    report(options)
    if failed:
        raise InputError(f"cells that failed (see above): {', '.join(failed)}; mend them and run the study again")


if __name__ == "__main__":
    run_script(main)
