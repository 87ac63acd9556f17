"""The learned coder of label maps: there and back, against the plain coder, and its parts against naive loops."""

from contextlib import suppress
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from guided_diffusion.console import InputError
from guided_diffusion.data.toy_scenes import draw_scene
from guided_diffusion.link import label_prior
from guided_diffusion.link.label_prior import LabelPrior
from guided_diffusion.link.source_coding import decode_map, encode_map


@pytest.fixture(scope="module")
def maps():
    """Twelve label maps, (32, 64) uint8."""
    return [draw_scene(seed, 32, 64)[1].astype(np.uint8) for seed in range(12)]


@pytest.fixture(scope="module")
def prior(maps):
    return LabelPrior.fit(maps[:8], 35)


def random_prior(classes, seed=0):
    weights = np.random.default_rng(seed).integers(-300, 300, LabelPrior.shape(classes))
    return LabelPrior(weights, classes)


def test_learned_maps_take_fewer_bytes_at_all_scales(maps, prior):
    for scale in (1, 2, 4):
        small = [each[scale // 2 :: scale, scale // 2 :: scale] for each in maps[8:]]
        before = sum(len(encode_map(each, 35)) for each in small)
        after = [encode_map(each, 35, prior) for each in small]
        assert sum(map(len, after)) < 0.9 * before
        for each, data in zip(small, after, strict=True):
            assert np.array_equal(decode_map(data, *each.shape, 35, prior), each)


@pytest.mark.parametrize("classes", [1, 2, 35, 256])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 9), (9, 1), (17, 33)])
def test_encode_is_lossless_with_any_weights(classes, height, width):
    draws, prior = np.random.default_rng(1), random_prior(classes)
    for side in (1, 4):
        small = draws.integers(0, classes, (height // side + 1, width // side + 1))
        ids = np.kron(small, np.ones((side, side)))[:height, :width].astype(np.uint8)
        assert np.array_equal(prior.decode(prior.encode(ids), height, width), ids)


def test_decode_of_damage_is_an_error_or_another_map(maps, prior):
    ids = maps[9][::2, ::2]
    data, draws = prior.encode(ids), np.random.default_rng(0)
    tries = [data[:-1], b""]
    for _ in range(60):
        tries.append(bytearray(data))
        tries[-1][draws.integers(len(data))] ^= 1 << draws.integers(8)
    for damaged in tries:
        with suppress(InputError):
            found = prior.decode(bytes(damaged), *ids.shape)  # the one coding of another map
            assert not np.array_equal(found, ids) and prior.encode(found) == bytes(damaged)
    with pytest.raises(InputError, match="the label map is damaged"):
        prior.decode(data + b"\0", *ids.shape)
    with pytest.raises(InputError, match="512x512 pixels: beyond the coder's limits"):
        prior.decode(data, 512, 512)


def test_large_and_irregular_maps_are_left_to_others(prior):
    assert prior.encode(np.zeros((512, 512), np.uint8)) is None
    noise = np.random.default_rng(0).integers(0, 35, (128, 128)).astype(np.uint8)
    assert prior.encode(noise) is None
    assert np.array_equal(decode_map(encode_map(noise, 35, prior), 128, 128, 35), noise)


def test_decode_map_needs_the_prior_of_a_learned_map(maps, prior):
    with pytest.raises(InputError, match="needs the label prior"):
        decode_map(encode_map(maps[9], 35, prior), 32, 64, 35)


def test_samples_are_windows_and_bands_against_a_loop(maps):
    ids = maps[0][:9, :20]
    height, width = ids.shape
    each, expected = 16, []  # of flat windows one in 16 stands for all
    for y in range(height):
        for x in range(width):
            window = [
                ids[y - up, x + dx] if y >= up and 0 <= x + dx < width else 35
                for up, first, end in ((3, -2, 4), (2, -3, 5), (1, -4, 7), (0, -5, 0))
                for dx in range(first, end)
            ]
            flat = set(window) == {ids[y, x]}
            if not flat or (y * width + x) % each == 0:
                key = [*window, y * 16 // height, x * 16 // width]
                expected.append((key, ids[y, x], each if flat else 1))
    keys, symbols, counts = label_prior._samples(ids, 35)
    assert [(list(k), s, c) for k, s, c in zip(keys, symbols, counts, strict=True)] == expected


def test_nodes_have_the_probabilities_of_what_was_fitted(maps):
    """A walk over a map costs what the decisions of all its windows cost in floating point."""
    prior, ids = random_prior(35), maps[3]
    keys, symbols, _ = label_prior._samples(ids, 35)
    nodes = prior._nodes()
    split = label_prior._inputs_in_all(35)
    hidden = prior.weights[label_prior._inputs(keys, 35)].sum(1).clip(0)
    chances = 1 / (1 + np.exp(-(hidden @ prior.weights[split:].T) / 256 / 256))
    asked, answers = label_prior._decisions(keys, symbols, 35)
    assert len({*map(bytes, keys)}) > 20
    for k, key in enumerate(map(bytes, keys)):
        guesses, tree = nodes(key)
        near = [v for v in dict.fromkeys(key[place] for place in (29, 18, 19, 17)) if v != 35]
        assert [guess for guess, _ in guesses] == near
        found = [(node[0], symbols[k] == guess) for guess, node in guesses]
        if symbols[k] in near:
            found = found[: near.index(symbols[k]) + 1]
        else:
            code = 64 + int(symbols[k])
            found += [(tree(code >> b + 1)[0], code >> b & 1) for b in reversed(range(6))]
        expected = zip(chances[k][asked[k] > 0], answers[k][asked[k] > 0], strict=True)
        for (chance, bit), (wanted, answer) in zip(found, expected, strict=True):
            assert bit == answer and abs(chance / 65536 - min(max(wanted, 2**-11), 1 - 2**-11)) < 1e-3


def test_fit_follows_from_the_maps_and_leaves_global_draws_alone(maps, prior):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    again = LabelPrior.fit(maps[:8], 35)
    assert np.array_equal(again.weights, prior.weights) and torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(prior.weights, prior.weights.round()) and prior.weights.shape == LabelPrior.shape(35)
    buffer = torch.zeros(LabelPrior.shape(35), dtype=torch.int32).copy_(torch.as_tensor(prior.weights))
    carried = LabelPrior.of(SimpleNamespace(layer_channels=4, label_prior=buffer), 35)
    assert carried.encode(maps[9]) == prior.encode(maps[9])
    assert LabelPrior.of(SimpleNamespace(layer_channels=0), 35) is None
