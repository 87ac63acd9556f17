"""docs/export_weights.py: an archive samples as its checkpoint does, at both ends; torn ones are refused."""

import csv
import io
import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import as_arguments, train_into
from export_weights import export, half

from guided_diffusion.config import SampleConfig, parse_config
from guided_diffusion.console import InputError
from guided_diffusion.evaluation.results import ResultsFolder
from guided_diffusion.files import file_digest
from guided_diffusion.training.checkpoint import find_weights, load_weights, trained_config
from guided_diffusion.training.distributed import Ranks
from image_sample import regenerate

PRIORS = "color_prior", "label_prior"  # whole numbers, beyond half precision


@pytest.fixture(scope="module")
def checkpoint(scenes, tmp_path_factory):
    """The checkpoint folder of a tiny network with a colour layer."""
    return train_into(tmp_path_factory.mktemp("layered"), scenes, color_layer=True, no_instance=True, label_scale=0)


@pytest.fixture
def archive(checkpoint, tmp_path):
    export(checkpoint, tmp_path / "tiny.zip", "PSNR 20 dB")
    return tmp_path / "tiny.zip"


@pytest.fixture
def sample(scenes, tmp_path):
    """Function that runs the sampling program with a --model_path; returns its results folder."""

    def run(model_path, name, **flags):
        plain = {"data_dir": scenes, "timestep_respacing": 3, "num_samples": 2, "link": "ideal", "metrics": "psnr"}
        flags = {**plain, "label_scale": 1, "model_path": model_path, "results_path": tmp_path / name, **flags}
        regenerate(*parse_config(SampleConfig, "", as_arguments(flags)), Ranks())
        return ResultsFolder(tmp_path / name)

    return run


def column(results, name):
    with open(results.path / "results.csv", newline="") as f:
        return [row[name] for row in csv.DictReader(f)]


def test_archive_holds_half_precision_whole_priors_and_the_same_config(archive, checkpoint):
    own = torch.load(find_weights(str(checkpoint)), weights_only=True)
    with zipfile.ZipFile(archive) as f:
        assert f.namelist() == ["weights.pt", "config.json", "MODEL_CARD.md"]
        assert f.read("config.json") == (checkpoint / "config.json").read_bytes()
        packed = torch.load(io.BytesIO(f.read("weights.pt")), weights_only=True)
    assert packed.keys() == own.keys() >= {*PRIORS} and own["color_prior"].abs().max() > 2048
    for key, value in own.items():
        expected = value if key in PRIORS else value.half()
        assert packed[key].dtype == expected.dtype and torch.equal(packed[key], expected)
    assert archive.stat().st_size < 0.6 * Path(find_weights(str(checkpoint))).stat().st_size


def test_model_card_has_the_facts(archive, checkpoint):
    card = zipfile.ZipFile(archive).read("MODEL_CARD.md").decode()
    own = torch.load(find_weights(str(checkpoint)), weights_only=True)
    count = sum(value.numel() for name, value in own.items() if name not in PRIORS)
    assert f"| {count:,}, in half" in card
    assert "4 steps; average of decay 0.9 |" in card and "--color_layer True" in card and "--drop_rate 0.1" in card
    assert str(checkpoint) not in card and file_digest(archive)[:8].hex() in card
    assert "## Figures\n\nPSNR 20 dB" in card and "{" not in card


def test_archive_samples_as_the_folder_up_to_rounding(archive, checkpoint, sample):
    folders = sample(checkpoint, "folder"), sample(archive, "archive")
    pictures = [
        [results.pixels("samples", name).astype(int) for name in column(results, "name")] for results in folders
    ]
    difference = np.abs(np.subtract(*pictures))
    assert difference.max() <= 4 and difference.mean() < 0.5
    assert column(folders[0], "bits_total") == column(folders[1], "bits_total")  # the priors are equal


def test_receive_from_an_archive_gives_the_transmitters_picture(archive, checkpoint, sample, tmp_path):
    sent = sample(archive, "sent", role="transmit")
    export(checkpoint, tmp_path / "again.zip", "other figures")  # the weights count, not the card
    for path in (archive, tmp_path / "again.zip"):
        received = sample(path, f"from {path.stem}", role="receive", messages=sent.path / "messages")
        assert column(received, "picture_sha256") == column(sent, "picture_sha256")
    with pytest.raises(InputError, match="fingerprint"):
        sample(checkpoint, "other weights", role="receive", messages=sent.path / "messages")


def repacked(archive, **changes):
    """Write an archive anew, with some files' contents changed, or left out (None)."""
    with zipfile.ZipFile(archive) as f:
        members = {name: f.read(name) for name in f.namelist()} | changes
    with zipfile.ZipFile(archive, "w") as f:
        for name, contents in members.items():
            if contents is not None:
                f.writestr(name, contents)


def opened(archive):
    """Read all that a run reads of an archive."""
    trained_config(str(archive))
    load_weights({}, archive)


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.9, 0.999])
def test_torn_archive_is_refused_in_one_line(archive, share):
    raw = archive.read_bytes()
    archive.write_bytes(raw[: int(share * len(raw))])
    with pytest.raises(InputError, match=r"tiny\.zip: .*no whole zip archive") as caught:
        opened(archive)
    assert "\n" not in str(caught.value)


def test_flipped_bits_of_an_archive_are_refused_or_harmless(archive, checkpoint):
    raw, refused = archive.read_bytes(), 0
    expected = trained_config(find_weights(str(checkpoint)))[0], file_digest(archive)
    for place in range(3, len(raw), len(raw) // 60):
        archive.write_bytes(raw[:place] + bytes([raw[place] ^ 16]) + raw[place + 1 :])
        try:
            assert (trained_config(str(archive))[0], file_digest(archive)) == expected
        except InputError:
            refused += 1
    assert refused > 50


def test_archive_that_lacks_a_file_is_refused(archive):
    repacked(archive, **{"config.json": None})
    with pytest.raises(InputError, match=r"tiny\.zip: .*the archive has no config\.json; write it by"):
        opened(archive)
    repacked(archive, **{"config.json": json.dumps({"lr": 1}), "weights.pt": None})
    with pytest.raises(InputError, match=r"tiny\.zip: .*the archive has no weights\.pt"):
        opened(archive)
    repacked(archive, **{"weights.pt": b"other"})
    with pytest.raises(InputError, match=r"tiny\.zip: it cannot be read as plain tensors"):
        opened(archive)


def test_export_refuses_what_it_cannot_pack(checkpoint, tmp_path):
    with pytest.raises(InputError, match=r"--output camvid\.tar: .*\.zip"):
        export(checkpoint, "camvid.tar")
    shutil.copy(find_weights(str(checkpoint)), tmp_path / "alone.pt")
    with pytest.raises(InputError, match=r"alone\.pt: no .*config\.json"):
        export(tmp_path / "alone.pt", tmp_path / "out.zip")
    with pytest.raises(InputError, match="w has values that half precision cannot hold"):
        half(torch.nn.ParameterDict({"w": torch.tensor([1e5])}))
    assert not (tmp_path / "out.zip").exists()
