"""Networks from files: both formats, what is refused, and what they are used for."""

import warnings

import pytest
import torch

from guided_diffusion.console import InputError
from guided_diffusion.evaluation.segmenters import disagreement, features_of, load_network, segment

CLASSES = 5


@pytest.fixture(scope="module")
def network():
    weights = torch.Generator().manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(8, CLASSES, 1))
    for parameter in layers.parameters():
        torch.nn.init.normal_(parameter, generator=weights)
    return layers.requires_grad_(False).eval()


@pytest.fixture
def images():
    return torch.rand(3, 3, 16, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture(scope="module")
def files(network, tmp_path_factory):
    """The network as a TorchScript file and as programs: for any batch, for one, for two pictures."""
    folder = tmp_path_factory.mktemp("networks")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(network).save(folder / "script.pt")
    sizes = {0: torch.export.Dim("n", min=1, max=64), 2: torch.export.Dim("h", min=8), 3: torch.export.Dim("w", min=8)}
    for name, batch, shapes in (("any", 2, (sizes,)), ("one", 1, None), ("two", 2, None)):
        program = torch.export.export(network, (torch.zeros(batch, 3, 16, 24),), dynamic_shapes=shapes)
        torch.export.save(program, folder / f"{name}.pt2")
    return folder


@pytest.mark.parametrize("name", ["script.pt", "any.pt2", "one.pt2", "two.pt2"])
def test_load_network_answers_as_the_original(name, files, network, images):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = load_network(files / name, "segmenter")
    torch.testing.assert_close(loaded(images), network(images))
    assert torch.equal(segment(loaded, images, CLASSES), network(images).argmax(1, keepdim=True))


def test_network_names_a_fixed_size(files):
    message = r"--segmenter .*one.pt2 fails on 32x48 pictures \(.*give a network of that size"
    with pytest.raises(InputError, match=message):
        load_network(files / "one.pt2", "segmenter")(torch.zeros(1, 3, 32, 48))


@pytest.mark.parametrize("content", ["missing", "empty", "state dict", "script.pt", "any.pt2"])
def test_load_network_refuses_other_and_truncated_files(content, files, tmp_path, network):
    path = tmp_path / "network.pt"
    if content == "empty":
        path.touch()
    elif content == "state dict":
        torch.save(network.state_dict(), path)
    elif content != "missing":
        data = (files / content).read_bytes()
        path.write_bytes(data[: int(0.9 * len(data))])
    with pytest.raises(InputError, match=rf"--features {path}: cannot be loaded \(.*give a file of") as caught:
        load_network(path, "features")
    assert "\n" not in str(caught.value)


def test_segment_takes_ids_and_scores(images):
    ids = torch.randint(0, CLASSES, (3, 16, 24), generator=torch.Generator().manual_seed(2))
    scores = torch.nn.functional.one_hot(ids, CLASSES).permute(0, 3, 1, 2).float()
    for answer in (ids, ids[:, None], ids.int(), scores):
        found = segment(lambda x, answer=answer: answer, images, CLASSES)
        assert torch.equal(found, ids[:, None]) and found.dtype == torch.int64


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (torch.zeros(3, CLASSES, 8, 12), r"gave \(3, 5, 8, 12\) for pictures \(3, 3, 16, 24\)"),
        (torch.zeros(3, 19, 16, 24), r"gave \(3, 19, 16, 24\) .* scores \(N, K, H, W\) of 5 classes"),
        (torch.full((3, 16, 24), 255), r"gave class ids 255\.\.255, but --num_classes is 5"),
        ({"out": 1}, r"gave \(\) for pictures"),
    ],
)
def test_segment_refuses_other_answers(answer, message, images):
    with pytest.raises(InputError, match="--segmenter " + message):
        segment(lambda x: answer, images, CLASSES)


def test_features_of_averages_maps(images):
    maps = torch.rand(3, 7, 4, 6, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(features_of(lambda x: maps)(images), maps.flatten(2).mean(2))
    assert torch.equal(features_of(lambda x: maps[:, :, 0, 0].double())(images), maps[:, :, 0, 0])
    for wrong in (maps[:, 0], [1]):
        with pytest.raises(InputError, match="--features gave"):
            features_of(lambda x, wrong=wrong: wrong)(images)


def test_disagreement_counts_pixels(images):
    label = torch.zeros(1, 1, 16, 24, dtype=torch.int64)
    ids = label.repeat(3, 1, 1, 1)
    ids[1, 0, :4] = 2
    ids[2] = 1
    assert disagreement(lambda x: ids, images, label, CLASSES).tolist() == [0.0, 0.25, 1.0]
    assert disagreement(lambda x: ids, images, ids.clone(), CLASSES).tolist() == [0.0, 0.0, 0.0]
