"""The analog channel: GESCO's table, noise on sent planes only, pools against naive loops."""

import itertools
import math
from statistics import median

import pytest
import torch

from guided_diffusion.data.semantics import encode_semantics
from guided_diffusion.link.channel import TRAINING_SIGMAS, apply_pool, sent_planes, snr_to_sigma, transmit

K, PRESENT = 5, [0, 2, 3]  # classes 1 and 4 do not occur
SIZE, POOLS = 64, ("None", "med", "mean", "max")


def scenes(n, size=SIZE):
    """Conditioning of n pictures that show the classes of PRESENT, with an edge plane."""
    stream = torch.Generator().manual_seed(3)
    label = torch.tensor(PRESENT)[torch.randint(len(PRESENT), (n, 1, size, size), generator=stream)]
    return encode_semantics(label, None, torch.rand(n, 1, size, size, generator=stream), K)


def send(y, sigma, seeds=None, **options):
    streams = [torch.Generator().manual_seed(seed) for seed in seeds or range(len(y))]
    return transmit(y, sigma, generators=streams, num_classes=K, **options)


def test_snr_to_sigma_has_the_rows_of_the_table_and_is_log_linear_between_them():
    rows = {100: 0, 30: 0.05, 25: 0.08, 20: 0.13, 15: 0.22, 10: 0.36, 5: 0.6, 1: 0.9}
    assert {snr: snr_to_sigma(float(snr)) for snr in rows} == rows
    assert sorted(TRAINING_SIGMAS) == [0, 0, 0, 0.05, 0.08, 0.13, 0.22, 0.36, 0.6]  # GESCO's
    assert snr_to_sigma(7.5) == pytest.approx(math.sqrt(0.6 * 0.36), rel=1e-12)
    assert snr_to_sigma(2) == pytest.approx(0.9 * (0.6 / 0.9) ** 0.25, rel=1e-12)


def test_snr_to_sigma_falls_to_no_noise_at_100_db():
    sigmas = [snr_to_sigma(1 + 0.25 * k) for k in range(397)]  # 1 dB to 100 dB
    assert all(a > b for a, b in itertools.pairwise(sigmas)) and snr_to_sigma(math.inf) == 0
    assert snr_to_sigma(40) == pytest.approx(0.05 * 10**-0.5, rel=1e-12)


def test_sent_planes_are_present_classes_and_the_edge_plane():
    y = scenes(2)
    y[1, 2] = 0  # the second picture lacks class 2
    y[:, K] = 0
    expected = [[True, False, True, True, False, True], [True, False, False, True, False, True]]
    assert sent_planes(y, K).tolist() == expected
    assert sent_planes(torch.zeros(1, 2, 4, 4), K, one_hot=False).all()


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("sigma", [0.0, 0.6])
def test_transmit_leaves_absent_planes_zero_and_its_input_alone(pool, sigma):
    y = scenes(2)
    before = y.clone()
    received = send(y, sigma, pool=pool)
    assert not received[:, [1, 4]].any()
    assert received[:, [*PRESENT, K]].flatten(2).any(2).all() and torch.equal(y, before)


@pytest.mark.parametrize("sigma", [0.05, 0.9])
def test_transmit_adds_white_noise_of_sigma_to_every_sent_plane(sigma):
    y = scenes(2)
    noise = (send(y, sigma) - y)[:, [*PRESENT, K]].flatten(2)
    torch.testing.assert_close(noise.std(2), torch.full((2, 4), sigma), rtol=0.05, atol=0)
    assert noise.mean(2).abs().max() < 4.5 * sigma / SIZE
    correlation = torch.corrcoef(noise.flatten(0, 1)) - torch.eye(8)
    assert correlation.abs().max() < 0.07


def test_transmit_to_label_spares_the_edge_plane():
    y = scenes(2)
    received = send(y, 0.5, noise_to="label")
    assert torch.equal(received[:, K], y[:, K]) and not torch.equal(send(y, 0.5)[:, K], y[:, K])
    assert all((received[n, k] != y[n, k]).all() for n in range(2) for k in PRESENT)


def test_transmit_does_not_depend_on_the_batch():
    y, sigmas = scenes(3), [0.2, 0.0, 0.7]
    together = send(y, sigmas, seeds=(11, 12, 13), pool="mean")
    for n in (2, 0, 1):
        alone = send(y[n : n + 1], sigmas[n], seeds=(11 + n,), pool="mean")
        torch.testing.assert_close(alone[0], together[n], rtol=0, atol=1e-6)
    assert torch.equal(send(y, [0.0, 0.0, 0.5])[:2], y[:2])


def naive_pool(plane, pool):
    """A pool in a plain loop over the pixels of one plane."""
    (height, width), source = plane.shape, naive_pool(plane, "mean") if pool == "max" else plane
    pooled = torch.empty_like(plane)
    for i, j in itertools.product(range(height), range(width)):
        rows, columns = ([k - 1, k, k + 1] for k in (i, j))
        if pool == "med":
            rows, columns = ([min(abs(k), 2 * n - 2 - k) for k in ks] for ks, n in ((rows, height), (columns, width)))
        around = [float(source[a, b]) for a in rows for b in columns if 0 <= a < height and 0 <= b < width]
        pooled[i, j] = {"med": median, "mean": lambda values: sum(values) / 9, "max": max}[pool](around)
    return pooled


@pytest.mark.parametrize("pool", POOLS[1:])
@pytest.mark.parametrize("size", [(5, 7), (2, 3)])
def test_apply_pool_equals_a_loop(pool, size):
    y = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    expected = torch.stack([torch.stack([naive_pool(plane, pool) for plane in planes]) for planes in y])
    torch.testing.assert_close(apply_pool(y, pool), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(apply_pool(y, "None"), y)
