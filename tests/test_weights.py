"""Weights files: what is refused, and the names of the family."""

import re

import pytest
import torch
from conftest import normals, tiny_network
from test_checkpoint import same

from guided_diffusion import load_weights
from guided_diffusion.console import InputError
from guided_diffusion.diffusion.unet import ResBlock
from guided_diffusion.training.checkpoint import with_legacy_keys


def network(**flags):
    return tiny_network(learn_sigma=False, **flags)[0]


@pytest.fixture(scope="module")
def weights():
    return {key: value + 1 for key, value in network().state_dict().items()}


def refuse(path, words):
    with pytest.raises(InputError, match=rf"{path.name}: {words}") as caught:
        load_weights(network(), path)
    assert "\n" not in str(caught.value)


def test_load_weights_refuses_code_and_does_not_run_it(tmp_path):
    class Burglar:
        def __reduce__(self):
            return open, (str(tmp_path / "trace"), "w")

    torch.save({"w": torch.zeros(1), "x": Burglar()}, tmp_path / "evil.pt")
    refuse(tmp_path / "evil.pt", "it cannot be read as plain tensors .*; copy it again")
    assert not (tmp_path / "trace").exists()


def test_load_weights_refuses_garbage_and_other_contents(tmp_path):
    path = tmp_path / "model000001.pt"
    for content in (b"", b"not a checkpoint", b"PK\x03\x04 half a zip"):
        path.write_bytes(content)
        refuse(path, "it cannot be read")
    torch.save([1, 2], path)
    refuse(path, "expected a state dict, found list")


def test_load_weights_from_dicts_and_paths(tmp_path, weights):
    torch.save(weights, tmp_path / "w.pt")
    unused = {"input_blocks.12.0.spade_norm.mlp_shared.0.weight": torch.zeros(3)}
    for source in (weights, weights | unused, tmp_path / "w.pt", str(tmp_path / "w.pt")):
        model = network()
        load_weights(model, source)
        assert same(model.state_dict(), weights)


SHAPE = r"key {} has shape {}, the network expects \(3, 32, 3, 3\)"


@pytest.mark.parametrize(
    "key, value, words",
    [
        ("middle_block.0.spade_norm.mlp_gamma.weight", torch.zeros(1), "unexpected key {} "),
        ("input_blocks.1.spade_norm.w", torch.zeros(1), "unexpected key {} "),
        ("ema.out.2.bias", torch.zeros(1), "unexpected key {} "),
        ("out.2.weight", torch.zeros(3, 32, 1, 1), SHAPE.format("{}", r"\(3, 32, 1, 1\)")),
        ("out.2.weight", 1.5, SHAPE.format("{}", "float")),
    ],
)
def test_load_weights_names_what_does_not_fit(weights, key, value, words):
    with pytest.raises(InputError, match=words.format(re.escape(key))):
        load_weights(network(), {**weights, key: value})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_load_weights_assigns_to_a_model_without_values(tmp_path, weights, dtype):
    torch.save({key: value.to(dtype) for key, value in weights.items()}, tmp_path / "w.pt")
    trained, model = network(), network().to("meta")
    load_weights(model, tmp_path / "w.pt")
    assert not any(value.is_meta for value in (*model.parameters(), *model.buffers()))
    assert {value.dtype for value in model.parameters()} == {torch.float32}
    load_weights(trained, tmp_path / "w.pt")
    inputs = normals(1, 3, 8, 8), torch.tensor([5]), normals(1, 5, 8, 8)
    assert torch.equal(model(*inputs), trained(*inputs))


def test_with_legacy_keys_adds_them_to_every_plain_block_of_the_encoder():
    model = network(resblock_updown=True, channel_mult="1,2", num_res_blocks=2)
    extended = with_legacy_keys(model.state_dict(), model)
    added = {k: v for k, v in extended.items() if k not in model.state_dict()}
    blocks = {f"input_blocks.{k}": m for k, m in model.input_blocks.named_modules() if isinstance(m, ResBlock)}
    assert len(blocks) == 5 and len(added) == 6 * len(blocks)
    for name, block in blocks.items():
        n = block.in_layers[0].num_channels
        for part, shape in (("shared.0", (128, 3, 3, 3)), ("gamma", (n, 128, 3, 3)), ("beta", (n, 128, 3, 3))):
            for key, size in (("weight", shape), ("bias", shape[:1])):
                value = added[f"{name}.spade_norm.mlp_{part}.{key}"]
                assert tuple(value.shape) == size and not value.any()
