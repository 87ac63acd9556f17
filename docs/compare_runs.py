"""Put several results folders side by side: python docs/compare_runs.py out.png COUNT FOLDER=CAPTION..."""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from guided_diffusion.data.pictures import save_picture
from guided_diffusion.evaluation.panels import picture_grid


def read(path):
    """Return a picture as a (H, W, 3) uint8 array."""
    return np.asarray(Image.open(path).convert("RGB"))


def main(picture, count, *columns):
    """First column: originals; then one column per folder, the same `count` pictures spread over the first folder's."""
    folders, captions = zip(*(column.split("=", 1) for column in columns), strict=True)
    names = sorted(set.intersection(*({p.name for p in (Path(folder) / "samples").iterdir()} for folder in folders)))
    chosen = [names[k * len(names) // int(count)] for k in range(int(count))]
    rows = [
        [read(Path(folders[0]) / "images" / name), *(read(Path(folder) / "samples" / name) for folder in folders)]
        for name in chosen
    ]
    save_picture(picture_grid(rows, ["original", *captions]), picture)


if __name__ == "__main__":
    main(*sys.argv[1:])
