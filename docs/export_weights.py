"""Pack trained weights for others: python docs/export_weights.py --model_path CHECKPOINTS --output camvid.zip

One archive, which --model_path of image_sample.py takes as it is: weights.pt (the averaged weights in half precision,
the priors of the source coders as they are), config.json and MODEL_CARD.md.
"""

import argparse
import dataclasses
import hashlib
import io
import zipfile
from pathlib import Path

import torch

from guided_diffusion import build, load_weights
from guided_diffusion.config import SampleConfig, TrainConfig, adopt_training_config, parse_config
from guided_diffusion.console import InputError, log, run_script
from guided_diffusion.files import CONFIG, WEIGHTS, atomic_write, is_archive
from guided_diffusion.training.checkpoint import EMA_FILE, find_weights, trained_config

MACHINE = {"data_dir", "checkpoint_dir", "cache_dir", "resume_checkpoint", "device", "num_workers"}  # that trained
DATA = {
    "camvid": """CamVid, the Cambridge-driving Labeled Video Database, its classes mapped to label ids of Cityscapes.
It is research data of its owners; its page states no licence that we know of, and asks for a reference to Brostow,
Shotton, Fauqueur and Cipolla, *Segmentation and Recognition Using Structure from Motion Point Clouds*, ECCV 2008, and
Brostow, Fauqueur and Cipolla, *Semantic Object Classes in Video: A High-Definition Ground Truth Database*, Pattern
Recognition Letters 2009. Take these weights as for research, too; the owners of the data were not asked.""",
    "toy": "Toy street scenes, which the program draws by itself: nobody else has rights in them.",
}
UNKNOWN = "Not noted with the checkpoint. Its licence may bind these weights, too."
CARD = """# {name}

Weights of a Diff-GOn network: from a label map{layer} and the index of a noise it makes a picture of a street scene.

| | |
| --- | --- |
| parameters | {parameters:,}, in half precision ({mib:.1f} MiB) |
| pictures | {size} rows; {num_classes} label ids |
| trained | {trained} |
| by | `python image_train.py {flags}` |
| fingerprint | {fingerprint}: both ends of a link must have the same |

Use: `python image_sample.py {preset}--data_dir DATA_DIR --model_path {file} --results_path results`

## Data and licence

{data}
{figures}
## What it cannot do

- It invents what was not sent. Faces, signs, number plates and text, small or far objects are not those of the scene: a
  picture is no evidence, and nothing that drives should rely on it.
- It has seen the scenes of one data set alone, in one picture size. Other cities, weather, cameras and classes were not
  tried.
- A transmitter needs label maps; those that a segmenter reads off pictures are worse than the data set's own.
- Rounding to half precision makes these other weights than the checkpoint's: messages of one are refused by the other.
- The fingerprint tells different weights apart. It does not prove where they come from.
"""


def half(model):
    """Return a model's state dict with parameters in half precision, buffers (priors) as they are.

    :raises InputError: half precision cannot hold a value.
    """
    parameters = {name: value.detach().half() for name, value in model.named_parameters()}
    for name, value in parameters.items():
        if not value.isfinite().all():
            raise InputError(f"{name} has values that half precision cannot hold; export another checkpoint")
    return model.state_dict() | parameters


def training_flags(trained):
    """Return the flags of a config.json that differ from their preset's, but for those of the machine."""
    preset = ["--preset", trained["preset"]] if trained.get("preset") else []
    usual, _ = parse_config(TrainConfig, "", preset)
    names = [field.name for field in dataclasses.fields(TrainConfig) if field.name in trained]
    differing = [name for name in names if name not in MACHINE and trained[name] != getattr(usual, name)]
    return " ".join([*preset, "--data_dir DATA_DIR", *(f"--{name} {trained[name]}" for name in differing)])


def model_card(trained, weights, model, data, output, figures):
    """Return MODEL_CARD.md.

    :param trained, weights: dict of config.json, and path of the checkpoint's weights.
    :param model, data: the network, and the bytes of its file in the archive.
    :param output, figures: path of the archive; a Markdown text, or "".
    """
    step, preset = EMA_FILE.fullmatch(Path(weights).name), trained.get("preset")
    return CARD.format(
        name=output.stem,
        file=output.name,
        layer=", a coarse picture" if trained["color_layer"] else "",
        parameters=sum(value.numel() for value in model.parameters()),
        mib=len(data) / 2**20,
        size=trained["image_size"],
        num_classes=trained["num_classes"],
        trained=f"{int(step[2]):,} steps; average of decay {step[1]}" if step else "steps are not in the file's name",
        flags=training_flags(trained),
        fingerprint=hashlib.sha256(data).hexdigest()[:16],
        preset=f"--preset {preset} " if preset else "",
        data=DATA.get(preset, UNKNOWN),
        figures=f"\n## Figures\n\n{figures.strip()}\n" if figures else "",
    )


def export(model_path, output, figures=""):
    """Write the archive. Raises InputError for a checkpoint without config.json, or whose weights do not fit it."""
    if not is_archive(output):
        raise InputError(f"--output {output}: the archive's name must end in .zip")
    config, given = parse_config(SampleConfig, "", ["--model_path", str(model_path)])
    weights = find_weights(config.model_path, log=log)
    trained, source = trained_config(weights)
    if not trained:
        raise InputError(f"--model_path {model_path}: no {source}, which tells the network; copy it there")
    adopt_training_config(config, given, trained, source)
    model, file = build.untrained_model(config), io.BytesIO()
    load_weights(model, weights)
    torch.save(half(model), file)
    card = model_card({**vars(config), **trained}, weights, model, file.getvalue(), Path(output), figures)
    members = {WEIGHTS: file.getvalue(), CONFIG: Path(source).read_bytes(), "MODEL_CARD.md": card.encode()}
    with atomic_write(output, "wb") as f, zipfile.ZipFile(f, "w") as archive:
        for name, contents in members.items():
            archive.writestr(zipfile.ZipInfo(name), contents, zipfile.ZIP_DEFLATED)  # of no date: equal again
    log(f"{output}: {Path(output).stat().st_size:,} bytes, from {weights}")


def main():
    """Parse flags and write the archive."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_path", required=True, help="checkpoint folder (its newest EMA file), or a .pt file")
    parser.add_argument("--output", required=True, help="the archive, .zip")
    parser.add_argument("--figures", help="a Markdown file with measured figures, for the model card")
    options = parser.parse_args()
    export(options.model_path, options.output, Path(options.figures).read_text() if options.figures else "")


if __name__ == "__main__":
    run_script(main)
