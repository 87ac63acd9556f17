"""Classical codecs at given rates, and how two sets of originals differ: the table of docs/link.md.

python docs/codec_study.py --data_dir DIR --image_size 128 --only 0006r0 --output codecs.csv

Every picture is coded within the same bits. --features and --segmenter (of docs/train_segmenter.py) add KID and mIoU.
The rows "originals" compare the first half of the pictures with the second, and every other one with the rest.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from study import append, rows_of

from guided_diffusion.config import parts_of
from guided_diffusion.data.datasets import SceneDataset
from guided_diffusion.data.pictures import from_uint8, to_uint8
from guided_diffusion.evaluation.codecs import best_within
from guided_diffusion.evaluation.metrics import Metrics, bootstrap_interval, psnr, ssim
from guided_diffusion.evaluation.segmenters import features_of, load_network, segment
from guided_diffusion.flags import CODECS


def measured(metrics, made, original, label):
    """Return the measures of a set as table columns, with their intervals in _low and _high."""
    values, spread = metrics.over_the_set([(made, original, label)])
    row = {"psnr_db": psnr(made, original), "ssim": ssim(made, original)}
    spread |= {name: bootstrap_interval(each) for name, each in row.items()}
    values = {name: float(each.mean()) for name, each in row.items()} | values
    for name, ends in spread.items():
        values |= dict(zip((f"{name}_low", f"{name}_high"), ends, strict=True))
    return {name: f"{value:.4f}" for name, value in values.items()}


def coded(codec, original, bpp):
    """Code pictures (N, 3, H, W); return what the receivers see, their mean bytes, and how many have no picture."""
    (height, width), shown, sizes = original.shape[2:], [], []
    for picture in to_uint8(original):
        found = best_within(codec, picture, int(bpp * height * width / 8))
        shown.append(from_uint8(np.full_like(picture, 128) if found is None else found.picture))
        sizes.append(len(found.data) if found else 0)
    return torch.cat(shown), np.mean(sizes), sizes.count(0)


def parse():
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data_dir", required=True, help="folder of a Cityscapes-like data set")
    parser.add_argument("--image_size", type=int, default=128)
    parser.add_argument("--only", default="", help="scenes of the training split, as --only of the scripts")
    parser.add_argument("--pictures", type=int, default=50, help="so many, spread over the scenes")
    parser.add_argument("--bpp", default="0.05,0.10,0.20,0.40")
    parser.add_argument("--codecs", default=",".join(CODECS))
    parser.add_argument("--features", default="")
    parser.add_argument("--segmenter", default="")
    parser.add_argument("--output", type=Path, default=Path("codecs.csv"))
    return parser.parse_args()


def main():
    """Code, measure, and add to the CSV the rows that it lacks."""
    options = parse()
    names, networks = ["swd", "color_std"], {}
    if options.features:
        names.append("kid")
        networks["features"] = features_of(load_network(options.features, "features"))
    if options.segmenter:
        names.append("miou")
        network = load_network(options.segmenter, "segmenter")
        networks["segmenter"] = lambda images: segment(network, images, 35)
    metrics = Metrics(names, 35, **networks)
    dataset = SceneDataset("cityscapes", options.data_dir, options.image_size, num_classes=35, only=options.only)
    batch = dataset.batch(np.linspace(0, len(dataset) - 1, options.pictures).round().astype(int).tolist())
    original, label = batch["image"], batch["label"]
    done = {(row["codec"], row["rate"]) for row in rows_of(options.output)}

    def add(codec, rate, made, original, label, size="", without=0):
        row = {"codec": codec, "rate": rate, "bytes": size, "without_picture": without}
        append(options.output, [row | measured(metrics, made, original, label)])

    half = len(original) // 2
    splits = {"halves": (slice(half), slice(half, 2 * half)), "every other": (slice(0, None, 2), slice(1, None, 2))}
    for name, (first, second) in splits.items():
        if ("originals", name) not in done:
            add("originals", name, original[first], original[second], label[first])
    for rate in parts_of(options.bpp):
        for codec in parts_of(options.codecs):
            if (codec, rate) not in done:
                made, size, without = coded(codec, original, float(rate))
                add(codec, rate, made, original, label, f"{size:.1f}", without)


if __name__ == "__main__":
    main()
