"""Print a Markdown table of several results folders: python docs/tables.py FOLDER[=CAPTION]..."""

import json
import sys
from pathlib import Path

PARTS = ("header", "labels", "edges", "indices", "color", "total")
SET = {"kid_features": ".4f", "miou": ".3f", "swd": ".0f", "cb_std": ".1f", "cr_std": ".1f"}


def line(caption, summary, extra=""):
    """One row: bytes per part, bpp, and every measure that there is."""
    mean, whole = summary["mean"], summary["set"]
    parts = [f"{mean[f'bits_{p}'] / 8:.0f}" if f"bits_{p}" in mean else extra for p in PARTS]
    if "bits" in mean:
        parts[-1] = f"{mean['bits'] / 8:.0f}"
    low, high = summary["interval_95"]["psnr_db"]
    shown = [f"{mean['bpp']:.3f}" if "bpp" in mean else ""]
    shown += [f"{mean['psnr_db']:.2f} ({float(low):.1f}…{float(high):.1f})", f"{mean['ssim']:.3f}"]
    for name, form in SET.items():
        name = next((found for found in whole if found.startswith(f"{name}_")), name) if name == "swd" else name
        ends = summary.get("set_interval_95", {}).get(name)
        ends = f" ({ends[0]:{form}}…{ends[1]:{form}})" if ends else ""
        shown.append(f"{whole[name]:{form}}{ends}" if name in whole else "")
    return "| " + " | ".join([caption, *parts, *shown]) + " |"


def main(*folders):
    """Print the table; a folder's classical codecs follow it."""
    print("| |", " | ".join([*PARTS, "bpp", "PSNR dB (95 %)", "SSIM", "KID", "mIoU", "SWD", "Cb", "Cr"]), "|")
    print("|" + " --- |" * 15)
    for folder in folders:
        path, _, caption = folder.partition("=")
        summary = json.loads((Path(path) / "summary.json").read_text())
        print(line(caption or Path(path).name, summary))
        for codec, baseline in summary.get("baselines", {}).items():
            print(line(f"{codec}, {baseline['without_picture']} without picture", baseline))


if __name__ == "__main__":
    main(*sys.argv[1:])
