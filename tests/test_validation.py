"""The validation score against closed forms, and previews."""

import functools

import numpy as np
import pytest
import torch

from guided_diffusion import create_model_and_diffusion, model_and_diffusion_defaults
from guided_diffusion.data.semantics import SemanticCoding
from guided_diffusion.diffusion.gaussian_diffusion import create_gaussian_diffusion
from guided_diffusion.evaluation.metrics import colour_error
from guided_diffusion.evaluation.panels import preview_panel
from guided_diffusion.link.noise_bank import NoiseBank
from guided_diffusion.training.inputs import TrainingInputs
from guided_diffusion.training.validation import Validation

K, H, W = 4, 16, 32
CPU = torch.device("cpu")
FLAGS = {
    "num_channels": 32,
    "channel_mult": "1,1",
    "num_res_blocks": 1,
    "num_classes": K,
    "attention_resolutions": "1",
    "diffusion_steps": 20,
    "dropout": 0.3,
}


def item(seed):
    stream = torch.Generator().manual_seed(seed)
    return {
        "image": torch.rand(1, 3, H, W, generator=stream) * 2 - 1,
        "label": torch.randint(K, (1, 1, H, W), generator=stream),
        "image_edge": torch.rand(1, 1, H, W, generator=stream),
        "path": [f"{seed}.png"],
    }


ITEMS = [item(seed) for seed in range(3)]
BANK = NoiseBank((3, H, W), 8, seed=1)


def inputs(**changes):
    same = {"num_classes": K, "one_hot": True, "edge_plane": True, "bank": BANK, "seed": 2, "coding": SemanticCoding()}
    return TrainingInputs(**{**same, **changes})


def noise_of(k):
    return BANK[BANK.index_for(2, "bank index", k)]


PANEL = functools.partial(preview_panel, num_classes=K)


def validation(precision="fp32", **changes):
    diffusion = create_gaussian_diffusion(diffusion_steps=20, noise_schedule="linear")
    preview = create_gaussian_diffusion(diffusion_steps=20, noise_schedule="linear", timestep_respacing="3")
    return Validation(ITEMS, inputs(**changes), diffusion, preview, PANEL, CPU, precision)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return create_model_and_diffusion(**{**model_and_diffusion_defaults(), **FLAGS})[0]


def constant_weights(model, value):
    """Weights with which the network predicts `value` everywhere: the last layer starts at zero."""
    return {k: torch.full_like(v, value) if k == "out.2.bias" else v.clone() for k, v in model.state_dict().items()}


def random_weights(model, seed=1):
    stream = torch.Generator().manual_seed(seed)
    return {k: 0.1 * torch.randn(v.shape, generator=stream) for k, v in model.state_dict().items()}


@pytest.mark.parametrize("value", [0.0, 0.5])
@pytest.mark.parametrize("count", [1, 4])
def test_score_of_a_constant_prediction(model, value, count):
    # eps = c everywhere: the loss of item k is mean((NB[i_k] - c)^2), whatever the picture and the timestep.
    expected = torch.stack([(noise_of(k) - value).square().mean() for k in range(count)]).mean()
    score = validation().score(model, constant_weights(model, value), count)
    assert score == pytest.approx(float(expected), rel=1e-5)


def test_score_repeats_whatever_the_global_stream(model):
    look, weights = validation(), random_weights(model)
    scores = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        scores.append(look.score(model.train(), weights, 3))
    assert scores[0] == scores[1]


def test_score_looks_at_fixed_timesteps_spread_over_the_axis(model, monkeypatch):
    look, seen = validation(), []
    losses = look.diffusion.training_losses

    def note(network, x_start, t, y, noise):
        seen.append((int(t), x_start, noise))
        return losses(network, x_start, t, y=y, noise=noise)

    monkeypatch.setattr(look.diffusion, "training_losses", note)
    look.score(model, model.state_dict(), 4)
    assert [t for t, _, _ in seen] == [2, 12, 7, 17, 12, 2, 17, 7]
    assert all(torch.equal(x, ITEMS[k // 2 % 3]["image"]) for k, (_, x, _) in enumerate(seen))
    assert all(torch.equal(noise, noise_of(k // 2)[None]) for k, (_, _, noise) in enumerate(seen))


class OneOf:
    """Stands in for a `Group`: rank `rank` of 3, which meets the losses that the others left in `shelf`."""

    def __init__(self, rank, shelf):
        self.rank, self.world_size, self.shelf = rank, 3, shelf

    def joined(self, tensor):
        self.shelf[self.rank] = tensor
        return torch.cat([self.shelf.get(rank, torch.full_like(tensor, float("nan"))) for rank in range(3)])


def test_score_is_shared_by_ranks(model):
    weights, shelf = random_weights(model), {}
    alone = validation().score(model, weights, 4)
    found = [validation().score(model, weights, 4, OneOf(rank, shelf)) for rank in range(3)]
    assert found[2] == alone and all(score != score for score in found[:2])  # the last has met everybody's losses


def look_at(what, model, weights):
    if what == "score":
        return validation().score(model, weights, 2)
    return validation().preview(model, weights, 1)


@pytest.mark.parametrize("what", ["score", "preview"])
@pytest.mark.parametrize("training", [True, False])
def test_validation_leaves_own_weights_gradients_and_mode_alone(model, what, training):
    model.train(training)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    places = [p.data_ptr() for p in model.parameters()]
    weights = random_weights(model)
    lent = {k: v.clone() for k, v in weights.items()}
    look_at(what, model, weights)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(torch.equal(v, lent[k]) for k, v in weights.items())
    assert places == [p.data_ptr() for p in model.parameters()]
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(m.training == training for m in model.modules())


def test_preview_shows_originals_and_their_error(model):
    panel, error = validation().preview(model, constant_weights(model, 0.1), 2)
    assert panel.dtype == np.uint8
    zoom, gap, head = 192 // W, 4, 18
    assert panel.shape == (head + 2 * (H * zoom + gap) + gap, 3 * (W * zoom + gap) + gap, 3)
    assert 0 < error < 1
    corner = panel[head + gap // 2 + H * zoom + gap :, gap:]
    second = corner[: H * zoom : zoom, : W * zoom : zoom]
    shown = ((ITEMS[1]["image"][0].permute(1, 2, 0) + 1) * 127.5).round().numpy()
    np.testing.assert_array_equal(second, shown)


def test_preview_measures_the_colour_error_of_a_known_picture(model):
    # A network that predicts x_0 = 0.25 everywhere regenerates a flat grey.
    def process(**respacing):
        return create_gaussian_diffusion(diffusion_steps=20, noise_schedule="linear", prediction="x0", **respacing)

    look = Validation(ITEMS, inputs(), process(), process(timestep_respacing="3"), PANEL, CPU, "fp32")
    _, error = look.preview(model, constant_weights(model, 0.25), 3)
    originals = torch.cat([one["image"] for one in ITEMS])
    expected = colour_error(torch.full_like(originals, 0.25), originals).mean()
    assert error == pytest.approx(float(expected), abs=1e-4)
