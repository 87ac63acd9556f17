"""Training samples: every draw follows from (seed, position), whatever the batch."""

import dataclasses

import pytest
import torch

from guided_diffusion.data.semantics import encode_semantics
from guided_diffusion.link.channel import TRAINING_SIGMAS, transmit
from guided_diffusion.link.noise_bank import NoiseBank
from guided_diffusion.random_streams import generator
from guided_diffusion.training.inputs import TrainingInputs

K, H, W = 4, 8, 16
BANK = NoiseBank((3, H, W), 50, seed=9)


def rules(**changes):
    return TrainingInputs(**{"num_classes": K, "one_hot": True, "edge_plane": True, "bank": BANK, "seed": 5, **changes})


def batch(positions):
    """A loaded batch whose pictures follow from their positions."""
    streams = [generator(0, "picture", p) for p in positions]
    image, label, edge = zip(
        *(
            (
                torch.rand(3, H, W, generator=g) * 2 - 1,
                torch.randint(K, (1, H, W), generator=g),
                torch.rand(1, H, W, generator=g),
            )
            for g in streams
        ),
        strict=True,
    )
    return {
        "image": torch.stack(image),
        "label": torch.stack(label),
        "instance": torch.stack(label).int() * 1000,
        "image_edge": torch.stack(edge),
        "path": [f"{p}.png" for p in positions],
        "position": torch.tensor(positions),
    }


def ones(n, size=1):
    """Conditioning in which every plane is sent and full."""
    return torch.ones(n, K + 1, size, size)


NOISY = {"add_noise": True, "drop_rate": 0.3}


# -- the batch does not matter ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [{}, NOISY, {**NOISY, "bank": None}, {**NOISY, "sigma": 0.3, "noise_to": "label"}, {**NOISY, "one_hot": False}],
    ids=["plain", "noisy", "no bank", "fixed sigma", "raw ids"],
)
def test_a_batch_equals_its_samples_one_by_one(changes):
    make, positions = rules(**changes), [17, 3, 100_000, 4]
    together = make(batch(positions))
    for k, position in enumerate(positions):
        for whole, single in zip(together, make(batch([position])), strict=True):
            assert torch.equal(whole[k], single[0])


@pytest.mark.parametrize("bank", [BANK, None])
def test_draws_differ_by_position_and_by_seed(bank):
    same_picture = {**batch([0, 0]), "position": torch.tensor([1, 2])}
    _, y, noise, u = rules(bank=bank, add_noise=True, sigma=0.5)(same_picture)
    assert not torch.equal(y[0], y[1]) and not torch.equal(noise[0], noise[1]) and u[0] != u[1]
    _, y_other, noise_other, u_other = rules(bank=bank, add_noise=True, sigma=0.5, seed=6)(same_picture)
    assert not torch.equal(y[0], y_other[0]) and not torch.equal(noise[0], noise_other[0]) and u[0] != u_other[0]


def test_global_stream_is_left_alone():
    before = torch.get_rng_state()
    rules(bank=None, **NOISY)(batch([0, 1]))
    assert torch.equal(before, torch.get_rng_state())


def test_without_noise_and_drops_the_conditioning_is_the_encoded_batch():
    loaded = batch([0, 5])
    x_start, y, noise, u = rules()(loaded)
    assert torch.equal(x_start, loaded["image"])
    assert torch.equal(y, encode_semantics(loaded["label"], loaded["instance"], loaded["image_edge"], K))
    assert noise.shape == x_start.shape and u.shape == (2,)


def test_edge_plane_follows_the_rules_not_the_batch():
    loaded = batch([0])
    assert rules(edge_plane=False).condition(loaded).shape == (1, K, H, W)
    for key in ("instance", "image_edge"):
        del loaded[key]
    y = rules().condition(loaded)
    assert y.shape == (1, K + 1, H, W) and not y[:, K].any()


# -- drops, channel, bank, timesteps ----------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_drop_rate_is_the_share_of_empty_conditionings(rate):
    y = rules(drop_rate=rate).received(ones(4000), list(range(4000)))
    dropped = ~y.flatten(1).any(1)
    assert dropped.float().mean() == pytest.approx(rate, abs=0.025)
    assert torch.equal(y[~dropped], ones(int((~dropped).sum())))


def test_drop_rates_0_and_1():
    assert torch.equal(rules(drop_rate=0.0).received(ones(50), range(50)), ones(50))
    assert not rules(drop_rate=1.0).received(ones(50), range(50)).any()


def test_dropped_samples_are_empty_in_spite_of_channel_noise():
    y = rules(add_noise=True, sigma=0.9, drop_rate=0.5).received(ones(40, 4), range(40))
    dropped = ~y.flatten(1).any(1)
    assert 8 < dropped.sum() < 32


def test_sigmas_are_those_of_gesco_drawn_uniformly_per_sample():
    n = 900
    noise = rules(add_noise=True).received(ones(n, 8), list(range(n))) - 1
    realised = noise.flatten(1).std(1)  # of 320 values each
    rows = torch.tensor(sorted(set(TRAINING_SIGMAS)))
    nearest = (realised[:, None].clamp(min=0.005).log() - rows.clamp(min=0.005).log()).abs().argmin(1)
    assert (realised / rows[nearest])[nearest > 0].sub(1).abs().max() < 0.2
    expected = torch.tensor([TRAINING_SIGMAS.count(round(float(s), 2)) / 9 for s in rows])
    torch.testing.assert_close(torch.bincount(nearest, minlength=len(rows)) / n, expected, atol=0.05, rtol=0)


@pytest.mark.parametrize("sigma", [0.0, 0.3])
def test_a_given_sigma_holds_for_every_sample(sigma):
    noise = rules(add_noise=True, sigma=sigma).received(ones(20, 16), list(range(20))) - 1
    torch.testing.assert_close(noise.flatten(1).std(1), torch.full((20,), sigma), rtol=0.15, atol=0)


def test_no_channel_noise_unless_asked_for():
    assert torch.equal(rules(sigma=0.3).received(ones(5), range(5)), ones(5))


def test_noise_to_label_spares_the_edge_plane():
    y = rules(add_noise=True, sigma=0.5, noise_to="label").received(ones(3, 8), range(3))
    assert torch.equal(y[:, K], ones(3, 8)[:, K]) and (y[:, :K] != 1).all()


def test_the_channel_is_the_one_of_sampling():
    y = rules().condition(batch([8]))
    received = rules(add_noise=True, sigma=0.4).received(y, [8])
    assert torch.equal(received, transmit(y, 0.4, generators=[generator(5, "channel", 8)], num_classes=K))


def test_noise_is_a_bank_entry_per_sample():
    noise = rules().noise(list(range(400)), (3, H, W))
    entries = torch.stack(list(BANK))
    index = (noise[:, None, 0, 0, 0] == entries[None, :, 0, 0, 0]).int().argmax(1)
    assert torch.equal(noise, entries[index])
    counts = torch.bincount(index, minlength=50)
    assert counts.min() >= 1 and counts.max() <= 22  # 8 each on average


def test_without_a_bank_noise_is_fresh_normal_and_reproducible():
    make, positions = rules(bank=None), list(range(60))
    noise = make.noise(positions, (3, H, W))
    assert torch.equal(noise, dataclasses.replace(make).noise(positions, (3, H, W)))
    assert len(torch.unique(noise[:, 0, 0, 0])) == 60
    assert abs(noise.mean()) < 0.03 and abs(noise.std() - 1) < 0.03


def test_timestep_draws_are_uniform():
    u = rules().timestep_draws(list(range(4000)))
    assert u.dtype == torch.float64 and u.min() >= 0 and u.max() < 1
    torch.testing.assert_close(torch.histc(u.float(), 8, 0, 1) / 4000, torch.full((8,), 1 / 8), atol=0.02, rtol=0)
