"""The validation score against closed forms, and previews."""

import pytest
import torch
from conftest import tiny_network
from test_inputs import BANK, batch, inputs

from guided_diffusion.diffusion.gaussian_diffusion import create_gaussian_diffusion
from guided_diffusion.training.validation import Validation

CPU, ITEMS = torch.device("cpu"), [batch([position]) for position in range(3)]


def noise_of(k):
    return BANK[BANK.index_for(5, "bank index", k)]


def validation(**options):
    """Its previews are what its panel is given."""
    process = {"diffusion_steps": 20, "noise_schedule": "linear", **options}
    processes = (create_gaussian_diffusion(**process, timestep_respacing=respacing) for respacing in ("", "3"))
    return Validation(ITEMS, inputs(), *processes, lambda *shown: shown, CPU, "fp32")


@pytest.fixture
def model():
    return tiny_network(learn_sigma=False, dropout=0.3)[0]


def constant_weights(model, value):
    """Weights with which the network predicts `value` everywhere."""
    last = {"out.2.bias": value, "out.2.weight": 0.0}
    return {k: torch.full_like(v, last[k]) if k in last else v.clone() for k, v in model.state_dict().items()}


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


def test_preview_shows_originals_their_semantics_and_what_the_network_makes(model):
    # A network that predicts x_0 = 0.25 everywhere regenerates a flat grey.
    images, y, made = validation(prediction="x0").preview(model, constant_weights(model, 0.25), 2)
    assert torch.equal(images, torch.cat([item["image"] for item in ITEMS[:2]]))
    assert torch.equal(y, torch.cat([inputs().conditioning(inputs()(item)) for item in ITEMS[:2]]))
    torch.testing.assert_close(made, torch.full_like(images, 0.25))
