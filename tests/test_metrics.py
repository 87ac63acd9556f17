"""Measures on pictures against closed forms and naive loops."""

import urllib.error

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch.nn.functional import pad

from guided_diffusion.console import InputError
from guided_diffusion.data.pictures import from_uint8
from guided_diffusion.evaluation.metrics import (
    Metrics,
    accuracy_and_iou,
    bootstrap_interval,
    class_counts,
    color_deviation,
    colour_error,
    distance,
    frechet_distance,
    interval,
    kernel_distance,
    kernel_distances,
    lpips,
    lpips_network,
    ms_ssim,
    ms_ssim_scales,
    psnr,
    resamples,
    ssim,
)


@pytest.fixture
def pictures():
    return torch.rand(3, 3, 8, 16, generator=torch.Generator().manual_seed(0)) * 1.5 - 1


@pytest.mark.parametrize(("difference", "decibels"), [(2.0, 0.0), (0.2, 20.0), (0.02, 40.0), (2 / 255, 48.1308)])
def test_psnr_of_a_constant_difference(difference, decibels):
    low = torch.full((1, 3, 4, 4), -1.0)
    assert float(psnr(low + difference, low)) == pytest.approx(decibels, abs=1e-3)


def test_colour_error_of_a_tint(pictures):
    tint = torch.tensor([0.1, -0.3, 0.0])[None, :, None, None]
    expected = torch.tensor([0.05, 0.15, 0.0]).expand(3, 3)  # of the [0, 1] range
    torch.testing.assert_close(colour_error(pictures + tint, pictures), expected, atol=1e-6, rtol=0)


def scene(n, height, width, seed=0):
    """Smooth pictures (n, 3, height, width) in [-1, 1]."""
    coarse = torch.rand(n, 3, height // 8 + 1, width // 8 + 1, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")


def naive_ssim(a, b):
    """SSIM by its definition, on one pair (3, H, W) in [0, 1]: mean over all pixels, mirrored at the borders."""
    x = torch.arange(11, dtype=torch.float64) - 5
    line = torch.exp(-x.square() / (2 * 1.5**2))
    window = line[:, None] * line[None] / line.sum() ** 2
    # Windows around every pixel: (3, H, W, 11, 11).
    u, v = (pad(p[None], (5, 5, 5, 5), mode="reflect")[0].double().unfold(1, 11, 1).unfold(2, 11, 1) for p in (a, b))
    mu, mv, uu, vv, uv = ((window * values).sum((3, 4)) for values in (u, v, u * u, v * v, u * v))
    contrast = (2 * (uv - mu * mv) + 0.03**2) / (uu - mu**2 + vv - mv**2 + 0.03**2)
    return float((contrast * (2 * mu * mv + 0.01**2) / (mu**2 + mv**2 + 0.01**2)).mean())


def test_ssim_equals_its_definition():
    a, b = scene(2, 12, 16), scene(2, 12, 16, seed=1)
    expected = [naive_ssim((x + 1) / 2, (y + 1) / 2) for x, y in zip(a, b, strict=True)]
    assert ssim(a, b).tolist() == pytest.approx(expected, abs=1e-4)
    assert ssim(a, a).tolist() == pytest.approx([1, 1], abs=1e-6)


def test_ms_ssim_scales_fit_the_picture():
    for short, scales in ((10, 0), (11, 1), (21, 1), (22, 2), (44, 3), (98, 3), (99, 4), (176, 5)):
        assert ms_ssim_scales(short, 512) == ms_ssim_scales(512, short) == scales
        if scales:  # torchmetrics agrees that they fit
            a = scene(2, short, short + 9)
            assert ms_ssim(a, a).tolist() == pytest.approx([1, 1], abs=1e-6)


@pytest.fixture(scope="module")
def alexnet(tmp_path_factory):
    """A file with the convolutions of an AlexNet that was never trained."""
    with torch.device("meta"):
        network = torchvision.models.alexnet(weights=None).features
    stream, weights = torch.Generator().manual_seed(0), {}
    for key, value in network.state_dict().items():
        weights[f"features.{key}"] = torch.randn(value.shape, generator=stream) / max(1, value[0].numel()) ** 0.5
    path = tmp_path_factory.mktemp("backbones") / "alex.pth"
    torch.save(weights, path)
    return path


def test_lpips_network_leaves_the_global_stream_alone(alexnet):
    before = torch.random.get_rng_state()
    network = lpips_network(str(alexnet))
    assert torch.equal(torch.random.get_rng_state(), before)
    a = scene(2, 64, 64)
    assert lpips(network, a, a).tolist() == [0, 0] and (lpips(network, a, a.flip(3)) > 0).all()


@pytest.mark.parametrize("content", ["module", "text", "none", "other"])
def test_lpips_network_names_bad_files(content, tmp_path):
    path = tmp_path / "weights.pth"
    if content == "text":
        path.write_text("hello")
    elif content != "none":
        torch.save(torch.nn.Linear(1, 1) if content == "module" else {"conv.weight": torch.zeros(3)}, path)
    with pytest.raises(InputError, match=r"--lpips_weights .*weights.pth: no AlexNet \(.*give torchvision's") as caught:
        Metrics(["psnr", "lpips"], lpips_weights=str(path))
    assert "\n" not in str(caught.value)


def test_metrics_without_weights_are_one_line(tmp_path, monkeypatch):
    def refuse(*_):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", refuse)
    hints = {"lpips": r"--lpips_weights not given.*no route.*leave lpips out", "kid": "no Inception .*--features"}
    for name, hint in hints.items():
        with pytest.raises(InputError, match=hint) as caught:
            Metrics([name])
        assert "\n" not in str(caught.value)


def root(c):
    """Of a positive semidefinite matrix."""
    values, vectors = torch.linalg.eigh(c)
    return vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T


@pytest.mark.parametrize("sizes", [(40, 50, 6), (5, 7, 12)])  # with fewer pictures than features, too
def test_frechet_distance_equals_the_closed_form(sizes):
    draw = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, sizes[2], generator=draw).double() * k + k for k, n in enumerate(sizes[:2], 1))
    c1, c2 = torch.cov(a.T), torch.cov(b.T)
    mixed = root(root(c1) @ c2 @ root(c1)).trace()
    expected = (a.mean(0) - b.mean(0)).square().sum() + c1.trace() + c2.trace() - 2 * mixed
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-5)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, a + 3) == pytest.approx(9 * sizes[2], rel=1e-5)


def test_metrics_over_the_set_take_own_features():
    measures = Metrics(["fid", "kid"], features=lambda x: x.mean((2, 3)))
    original, made = scene(20, 16, 16), scene(20, 16, 16, seed=5)
    values, spread = measures.over_the_set((made[rows], original[rows], None) for rows in (slice(0, 7), slice(7, 20)))
    assert set(values) == {"fid_features", "kid_features", "kid_features_std"}
    assert set(spread) == {"kid_features"} and spread["kid_features"][0] < values["kid_features"]
    assert values["kid_features"] < spread["kid_features"][1]
    assert values["fid_features"] == pytest.approx(frechet_distance(made.mean((2, 3)), original.mean((2, 3))), rel=1e-5)
    assert measures.over_the_set([(original, original, None)])[0]["fid_features"] == pytest.approx(0, abs=1e-9)
    assert not measures.notes
    assert measures.over_the_set([(made[:1], original[:1], None)]) == measures.over_the_set([]) == ({}, {})


def test_accuracy_and_iou_count_pixels():
    draw = torch.Generator().manual_seed(3)
    label, predicted = (torch.randint(0, k, (2, 1, 8, 8), generator=draw) for k in (3, 5))
    pairs = [(label == k, predicted == k) for k in range(3)]
    overlaps = [float((true & found).sum() / (true | found).sum()) for true, found in pairs]
    counts = class_counts(predicted, label, 6)
    assert counts.shape == (2, 3, 6)
    accuracy, iou = accuracy_and_iou(counts.sum(0))
    one = accuracy_and_iou(class_counts(predicted[1:], label[1:], 6).sum(0))
    assert [float(both[1]) for both in accuracy_and_iou(counts)] == pytest.approx([*map(float, one)])
    assert accuracy == pytest.approx((label == predicted).float().mean().item())
    assert iou == pytest.approx(sum(overlaps) / 3)  # classes 3 and 4 are predicted, but not there


def test_miou_stands_beside_its_ceiling():
    label = torch.zeros(2, 1, 4, 4, dtype=torch.int64)
    label[:, :, 2:] = 3
    original = label.expand(-1, 3, -1, -1) / 2 - 1.0
    measures = Metrics(["miou"], num_classes=4, segmenter=lambda x: ((x[:, :1] + 1) * 2).round().long())
    assert measures.over_the_set([]) == ({}, {})
    values, spread = measures.over_the_set([(torch.full_like(original, -1), original, label)])
    assert values == {"pixel_accuracy": 0.5, "miou": 0.25, "pixel_accuracy_real": 1.0, "miou_real": 1.0}
    assert spread == {name: [value, value] for name, value in values.items()}  # both pictures are the same


def test_intervals_are_of_resampled_pictures():
    """The mean IoU of two unlike pictures, on every draw of two."""
    label = torch.tensor([0, 0, 1, 1]).reshape(1, 1, 2, 2).repeat(2, 1, 1, 1)
    images = torch.stack([torch.zeros(3, 2, 2), (label[1] * 2.0 - 1).expand(3, 2, 2)])  # wrong by half; right
    measures = Metrics(["miou"], num_classes=2, segmenter=lambda x: (x[:, :1] > 0).long())
    values, spread = measures.over_the_set([(images, images, label)])
    assert values["miou"] == pytest.approx((4 / 6 + 2 / 4) / 2) and spread["miou"] == [0.25, 1]  # 3 of 4 pixels right


def test_resamples_draw_pictures():
    counts = resamples(5, 1000)
    assert counts.shape == (1000, 5) and (counts.sum(1) == 5).all()
    assert counts.mean() == 1 and counts.var() == pytest.approx(1 - 1 / 5, rel=0.05)  # multinomial
    assert torch.equal(counts, resamples(5, 1000)) and interval(range(1001)) == [25, 975]


def test_kernel_distances_equal_loops_over_what_was_drawn():
    """A U-statistic over the drawn copies that leaves out pairs of copies of one picture."""
    draw = torch.Generator().manual_seed(2)
    sets = torch.randn(2, 4, 3, generator=draw).double()
    sets[1] += 0.5
    k = (sets.flatten(0, 1) @ sets.flatten(0, 1).T / 3 + 1) ** 3
    weights = torch.tensor([[1.0, 1, 1, 1], [2, 0, 1, 1], [4, 0, 0, 0]]).double()
    for row, found in zip(weights[:2], kernel_distances(*sets, weights), strict=False):
        drawn = [i for i in range(4) for _ in range(int(row[i]))]
        apart = [(i, j) for i in drawn for j in drawn if i != j]
        same = np.mean([k[i, j] + k[4 + i, 4 + j] for i, j in apart])
        across = np.mean([k[i, 4 + j] for i, j in apart + [(i, i) for i in drawn]])
        assert float(found) == pytest.approx(same - 2 * across)
    mean, spread = kernel_distance(*sets, subset_size=4)
    assert float(kernel_distances(*sets, weights)[0]) == pytest.approx(mean) and spread == pytest.approx(0, abs=1e-12)
    assert kernel_distance(*sets, subset_size=3) == kernel_distance(*sets, subset_size=3)
    assert kernel_distance(*sets, subset_size=3)[1] > 0
    assert kernel_distances(*sets, weights)[2].isnan() and np.isfinite(interval(kernel_distances(*sets, weights))).all()


def test_color_deviation_is_that_of_pillows_planes():
    pixels = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    planes = np.asarray(Image.fromarray(pixels).convert("YCbCr"), np.float64)[..., 1:]
    found = color_deviation(from_uint8(pixels))[0]
    assert found.tolist() == pytest.approx(planes.std((0, 1)).tolist(), abs=0.05)  # Pillow rounds
    values, spread = Metrics(["color_std"]).over_the_set([(torch.zeros(2, 3, 8, 8), scene(2, 8, 8), None)])
    assert (values["cb_std"], values["cr_std"], spread["cb_std"]) == (0, 0, [0, 0])
    assert spread["cr_std_real"][0] <= values["cr_std_real"] <= spread["cr_std_real"][1] and values["cb_std_real"] > 0


def test_swd_is_among_the_measures_of_a_set():
    original, measures = scene(6, 32, 48), Metrics(["swd"])
    noisy = original + 0.1 * torch.randn(original.shape, generator=torch.Generator().manual_seed(1))
    values, spread = measures.over_the_set([(noisy[:4], original[:4], None), (noisy[4:], original[4:], None)])
    assert [*values] == [*spread] == ["swd_32", "swd_16"] and values["swd_32"] > values["swd_16"] > 0
    assert values == measures.over_the_set([(noisy, original, None)])[0]  # whatever the batches
    assert all(low < values[name] < high for name, (low, high) in spread.items())
    assert measures.over_the_set([(original, original, None)])[0] == {"swd_32": 0, "swd_16": 0}
    assert measures.over_the_set([(original[..., :6], original[..., :6], None)]) == ({}, {})
    assert measures.notes == {"pictures are smaller than the 7-pixel patches of swd: left out"}


def test_metrics_per_picture_do_not_depend_on_the_batch(alexnet):
    a, b = scene(3, 64, 80), scene(3, 64, 80, seed=1)
    measures = Metrics(["lpips", "psnr", "ssim", "ms_ssim"], lpips_weights=alexnet)
    values = measures.per_picture(a, b)
    assert list(values) == ["psnr", "ssim", "ms_ssim", "lpips"] and measures.over_the_set([]) == ({}, {})
    for k in range(3):
        alone = measures.per_picture(a[k : k + 1], b[k : k + 1])
        assert all(float(alone[name][0]) == pytest.approx(float(values[name][k]), rel=1e-4) for name in values)
    assert measures.notes == {"ms_ssim has room for 3 of 5 scales; compare with pictures of equal size only"}


@pytest.mark.parametrize("name", ["mse", "ssim", "lpips"])
def test_distance_ranks_candidates(name, alexnet):
    original = scene(1, 64, 64)
    noise = torch.randn(original.shape, generator=torch.Generator().manual_seed(4))
    candidates = torch.cat([original + level * noise for level in (0.4, 0, 0.1)]).clamp(-1, 1)
    values = distance(name, lpips_weights=alexnet)(candidates, original)
    assert values.shape == (3,) and values.argsort().tolist() == [1, 2, 0] and abs(float(values[1])) < 1e-6


def test_bootstrap_interval_equals_the_normal_approximation():
    values = np.random.default_rng(0).normal(5, 2, 400)
    low, high = bootstrap_interval(values)
    half = 1.96 * values.std() / 20  # the normal approximation
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.03)
    assert bootstrap_interval(values) == (low, high) != bootstrap_interval(values, seed=1)
    assert bootstrap_interval([3.0]) == (3.0, 3.0)
