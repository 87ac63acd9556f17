"""Networks from files: both formats, what is refused, and what they are used for."""

import io
import json
import os
import pickle
import warnings
import zipfile

import pytest
import torch

from guided_diffusion.console import InputError
from guided_diffusion.evaluation.segmenters import disagreement, features_of, load_network, segment, segmenter_of

CLASSES = 5


class Bomb:
    """Unpickling it makes a folder named by the environment."""

    def __reduce__(self):
        return os.mkdir, (os.environ["BOMB"],)


@pytest.fixture
def bomb(tmp_path, monkeypatch):
    """The folder that a bomb would make."""
    monkeypatch.setenv("BOMB", str(tmp_path / "exploded"))
    return tmp_path / "exploded"


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


def rewritten(path, target, **changed):
    """Copy an exported program with some records replaced, by the writer that torch itself uses."""
    reader = torch._C.PyTorchFileReader(str(path))
    writer = torch._C.PyTorchFileWriter(str(target))
    for record in reader.get_all_records():
        if record not in changed and record != ".data/serialization_id":
            changed[record] = reader.get_record(record)
    for record, data in changed.items():
        if record not in ("version", ".data/version"):  # the writer adds its own
            writer.write_record(record, data, len(data))
    writer.write_end_of_file()
    return target


# -- loading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["script.pt", "any.pt2", "one.pt2", "two.pt2"])
def test_a_loaded_network_answers_as_the_original(name, files, network, images):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = load_network(files / name, "segmenter")
    torch.testing.assert_close(loaded(images), network(images))
    assert loaded.batch == {"one.pt2": 1, "two.pt2": 2}.get(name)
    assert torch.equal(segment(loaded, images, CLASSES), network(images).argmax(1, keepdim=True))


def test_rewriting_alone_breaks_nothing(files, network, images, tmp_path):
    """The refusals below are for what was changed, not for the writing."""
    loaded = load_network(rewritten(files / "any.pt2", tmp_path / "same.pt2"), "segmenter")
    torch.testing.assert_close(loaded(images), network(images))


def test_a_fixed_size_is_named(files):
    with pytest.raises(
        InputError, match=r"--segmenter .*one.pt2 fails on 32x48 pictures \(.*give a network of that size"
    ):
        load_network(files / "one.pt2", "segmenter")(torch.zeros(1, 3, 32, 48))


def test_missing_file(tmp_path):
    with pytest.raises(InputError, match=r"--features .*none.pt: cannot be read .No such file"):
        load_network(tmp_path / "none.pt", "features")


@pytest.mark.parametrize("content", ["empty", "text", "zip", "state dict", "module"])
def test_other_files(content, tmp_path, network):
    path = tmp_path / "network.pt"
    if content == "zip":
        with zipfile.ZipFile(path, "w") as z:
            z.writestr("a/data.txt", "hello")
    elif content in ("state dict", "module"):
        torch.save(network if content == "module" else network.state_dict(), path)
    else:
        path.write_bytes(b"" if content == "empty" else b"hello")
    with pytest.raises(
        InputError, match=r"--segmenter .*network.pt: neither TorchScript nor an exported program; write one"
    ):
        load_network(path, "segmenter")


@pytest.mark.parametrize("name", ["script.pt", "any.pt2"])
def test_truncated_and_flipped_files(name, files, tmp_path):
    data = (files / name).read_bytes()
    for k in range(12):
        path = tmp_path / name
        bad = bytearray(data)
        if k < 4:
            del bad[len(bad) * (k + 1) // 6 :]
        else:
            bad[len(bad) * (k - 3) // 10] ^= 0xFF
        path.write_bytes(bad)
        try:
            load_network(path, "segmenter")  # a flip may hit padding
        except InputError as error:
            assert "\n" not in str(error) and str(path) in str(error)
        else:
            assert k >= 4


# -- files with code --------------------------------------------------------------------------------------------------


def test_the_bomb_goes_off_where_pickles_are_trusted(bomb):
    pickle.loads(pickle.dumps(Bomb()))
    assert bomb.exists()


def test_a_pickled_bomb_is_refused(bomb, tmp_path):
    torch.save(Bomb(), tmp_path / "bomb.pt")
    (tmp_path / "bomb.pkl").write_bytes(pickle.dumps(Bomb()))
    for name in ("bomb.pt", "bomb.pkl"):
        with pytest.raises(InputError, match="neither TorchScript nor an exported program"):
            load_network(tmp_path / name, "segmenter")
    assert not bomb.exists()


@pytest.mark.parametrize("record", ["data.pkl", "constants.pkl"])
def test_a_bomb_in_torchscript_is_refused(record, bomb, files, tmp_path):
    bad = rewritten(files / "script.pt", tmp_path / "bomb.pt", **{record: pickle.dumps(Bomb(), protocol=2)})
    with pytest.raises(InputError, match=r"--segmenter .*bomb.pt: damaged"):
        load_network(bad, "segmenter")
    assert not bomb.exists()


def pickled_bomb():
    buffer = io.BytesIO()
    torch.save(({"bomb": Bomb()},), buffer)
    return buffer.getvalue()


def test_a_bomb_in_sample_inputs_is_refused(bomb, files, tmp_path):
    bad = rewritten(files / "any.pt2", tmp_path / "bad.pt2", **{"data/sample_inputs/model.pt": pickled_bomb()})
    with pytest.raises(
        InputError, match="refused, because it brings a pickle of more than tensors in data/sample_inputs"
    ):
        load_network(bad, "segmenter")
    assert not bomb.exists()


@pytest.mark.parametrize("kind", ["weight", "legacy weights", "opaque constant", "native code"])
def test_bombs_in_other_places_are_refused(kind, bomb, files, tmp_path):
    reader = torch._C.PyTorchFileReader(str(files / "any.pt2"))
    if kind == "weight":
        config = json.loads(reader.get_record("data/weights/model_weights_config.json"))
        config["config"]["0.weight"]["use_pickle"] = True
        changed = {
            "data/weights/model_weights_config.json": json.dumps(config).encode(),
            "data/weights/weight_0": pickled_bomb(),
        }
    elif kind == "legacy weights":
        changed = {"data/weights/model.pt": pickled_bomb()}
    elif kind == "opaque constant":
        entry = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}
        changed = {
            "data/constants/model_constants_config.json": json.dumps({"config": {"c": entry}}).encode(),
            "data/constants/opaque_obj_0": pickle.dumps(Bomb()),
        }
    else:
        changed = {"data/aotinductor/model/code.so": b"\x7fELF"}
    bad = rewritten(files / "any.pt2", tmp_path / "bad.pt2", **changed)
    with pytest.raises(InputError, match=r"bad.pt2: refused, because it brings"):
        load_network(bad, "segmenter")
    assert not bomb.exists()


MKDIR = "__import__('os').mkdir(__import__('os').environ['BOMB'])"


@pytest.mark.parametrize("place", ["guard", "size", "call", "name"])
def test_python_source_in_a_program_does_not_run(place, bomb, files, tmp_path, images):
    program = json.loads(torch._C.PyTorchFileReader(str(files / "any.pt2")).get_record("models/model.json"))
    graph = program["graph_module"]["graph"]
    if place == "guard":
        program["guards_code"] = [MKDIR]
    elif place == "size":
        graph["tensor_values"]["input"]["sizes"][0] = {"as_expr": {"expr_str": MKDIR, "hint": None}}
    elif place == "call":
        graph["nodes"][0]["target"] = "torch.serialization.os.mkdir"
        graph["nodes"][0]["inputs"] = [{"name": "path", "arg": {"as_string": str(bomb)}, "kind": 1}]
    else:
        graph["nodes"][0]["inputs"][0]["name"] = f"input={MKDIR}, x"
    bad = rewritten(files / "any.pt2", tmp_path / "bad.pt2", **{"models/model.json": json.dumps(program).encode()})
    if place == "guard":  # left out: the network is as it was
        assert load_network(bad, "segmenter")(images).shape == (3, CLASSES, 16, 24)
    else:
        with pytest.raises(InputError, match="refused, because it brings"):
            load_network(bad, "segmenter")
    assert not bomb.exists()


# -- uses -------------------------------------------------------------------------------------------------------------


def test_ids_and_scores_are_taken(images):
    ids = torch.randint(0, CLASSES, (3, 16, 24), generator=torch.Generator().manual_seed(2))
    scores = torch.nn.functional.one_hot(ids, CLASSES).permute(0, 3, 1, 2).float()
    for answer in (ids, ids[:, None], ids.int(), scores):
        found = segmenter_of(lambda x, answer=answer: answer, CLASSES)(images)
        assert torch.equal(found, ids[:, None]) and found.dtype == torch.int64


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (torch.zeros(3, CLASSES, 8, 12), r"gave \(3, 5, 8, 12\) for pictures \(3, 3, 16, 24\)"),
        (torch.zeros(2, CLASSES, 16, 24), r"gave \(2, 5, 16, 24\)"),
        (torch.zeros(3, 19, 16, 24), "gave scores of 19 classes, but --num_classes is 5"),
        (torch.full((3, 16, 24), 255), r"gave class ids 255\.\.255, but --num_classes is 5"),
        (torch.full((3, 16, 24), -1), r"gave class ids -1\.\.-1"),
        ({"out": 1}, "gave dict"),
    ],
)
def test_other_answers_are_input_errors(answer, message, images):
    with pytest.raises(InputError, match="--segmenter " + message):
        segment(lambda x: answer, images, CLASSES)


def test_features_are_vectors_or_averaged_maps(images):
    maps = torch.rand(3, 7, 4, 6, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(features_of(lambda x: maps)(images), maps.flatten(2).mean(2))
    assert torch.equal(features_of(lambda x: maps[:, :, 0, 0].double())(images), maps[:, :, 0, 0])
    for wrong in (maps[:2], maps[:, 0], [1]):
        with pytest.raises(InputError, match="--features gave"):
            features_of(lambda x, wrong=wrong: wrong)(images)


def test_disagreement_counts_pixels(images):
    label = torch.zeros(1, 1, 16, 24, dtype=torch.int64)
    ids = label.repeat(3, 1, 1, 1)
    ids[1, 0, :4] = 2
    ids[2] = 1
    assert disagreement(lambda x: ids, images, label, CLASSES).tolist() == [0.0, 0.25, 1.0]
    assert disagreement(lambda x: ids, images, ids.clone(), CLASSES).tolist() == [0.0, 0.0, 0.0]
