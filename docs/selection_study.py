"""How much a search over the bank gains, and whether the two-stage search finds what the exhaustive one finds.

python docs/selection_study.py --data_dir D --model_path M --pictures 12 --candidates 64 --feedback_steps 5 --output
study

Runs DDIM chains from every candidate, then the two-stage search, on pictures spread over the split. It goes on where
it was interrupted; output/exhaustive.csv has one row per candidate, output/two_stage.csv one per picture.
"""

import argparse
from pathlib import Path

import numpy as np
from study import append, link_parts, rows_of
from tqdm import tqdm

from guided_diffusion.console import run_script
from guided_diffusion.evaluation import segmenters
from guided_diffusion.evaluation.metrics import psnr, ssim
from guided_diffusion.link.selection import mse, select_initial

BATCH = 8


def exhaustive(chain, y, scene, candidates, measures):
    """Run a chain from every candidate; return a row of measures for each."""
    prepared, rows = chain.prepare(y), []
    for k in range(0, candidates, BATCH):
        ids = list(range(k, min(k + BATCH, candidates)))
        images = chain.run(prepared, ids).images.cpu()
        columns = {name: measure(images, scene).tolist() for name, measure in measures.items()}
        rows += [{"index": i, **{name: column[j] for name, column in columns.items()}} for j, i in enumerate(ids)]
    return rows


def measures_of(options, num_classes):
    """Functions (pictures, scene) -> (N,): the distance searched, and others that are not."""
    measures = {
        "mse": lambda p, scene: mse(p, scene["image"]),
        "psnr_db": lambda p, scene: psnr(p, scene["image"]),
        "ssim": lambda p, scene: ssim(p, scene["image"].expand_as(p)),
    }
    if options.segmenter:
        network = segmenters.load_network(options.segmenter, "segmenter")
        measures["agreement"] = lambda p, scene: 1 - segmenters.disagreement(network, p, scene["label"], num_classes)
    return measures


def summarise(first, second, candidates):
    """Print means over pictures of what the best of the first K has, and what the two-stage search found."""
    pictures = sorted({row["picture"] for row in first})
    by_picture = {p: {int(row["index"]): row for row in first if row["picture"] == p} for p in pictures}
    names = [name for name in first[0] if name not in ("picture", "index")]
    sizes = [k for k in (1, 4, 16, 64, 256, 1000) if k <= candidates]
    print("K", *names)
    for size in sizes:
        best = {p: min(range(size), key=lambda i: float(rows[i]["mse"])) for p, rows in by_picture.items()}
        print(size, *(f"{np.mean([float(by_picture[p][best[p]][name]) for p in pictures]):.5f}" for name in names))
    found = [row for row in second if row["picture"] in by_picture]
    if not found:
        return
    ratios = []
    for row in found:
        distances = {i: float(other["mse"]) for i, other in by_picture[row["picture"]].items()}
        ratios.append(distances[int(row["index"])] / min(distances.values()))
    evaluations = np.mean([int(row["evaluations"]) for row in found])
    print(
        f"two-stage: {evaluations:.0f} evaluations; winner in {sum(r == 1 for r in ratios)} of {len(ratios)} pictures,"
        f" within 1 % in {sum(r <= 1.01 for r in ratios)}; worst {max(ratios):.4f}"
    )
    print(
        "two-stage",
        *(f"{np.mean([float(by_picture[r['picture']][int(r['index'])][n]) for r in found]):.5f}" for n in names),
    )


def main():
    """Parse flags, run what is missing, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("data_dir", "model_path", "output"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--segmenter", default="")
    parser.add_argument("--timestep_respacing", default="50")
    for name, default in (("pictures", 12), ("candidates", 64), ("feedback_steps", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    config, parts = link_parts(options, use_ddim=True, timestep_respacing=options.timestep_respacing)
    transmitter, dataset = parts["transmitter"](config), parts["dataset"]
    measures = measures_of(options, config.num_classes)
    files = folder / "exhaustive.csv", folder / "two_stage.csv"
    done = [{row["picture"] for row in rows_of(path)} for path in files]
    for k in tqdm(range(options.pictures), unit="picture"):
        number = k * len(dataset) // options.pictures
        scene = dataset.batch([number])
        y = transmitter.describe(scene)[1]
        if str(number) not in done[0]:
            rows = exhaustive(transmitter.chain, y, scene, options.candidates, measures)
            append(files[0], [{"picture": number, **row} for row in rows])
        if str(number) not in done[1]:
            choice = select_initial(
                transmitter.chain,
                y,
                scene["image"],
                range(options.candidates),
                batch_size=BATCH,
                feedback_steps=options.feedback_steps,
            )
            append(files[1], [{"picture": number, "index": choice.index, "evaluations": choice.evaluations}])
    summarise(*map(rows_of, files), options.candidates)


if __name__ == "__main__":
    run_script(main)
