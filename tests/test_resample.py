"""Timestep samplers: what they draw, and that the weights keep the loss unbiased."""

import pytest
import torch

from guided_diffusion.diffusion.resample import LossSecondMomentSampler, UniformSampler


def grid(count):
    """Evenly spread stand-ins for uniform draws."""
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


def warm(losses):
    """A sampler whose every step has been seen often enough, with its loss."""
    sampler = LossSecondMomentSampler(len(losses), history=3)
    for _ in range(3):
        sampler.update(torch.arange(len(losses)), torch.tensor(losses))
    return sampler


def test_uniform_covers_every_step_equally_and_has_no_state():
    sampler = UniformSampler(50)
    sampler.update(torch.tensor([1]), torch.tensor([5.0]))
    t, weights = sampler.sample(grid(500))
    assert t.dtype == torch.int64 and weights.dtype == torch.float32 and sampler.state_dict() == {}
    assert torch.bincount(t, minlength=50).tolist() == [10] * 50 and (weights == 1).all()


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
    sampler.update(torch.tensor([0, 1, 2, 0]), torch.tensor([9.0, 2.0, 0.0, 1.0]))
    losses = torch.tensor([7.0, 2.0, 0.0], requires_grad=True)
    sampler.update(torch.tensor([0, 1, 2]), losses)  # forgets the oldest of step 0
    assert not sampler.losses.requires_grad and [*sampler.state_dict()] == ["losses", "counts"]
    root = torch.tensor([5.0, 2.0, 0.0], dtype=torch.float64)  # sqrt((1 + 49) / 2) = 5
    torch.testing.assert_close(sampler.probabilities(), 0.999 * root / 7 + 0.001 / 3)
    assert (warm([0.0] * 4).sample(grid(8))[1] == 1).all()  # losses that are all zero mean uniform sampling


def test_second_moment_weights_keep_the_loss_unbiased():
    losses = torch.rand(20, generator=torch.Generator().manual_seed(0)).add(0.1)
    t, weights = warm(losses.tolist()).sample(grid(200_000))
    values = torch.linspace(-1, 4, 20)  # any function of the step
    assert (weights * values[t]).mean().item() == pytest.approx(values.mean().item(), abs=2e-3)
    assert values[t].mean().item() != pytest.approx(values.mean().item(), abs=2e-2)  # without them it is biased


def test_second_moment_survives_losses_that_are_not_finite():
    sampler = warm([1.0, 2.0, 3.0])
    sampler.update(torch.arange(3), torch.tensor([float("nan"), float("inf"), float("-inf")]))
    p = sampler.probabilities()
    assert p.isfinite().all() and (p > 0).all() and p.sum().item() == pytest.approx(1)
