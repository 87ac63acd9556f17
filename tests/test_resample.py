"""Timestep samplers: what they draw, and that the weights keep the loss unbiased."""

import pytest
import torch

from guided_diffusion import InputError
from guided_diffusion.diffusion.resample import LossSecondMomentSampler, UniformSampler, create_schedule_sampler


def grid(count):
    """Evenly spread stand-ins for uniform draws."""
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


def warm(losses, history=3):
    """A sampler whose every step has been seen `history` times with its loss."""
    sampler = LossSecondMomentSampler(len(losses), history=history)
    for _ in range(history):
        sampler.update(torch.arange(len(losses)), torch.tensor(losses))
    return sampler


def test_create_by_name():
    assert type(create_schedule_sampler("uniform", 10)) is UniformSampler
    assert type(create_schedule_sampler("loss-second-moment", 10)) is LossSecondMomentSampler
    with pytest.raises(InputError, match="--schedule_sampler best"):
        create_schedule_sampler("best", 10)


def test_uniform_covers_every_step_equally():
    t, weights = UniformSampler(50).sample(grid(500))
    assert t.dtype == torch.int64 and weights.dtype == torch.float32
    assert torch.bincount(t, minlength=50).tolist() == [10] * 50
    assert (weights == 1).all()


@pytest.mark.parametrize("sampler", [UniformSampler(1000), warm([1.0, 2.0, 3.0])])
def test_the_ends_of_the_unit_interval_are_steps(sampler):
    t, _ = sampler.sample(torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64))
    assert t.tolist() == [0, sampler.steps - 1]


def test_uniform_has_no_state():
    sampler = UniformSampler(10)
    sampler.update(torch.tensor([1]), torch.tensor([5.0]))
    assert sampler.state_dict() == {}


def test_second_moment_is_uniform_until_every_step_was_seen_often_enough():
    sampler = LossSecondMomentSampler(4, history=2)
    for steps in ([0, 1, 2, 3], [0, 1, 2], [0, 0, 0]):
        t, weights = sampler.sample(grid(400))
        assert torch.bincount(t).tolist() == [100] * 4 and (weights == 1).all()
        sampler.update(torch.tensor(steps), torch.ones(len(steps)) * 9)
    sampler.update(torch.tensor([3]), torch.tensor([1.0]))  # the last one that was missing
    assert sampler.probabilities()[3] < 0.25


def test_second_moment_probabilities_follow_the_root_mean_square():
    sampler = LossSecondMomentSampler(3, history=2, uniform_share=0.001)
    sampler.update(torch.tensor([0, 1, 2]), torch.tensor([1.0, 2.0, 0.0]))
    sampler.update(torch.tensor([0, 1, 2]), torch.tensor([7.0, 2.0, 0.0]))
    root = torch.tensor([5.0, 2.0, 0.0], dtype=torch.float64)  # sqrt((1 + 49) / 2) = 5
    torch.testing.assert_close(sampler.probabilities(), 0.999 * root / 7 + 0.001 / 3)


def test_second_moment_draws_in_proportion():
    t, weights = warm([1.0, 3.0, 6.0]).sample(grid(10000))
    assert torch.bincount(t).tolist() == pytest.approx([1000, 3000, 6000], abs=10)
    expected = torch.tensor([10 / 3, 10 / 9, 10 / 18])
    torch.testing.assert_close(weights, expected[t], rtol=5e-3, atol=0)


def test_weights_keep_the_loss_unbiased():
    generator = torch.Generator().manual_seed(0)
    losses = torch.rand(20, generator=generator).add(0.1)
    t, weights = warm(losses.tolist()).sample(grid(200_000))
    values = torch.linspace(-1, 4, 20)  # any function of the step
    assert (weights * values[t]).mean().item() == pytest.approx(values.mean().item(), abs=2e-3)
    assert values[t].mean().item() != pytest.approx(values.mean().item(), abs=2e-2)  # without them it is biased


def test_a_step_may_occur_often_in_one_batch():
    together, one_by_one = LossSecondMomentSampler(3, history=4), LossSecondMomentSampler(3, history=4)
    t, losses = torch.tensor([2, 0, 2, 2, 0]), torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    together.update(t, losses)
    for k in range(5):
        one_by_one.update(t[k : k + 1], losses[k : k + 1])
    assert together.counts.tolist() == [2, 0, 3]
    assert together.losses.tolist() == [[2, 5, 0, 0], [0, 0, 0, 0], [1, 3, 4, 0]]
    torch.testing.assert_close(together.losses, one_by_one.losses, rtol=0, atol=0)


def test_the_oldest_losses_are_forgotten():
    sampler = LossSecondMomentSampler(1, history=3)
    sampler.update(torch.zeros(5, dtype=torch.int64), torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]))
    assert sorted(sampler.losses[0].tolist()) == [3, 4, 5]


def test_state_dict_round_trip():
    sampler = warm([1.0, 4.0, 2.0])
    sampler.update(torch.tensor([1]), torch.tensor([8.0]))
    resumed = LossSecondMomentSampler(3, history=3)
    resumed.load_state_dict(sampler.state_dict())
    for one in (sampler, resumed):  # also what happens next is the same
        one.update(torch.tensor([1, 0]), torch.tensor([6.0, 6.0]))
    torch.testing.assert_close(resumed.probabilities(), sampler.probabilities(), rtol=0, atol=0)
    torch.testing.assert_close(resumed.losses, sampler.losses, rtol=0, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_non_finite_loss_does_not_poison_the_probabilities(bad):
    sampler = warm([1.0, 2.0, 3.0])
    sampler.update(torch.tensor([1]), torch.tensor([bad]))
    p = sampler.probabilities()
    assert p.isfinite().all() and (p > 0).all()
    assert p.sum().item() == pytest.approx(1)
    for _ in range(3):
        sampler.update(torch.tensor([1]), torch.tensor([2.0]))
    torch.testing.assert_close(sampler.probabilities(), warm([1.0, 2.0, 3.0]).probabilities())


def test_losses_that_are_all_zero_mean_uniform_sampling():
    t, weights = warm([0.0] * 4).sample(grid(8))
    assert torch.bincount(t).tolist() == [2] * 4 and (weights == 1).all()


def test_the_history_does_not_hold_a_graph():
    sampler, losses = LossSecondMomentSampler(2, history=1), torch.ones(2, requires_grad=True)
    sampler.update(torch.tensor([0, 1]), losses * 2)
    assert not sampler.losses.requires_grad
