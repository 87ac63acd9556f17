"""The analog channel: GESCO's table, noise on sent planes only, pools against naive loops."""

import itertools
import math
from statistics import median

import pytest
import torch

from guided_diffusion.console import InputError
from guided_diffusion.data.semantics import encode_semantics
from guided_diffusion.link.channel import POOLS, apply_pool, sent_planes, snr_to_sigma, transmit

K, PRESENT = 5, [0, 2, 3]  # classes 1 and 4 do not occur
SIZE = 64


def streams(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def scenes(n, size=SIZE):
    """Conditioning of n pictures that show the classes of PRESENT, with an edge plane."""
    stream = torch.Generator().manual_seed(3)
    label = torch.tensor(PRESENT)[torch.randint(len(PRESENT), (n, 1, size, size), generator=stream)]
    return encode_semantics(label, None, torch.rand(n, 1, size, size, generator=stream), K)


def send(y, sigma, seeds=None, **options):
    return transmit(y, sigma, generators=streams(*(seeds or range(len(y)))), num_classes=K, **options)


# -- the table --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("snr", "sigma"), [(100, 0), (30, 0.05), (25, 0.08), (20, 0.13), (15, 0.22), (10, 0.36), (5, 0.6), (1, 0.9)]
)
def test_rows_of_the_table(snr, sigma):
    assert snr_to_sigma(snr) == sigma
    assert snr_to_sigma(float(snr)) == sigma


@pytest.mark.parametrize(
    ("snr", "low", "high"), [(2, (1, 0.9), (5, 0.6)), (7.5, (5, 0.6), (10, 0.36)), (29, (25, 0.08), (30, 0.05))]
)
def test_between_rows_log_sigma_is_linear(snr, low, high):
    slope = (math.log(high[1]) - math.log(low[1])) / (high[0] - low[0])
    assert math.log(snr_to_sigma(snr)) == pytest.approx(math.log(low[1]) + slope * (snr - low[0]), abs=1e-12)


@pytest.mark.parametrize("snr", [30.5, 40, 50, 99])
def test_above_30_db(snr):
    assert snr_to_sigma(snr) == pytest.approx(0.05 * 10 ** (-(snr - 30) / 20), rel=1e-12)


@pytest.mark.parametrize("snr", [100, 100.5, 1000, math.inf])
def test_no_noise_from_100_db(snr):
    assert snr_to_sigma(snr) == 0


def test_sigma_falls_all_the_way():
    sigmas = [snr_to_sigma(1 + 0.25 * k) for k in range(397)]  # 1 dB to 100 dB
    assert all(a > b for a, b in itertools.pairwise(sigmas))


@pytest.mark.parametrize("snr", [0.99, 0, -5, -math.inf, math.nan])
def test_below_1_db_names_the_range(snr):
    with pytest.raises(InputError, match=r"--snr .*1 dB to 100 dB"):
        snr_to_sigma(snr)


# -- what crosses -----------------------------------------------------------------------------------------------------


def test_sent_planes_are_present_classes_and_the_edge_plane():
    y = scenes(2)
    y[1, 2] = 0  # the second picture lacks class 2
    expected = [[True, False, True, True, False, True], [True, False, False, True, False, True]]
    assert sent_planes(y, K).tolist() == expected


def test_an_empty_edge_plane_and_raw_ids_are_sent_too():
    y = scenes(1)
    y[:, K] = 0
    assert sent_planes(y, K)[0, K]
    assert sent_planes(torch.zeros(1, 2, 4, 4), K, one_hot=False).all()


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("sigma", [0.0, 0.6])
def test_absent_planes_are_zero_after_channel_and_pool(pool, sigma):
    received = send(scenes(2), sigma, pool=pool)
    absent = [1, 4]
    assert not received[:, absent].any()
    assert all(received[n, k].any() for n in range(2) for k in [*PRESENT, K])


@pytest.mark.parametrize("sigma", [0.05, 0.36, 0.9])
def test_noise_has_the_asked_standard_deviation_on_every_sent_plane(sigma):
    y = scenes(2)
    noise = (send(y, sigma) - y)[:, [*PRESENT, K]].flatten(2)
    torch.testing.assert_close(noise.std(2), torch.full((2, 4), sigma), rtol=0.05, atol=0)
    assert noise.mean(2).abs().max() < 4.5 * sigma / SIZE


def test_every_plane_has_fresh_noise():
    y = scenes(1)
    noise = (send(y, 0.3) - y)[0, [*PRESENT, K]].flatten(1)
    correlation = torch.corrcoef(noise) - torch.eye(len(noise))
    assert correlation.abs().max() < 0.07


def test_sigma_per_sample():
    y = scenes(3)
    noise = send(y, [0.0, 0.1, 0.8]) - y
    assert not noise[0].any()
    assert noise[1, K].std() == pytest.approx(0.1, rel=0.1) and noise[2, K].std() == pytest.approx(0.8, rel=0.1)


def test_noise_to_label_spares_the_edge_plane():
    y = scenes(2)
    received = send(y, 0.5, noise_to="label")
    assert torch.equal(received[:, K], y[:, K])
    assert all((received[n, k] != y[n, k]).all() for n in range(2) for k in PRESENT)
    assert not torch.equal(send(y, 0.5, noise_to="semantics")[:, K], y[:, K])


@pytest.mark.parametrize("noise_to", ["semantics", "label"])
def test_raw_label_ids_get_noise_too(noise_to):
    y = encode_semantics(scenes(1)[:, :K].argmax(1, keepdim=True), None, scenes(1)[:, K:], K, one_hot=False)
    noise = send(y, 0.5, one_hot=False, noise_to=noise_to) - y
    assert noise[:, 0].std() == pytest.approx(0.5, rel=0.05)
    assert noise[:, 1].any() == (noise_to == "semantics")


def test_streams_do_not_depend_on_the_batch():
    y, sigmas = scenes(3), [0.2, 0.0, 0.7]
    together = send(y, sigmas, seeds=(11, 12, 13), pool="mean")
    for n in (2, 0, 1):
        alone = send(y[n : n + 1], sigmas[n], seeds=(11 + n,), pool="mean")
        torch.testing.assert_close(alone[0], together[n], rtol=0, atol=1e-6)


def test_no_noise_delivers_what_was_sent():
    y = scenes(2)
    assert torch.equal(send(y, 0.0), y)


@pytest.mark.parametrize("pool", POOLS)
def test_what_was_sent_is_left_alone(pool):
    y = scenes(2)
    before = y.clone()
    received = send(y, 0.4, pool=pool)
    received.add_(1)
    assert torch.equal(y, before)


def test_bad_options_are_named():
    with pytest.raises(InputError, match="1 noise streams for 2 samples"):
        send(scenes(2), 0.1, seeds=(1,))
    with pytest.raises(InputError, match="--noise_to edges: unknown; choose semantics or label"):
        send(scenes(1), 0.1, noise_to="edges")


# -- pools ------------------------------------------------------------------------------------------------------------


def reflect(i, n):
    return -i if i < 0 else 2 * (n - 1) - i if i >= n else i


def naive_filter(plane, window):
    """`window(i, j)` -> value, for every pixel."""
    height, width = plane.shape
    return torch.tensor([[window(i, j) for j in range(width)] for i in range(height)])


def naive_median(plane):
    h, w = plane.shape

    def window(i, j):
        return median(float(plane[reflect(a, h), reflect(b, w)]) for a in (i - 1, i, i + 1) for b in (j - 1, j, j + 1))

    return naive_filter(plane, window)


def neighbourhood(plane, i, j):
    h, w = plane.shape
    return [float(plane[a, b]) for a in range(i - 1, i + 2) for b in range(j - 1, j + 2) if 0 <= a < h and 0 <= b < w]


def naive_mean(plane):
    return naive_filter(plane, lambda i, j: sum(neighbourhood(plane, i, j)) / 9)


def naive_max(plane):
    mean = naive_mean(plane)
    return naive_filter(plane, lambda i, j: max(neighbourhood(mean, i, j)))


@pytest.mark.parametrize(("pool", "naive"), [("med", naive_median), ("mean", naive_mean), ("max", naive_max)])
@pytest.mark.parametrize("size", [(5, 7), (2, 3)])
def test_pools_against_loops(pool, naive, size):
    y = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    expected = torch.stack([torch.stack([naive(plane) for plane in planes]) for planes in y])
    torch.testing.assert_close(apply_pool(y, pool), expected, rtol=1e-5, atol=1e-6)


def test_averages_of_ones_show_the_zero_padding():
    ones = torch.ones(1, 1, 3, 3)
    ninths = torch.tensor([[4.0, 6, 4], [6, 9, 6], [4, 6, 4]]) / 9
    torch.testing.assert_close(apply_pool(ones, "mean")[0, 0], ninths)
    torch.testing.assert_close(apply_pool(ones, "max"), ones)
    torch.testing.assert_close(apply_pool(ones, "med"), ones)


@pytest.mark.parametrize("pool", ["None", None])
def test_pool_none_changes_nothing(pool):
    y = scenes(1)
    assert torch.equal(apply_pool(y, pool), y)


def test_unknown_pool_is_named():
    with pytest.raises(InputError, match="--pool avg: unknown; choose one of None, med, mean, max"):
        send(scenes(1), 0.0, pool="avg")


def test_the_channel_applies_the_pool_after_the_noise():
    y = scenes(1)
    pooled, raw = send(y, 0.5, pool="med"), send(y, 0.5)
    torch.testing.assert_close(pooled, apply_pool(raw, "med") * sent_planes(y, K)[..., None, None])
