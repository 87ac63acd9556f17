"""Optimizer states of the family go on in our AdamW as they would have in theirs."""

import copy

import pytest
import torch

from guided_diffusion.console import InputError
from guided_diffusion.training.checkpoint import LEGACY_KEY, load_file
from guided_diffusion.training.legacy_optimizer import fitted_state

UNUSED = "input_blocks.1.0.spade_norm.mlp_shared.0.{}"


class Encoder(torch.nn.Module):
    """Two blocks whose registration order is `order`; names as in the family."""

    def __init__(self, order):
        super().__init__()
        for name in order:
            self.add_module(name, torch.nn.Linear(3, 4) if name == "first" else torch.nn.Linear(4, 2))

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def ours(seed=0, order=("first", "second")):
    torch.manual_seed(seed)
    return Encoder(order)


def listed(model, unused=True):
    """A model file's contents as GESCO writes it: with tensors in between that no forward pass uses."""
    weights = dict(model.state_dict())
    if not unused:
        return weights
    names = list(weights)
    return {
        **{name: weights[name] for name in names[:2]},
        UNUSED.format("weight"): torch.zeros(5, 3),
        UNUSED.format("bias"): torch.zeros(5),
        **{name: weights[name] for name in names[2:]},
    }


def steps(model, optimizer, count, seed):
    """Take steps on random data; the same ones for the same seed."""
    draws = torch.Generator().manual_seed(seed)
    for _ in range(count):
        optimizer.zero_grad()
        model(torch.randn(6, 3, generator=draws)).square().sum().backward()
        optimizer.step()


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1)


def family_file(weights, model, half=False):
    """Train as the family does for 3 steps; return (contents of its opt file, contents of its model file).

    :param weights: what its network consists of, in its order; some of it unused.
    :param half: keep master copies as its mixed-precision trainer does: one row of all vectors, one of all other tensors,
        with zero gradients where there are none.
    """
    own = dict(model.named_parameters())
    network = {name: own.get(name, torch.nn.Parameter(value.clone())) for name, value in weights.items()}
    vectors = [p for p in network.values() if p.dim() < 2]
    matrices = [p for p in network.values() if p.dim() >= 2]
    if not half:
        optimizer = adamw(list(network.values()))
        steps(model, optimizer, 3, seed=5)
    else:
        rows = [torch.nn.Parameter(torch.cat([p.detach().reshape(-1) for p in part])) for part in (vectors, matrices)]
        rows[1] = torch.nn.Parameter(rows[1].detach().reshape(1, -1))
        optimizer = adamw(rows)
        draws = torch.Generator().manual_seed(5)
        for _ in range(3):
            model.zero_grad()
            model(torch.randn(6, 3, generator=draws)).square().sum().backward()
            for row, part in zip(rows, (vectors, matrices), strict=True):
                gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in part]
                row.grad = torch.cat([g.reshape(-1) for g in gradients]).reshape(row.shape)
            optimizer.step()
            for row, part in zip(rows, (vectors, matrices), strict=True):
                place = 0
                for p in part:
                    p.data.copy_(row.detach().reshape(-1)[place : place + p.numel()].reshape(p.shape))
                    place += p.numel()
    return copy.deepcopy(optimizer.state_dict()), {name: p.detach().clone() for name, p in network.items()}


def go_on(saved, weights, order=("first", "second")):
    """Resume in our network as a training run does, and take 4 more steps; return the weights."""
    model = ours(1, order)
    model.load_state_dict({name: value for name, value in weights.items() if not LEGACY_KEY.match(name)})
    optimizer = adamw(model.parameters())
    state = fitted_state(saved, weights, model)
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    steps(model, optimizer, 4, seed=6)
    return model.state_dict()


@pytest.fixture(scope="module")
def uninterrupted():
    """3 and 4 steps of the network, the optimizer being ours from the beginning."""
    model = ours()
    optimizer = adamw(model.parameters())
    steps(model, optimizer, 3, seed=5)
    steps(model, optimizer, 4, seed=6)
    return model.state_dict()


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("unused", [False, True])
@pytest.mark.parametrize("order", [("first", "second"), ("second", "first")])
def test_family_files_go_on_exactly(uninterrupted, half, unused, order):
    """Their order of registration may be another than ours."""
    theirs = ours(order=("first", "second"))
    listing = listed(theirs, unused)
    if order[0] == "second":
        listing = dict(reversed(listing.items()))
    saved, weights = family_file(listing, theirs, half)
    assert len(saved["param_groups"][0]["params"]) == (2 if half else 6 if unused else 4)
    after = go_on(saved, weights)
    assert all(torch.equal(after[name], uninterrupted[name]) for name in uninterrupted)


def test_our_own_file_goes_on_exactly(uninterrupted):
    model = ours()
    optimizer = adamw(model.parameters())
    steps(model, optimizer, 3, seed=5)
    legacy = {
        **model.state_dict(),
        UNUSED.format("weight"): torch.zeros(5, 3),
    }  # --export_legacy appends to the model file
    for weights in (model.state_dict(), legacy):
        after = go_on(copy.deepcopy(optimizer.state_dict()), copy.deepcopy(weights))
        assert all(torch.equal(after[name], uninterrupted[name]) for name in uninterrupted)


def test_counts_of_steps_may_be_plain_numbers_and_keys_any(uninterrupted):
    model = ours()
    saved, weights = family_file(listed(model), model)
    for state in saved["state"].values():
        state["step"] = 3
    names = {k: 140_000 + k for k in range(6)}  # torch before 1.5 wrote addresses
    saved["state"] = {names[k]: state for k, state in saved["state"].items()}
    saved["param_groups"][0]["params"] = list(names.values())
    after = go_on(saved, weights)
    assert all(torch.equal(after[name], uninterrupted[name]) for name in uninterrupted)


@pytest.mark.parametrize("zipped", [True, False])
def test_files_of_the_family_can_be_read(tmp_path, zipped):
    model = ours()
    saved, weights = family_file(listed(model), model, half=True)
    torch.save(saved, tmp_path / "opt000003.pt", _use_new_zipfile_serialization=zipped)
    state = fitted_state(load_file(tmp_path / "opt000003.pt"), weights, model)
    assert state.keys() == {0, 1, 2, 3} and state[0]["step"] == 3 and state[0]["step"].dtype == torch.float32


def test_parts_of_a_row_do_not_share_memory():
    model = ours()
    saved, weights = family_file(listed(model), model, half=True)
    state = fitted_state(saved, weights, model)
    state[0]["exp_avg"].zero_()
    assert state[2]["exp_avg"].any() and saved["state"][1]["exp_avg"].any()
    assert state[0]["exp_avg"].untyped_storage().nbytes() == 4 * model.first.weight.numel()


def test_no_step_taken_yet():
    model = ours()
    assert fitted_state(adamw(model.parameters()).state_dict(), model.state_dict(), model) == {}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda saved: saved["state"][0].update(exp_avg=torch.zeros(11)), r"first\.weight has exp_avg \(11,\)"),
        (
            lambda saved: saved["state"][5].update(exp_avg_sq=1.5),
            r"second\.bias has exp_avg_sq float, the network needs",
        ),
        (lambda saved: saved["state"][0].pop("exp_avg"), "has exp_avg NoneType"),
        (lambda saved: saved["state"][0].update(exp_avg=torch.zeros(4, 3, dtype=torch.int64)), "has exp_avg"),
        (lambda saved: saved["state"][0].pop("step"), "no step count"),
        (lambda saved: saved["state"][0].update(step="3"), "no step count"),
        (lambda saved: saved["param_groups"][0]["params"].pop(), "expected the state of an optimizer"),
        (lambda saved: (saved["param_groups"][0]["params"].pop(), saved["state"].pop(5)), "5 parameters.*6"),
        (lambda saved: saved.pop("state"), "expected the state of an optimizer"),
        (lambda saved: saved.update(param_groups=3), "expected the state of an optimizer"),
        (lambda saved: saved["state"].update({0: 3}), "expected the state of an optimizer"),
        (
            lambda saved: saved["param_groups"][0].update(params=[0, 0, 2, 3, 4, 5]),
            "expected the state of an optimizer",
        ),
    ],
)
def test_what_does_not_fit_is_refused(change, reason):
    model = ours()
    saved, weights = family_file(listed(model), model)
    change(saved)
    with pytest.raises(InputError, match=rf"^run/opt000003\.pt: .*{reason}") as caught:
        fitted_state(saved, weights, model, "run/opt000003.pt")
    assert "\n" not in str(caught.value)


def test_rows_of_another_network_are_refused():
    model = ours()
    saved, weights = family_file(listed(model), model, half=True)
    for k in (0, 1):
        other = copy.deepcopy(saved)
        other["state"][k]["exp_avg_sq"] = torch.zeros(7)
        with pytest.raises(InputError, match=r"its row of 3 tensors has exp_avg_sq \(7,\), the network needs"):
            fitted_state(other, weights, model)


def test_another_models_weights_are_refused():
    model = ours()
    saved, weights = family_file(listed(model), model)
    with pytest.raises(InputError, match="does not have this network's parameters"):
        fitted_state(saved, {**weights, "third.weight": torch.zeros(1)}, model)
    with pytest.raises(InputError, match="expected the state of an optimizer"):
        fitted_state([1], weights, model)
