"""Training samples: every draw follows from (seed, position), whatever the batch."""

import pickle

import pytest
import torch

from guided_diffusion.data.pictures import to_uint8
from guided_diffusion.data.semantics import LABEL_SCALES, SemanticCoding, received_semantics
from guided_diffusion.data.toy_scenes import draw_scene
from guided_diffusion.link.channel import TRAINING_SIGMAS, transmit
from guided_diffusion.link.color_layer import TRAINED, ColorPrior, coarse, layer_planes
from guided_diffusion.link.noise_bank import FreshNoise, NoiseBank
from guided_diffusion.random_streams import generator, integer, uniform
from guided_diffusion.training.inputs import TrainingInputs

K, H, W = 4, 8, 16
BANK = NoiseBank((3, H, W), 50, seed=9)
FRESH = FreshNoise((3, H, W), 5, "noise")


def inputs(**changes):
    same = {"num_classes": K, "one_hot": True, "edge_plane": True, "bank": BANK, "seed": 5, "coding": SemanticCoding()}
    return TrainingInputs(**{**same, **changes})


def prepared(positions, **changes):
    """Return a prepared batch, and its conditioning."""
    make = inputs(**changes)
    found = make(batch(positions))
    return found, make.conditioning(found)


def batch(positions):
    """A loaded batch whose pictures follow from their positions."""
    streams = [generator(0, "picture", p) for p in positions]
    image = torch.stack([torch.rand(3, H, W, generator=g) * 2 - 1 for g in streams])
    label = torch.stack([torch.randint(K, (1, H, W), generator=g) for g in streams])
    edge = torch.stack([torch.rand(1, H, W, generator=g) for g in streams])
    found = {"image": image, "label": label, "instance": label.int() * 1000, "image_edge": edge}
    return {**found, "path": [f"{p}.png" for p in positions], "position": torch.tensor(positions)}


NOISY = {"add_noise": True, "drop_rate": 0.3}
CASES = {
    "plain": {},
    "noisy": NOISY,
    "fresh noise": {**NOISY, "bank": FRESH},
    "fixed sigma": {**NOISY, "sigma": 0.3, "noise_to": "label"},
    "raw ids": {"one_hot": False},
    "noisy raw ids": {**NOISY, "one_hot": False},
    "coded": {"coding": SemanticCoding(2, 16, 0.3, 2), "drop_rate": 0.5},
    "no edges": {"edge_plane": False, "add_noise": True},
}


@pytest.mark.parametrize("name", CASES)
def test_conditioning_is_that_of_the_plain_way(name):
    """One-hot planes through source coding and channel, then dropped: what the compact batch must give, bit for bit."""
    positions, make, loaded = [8, 2, 100_031], inputs(**CASES[name]), batch([8, 2, 100_031])
    semantics = loaded["label"], loaded["instance"], loaded["image_edge"]
    y = received_semantics(*semantics, K, make.one_hot, make.edge_plane, make.coding)
    if make.add_noise:
        draws = [TRAINING_SIGMAS[int(uniform(5, "sigma", p) * len(TRAINING_SIGMAS))] for p in positions]
        sigmas = draws if make.sigma is None else make.sigma
        streams = [generator(5, "channel", p) for p in positions]
        options = {"num_classes": K, "one_hot": make.one_hot, "noise_to": make.noise_to}
        y = transmit(y, sigmas, generators=streams, **options)
    kept = torch.tensor([float(uniform(5, "drop", p) >= make.drop_rate) for p in positions])
    assert torch.equal(make.conditioning(make(loaded)), y * kept[:, None, None, None])


def test_inputs_are_compact_and_picklable():
    found = pickle.loads(pickle.dumps(inputs()))(batch([0, 5]))
    assert found["label"].dtype == torch.uint8 and found["label"].shape == (2, 1, H, W)
    assert found["edges"].shape == (2, 1, H, W) and found["path"] == ["0.png", "5.png"]
    noisy, y = prepared([0, 5], add_noise=True)
    assert noisy["planes"].shape[1:] == (H, W) and len(noisy["planes"]) <= y.shape[0] * y.shape[1]


def test_conditioning_has_an_edge_plane_also_without_edges():
    make = inputs()
    loaded = {key: value for key, value in batch([0]).items() if key not in ("instance", "image_edge")}
    y = make.conditioning(make(loaded))
    assert y.shape == (1, K + 1, H, W) and not y[:, K].any()


def test_noise_and_timestep_are_those_of_the_position():
    positions = [17, 3, 100_000, *range(50, 100)]
    found, fresh = (prepared(positions, bank=bank)[0] for bank in (BANK, FRESH))
    assert torch.equal(found["noise"], BANK.entries([integer(5, "bank index", 50, p) for p in positions]))
    draws = [torch.randn(3, H, W, generator=generator(5, "noise", p)) for p in positions]
    assert torch.equal(fresh["noise"], torch.stack(draws))
    assert found["u"].tolist() == fresh["u"].tolist() == [uniform(5, "timestep", p) for p in positions]


PRIOR = ColorPrior.fit([draw_scene(seed, H, W)[0] for seed in range(4)])


def test_cut_samples_are_parts_of_the_whole_ones():
    positions, changes = [5, 6, 7, 8], {"color_prior": PRIOR, "coding": SemanticCoding(0, 0)}
    whole, y = prepared(positions, **changes)
    cut, part = prepared(positions, **changes, crop=4)
    assert part.shape == (4, y.shape[1], 4, 8) and cut["noise"].shape == cut["image"].shape == (4, 3, 4, 8)
    places = set()
    for k in range(4):
        found = [
            (top, left)
            for top in range(H - 3)
            for left in range(W - 7)
            if torch.equal(whole["noise"][k, :, top : top + 4, left : left + 8], cut["noise"][k])
        ]
        ((top, left),) = found
        window = (k, slice(None), slice(top, top + 4), slice(left, left + 8))
        assert torch.equal(y[window], part[k]) and torch.equal(whole["image"][window], cut["image"][k])
        places.add((top, left))
    assert len(places) > 1


def test_label_scale_of_a_sample_is_one_of_those_that_a_target_chooses_among():
    positions, seen = range(12), set()
    _, y = prepared(positions, coding=SemanticCoding(0, 0))
    for k, position in enumerate(positions):
        own = {scale: prepared([position], coding=SemanticCoding(scale, 0))[1][0] for scale in LABEL_SCALES}
        seen |= {scale for scale in own if torch.equal(own[scale], y[k])}
    assert seen == {*LABEL_SCALES}


def test_layer_of_a_sample_has_a_step_of_its_own_and_the_picture_is_what_it_lacks():
    positions = range(60)
    found, y = prepared(positions, color_prior=PRIOR)
    loaded, layer = batch(positions)["image"], y[:, -4:]
    steps = [round(float(value) * 256) - 4 for value in layer[:, 3, 0, 0]]
    for k, step in enumerate(steps):
        if step < 0:
            assert not layer[k].any()
            continue
        assert torch.equal(layer[k], layer_planes(coarse(to_uint8(loaded[k : k + 1])[0], step, PRIOR), step))
    assert torch.allclose(found["image"] * 0.2 + layer[:, :3], loaded, atol=1e-6)
    assert 1 <= sum(step < 0 for step in steps) <= 15 and len({*steps} & {*TRAINED}) > 25
