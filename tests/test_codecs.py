"""Classical codecs under a byte budget."""

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image

from guided_diffusion.console import InputError
from guided_diffusion.evaluation import codecs as baselines
from guided_diffusion.evaluation.codecs import CODECS, SCALES, available, best_within, container_bytes, decode
from guided_diffusion.evaluation.metrics import psnr

HEIGHT, WIDTH = 48, 80


@pytest.fixture(scope="module")
def picture():
    """A sky, a road, a few boxes and some grain: (48, 80, 3) uint8."""
    draw = np.random.default_rng(0)
    rows = np.linspace(0, 1, HEIGHT)[:, None, None]
    base = np.where(rows < 0.5, [120, 160, 220], [90, 90, 95]) + 40 * rows * np.ones((1, WIDTH, 1))
    for _ in range(8):
        y, x = draw.integers(0, HEIGHT - 10), draw.integers(0, WIDTH - 12)
        base[y : y + 10, x : x + 12] = draw.integers(0, 255, 3)
    return (base + draw.normal(0, 6, base.shape)).clip(0, 255).astype(np.uint8)


@pytest.fixture(params=CODECS)
def codec(request):
    if not available(request.param):
        pytest.skip(f"{request.param} is not installed")
    return request.param


def quality_of(made, original):
    pair = (torch.from_numpy(array.copy()).permute(2, 0, 1)[None] / 127.5 - 1 for array in (made, original))
    return float(psnr(*pair))


@pytest.mark.parametrize("spare", [60, 600])
def test_the_file_fits_and_says_what_the_receiver_sees(codec, picture, spare):
    budget = container_bytes(codec) + spare + (200 if codec == "jpeg" else 0)
    coded = best_within(codec, picture, budget)
    assert len(coded.data) <= budget
    assert np.array_equal(decode(codec, coded.data, HEIGHT, WIDTH), coded.picture)
    assert coded.picture.shape == picture.shape and coded.picture.dtype == np.uint8
    with Image.open(io.BytesIO(coded.data)) as image:
        assert image.format.lower() == codec
        assert image.size == (WIDTH // coded.scale, HEIGHT // coded.scale)
    assert coded.container_bytes == container_bytes(codec)


def test_more_bytes_give_a_better_picture(codec, picture):
    budgets = [container_bytes(codec) + spare for spare in (250, 900, 4000)]
    values = [quality_of(best_within(codec, picture, budget).picture, picture) for budget in budgets]
    assert values[0] + 0.3 < values[1] < values[2] - 0.1


def test_nothing_fits_a_few_bytes(codec, picture):
    assert best_within(codec, picture, 30) is None


@pytest.mark.parametrize("codec", ["jpeg", "webp"])
@pytest.mark.parametrize("budget", [400, 800])
def test_as_good_as_trying_everything(codec, picture, budget):
    whole = Image.fromarray(picture)
    scores = []
    for scale in SCALES:
        small = whole.resize((WIDTH // scale, HEIGHT // scale), Image.Resampling.LANCZOS) if scale > 1 else whole
        for variant in baselines._SEARCHED[codec]:
            for quality in range(1, baselines._HIGHEST[codec] + 1):
                data = baselines._encode(codec, small, quality, variant)
                if len(data) <= budget:
                    scores.append(quality_of(decode(codec, data, HEIGHT, WIDTH), picture))
    found = best_within(codec, picture, budget)
    if not scores:
        assert found is None
    else:
        assert quality_of(found.picture, picture) > max(scores) - 0.15  # bisection may miss by a quality step


def test_own_score_decides(picture):
    seen = []

    def smallest_scale(made, original):
        seen.append(made.shape)
        assert np.array_equal(original, picture)
        return -float(np.abs(np.diff(made.astype(int), axis=1)).mean())  # the smoothest wins

    smooth = best_within("webp", picture, 2000, score=smallest_scale)
    assert smooth.scale > best_within("webp", picture, 2000).scale
    assert set(seen) == {picture.shape}


def test_tiny_pictures_have_no_empty_scale(codec):
    flat = np.full((4, 6, 3), 77, np.uint8)
    assert np.abs(best_within(codec, flat, 2000).picture.astype(int) - 77).max() <= 3


def test_container_bytes_are_most_of_a_flat_picture(codec):
    flat = np.full((8, 8, 3), 128, np.uint8)
    assert best_within(codec, flat, container_bytes(codec)).data
    assert 10 < container_bytes(codec) < 400


@pytest.mark.parametrize("damage", ["truncated", "header", "empty", "other"])
def test_damaged_data_is_an_input_error(codec, picture, damage):
    data = best_within(codec, picture, 3000).data
    bad = {
        "truncated": data[: len(data) // 3],
        "header": bytes(12) + data[12:],
        "empty": b"",
        "other": b"GIF89a" + data,
    }[damage]
    with pytest.raises(InputError, match=f"{codec} data of {len(bad)} bytes cannot be decoded") as caught:
        decode(codec, bad, HEIGHT, WIDTH)
    assert "\n" not in str(caught.value)


def test_flipped_bytes_are_a_picture_or_an_input_error(codec, picture):
    data = best_within(codec, picture, 3000).data
    draw = np.random.default_rng(1)
    outcomes = []
    for _ in range(30):
        bad = bytearray(data)
        for place in draw.integers(0, len(bad), 3):
            bad[place] ^= 1 << draw.integers(8)
        try:
            outcomes.append(decode(codec, bytes(bad), HEIGHT, WIDTH).shape)
        except InputError:
            outcomes.append(None)
    assert set(outcomes) <= {None, picture.shape}  # WebP often shows a wrong picture: the link has its own checksums


def test_a_larger_picture_than_agreed_is_refused(codec, picture):
    data = best_within(codec, np.tile(picture, (2, 2, 1)), 1500).data
    with pytest.raises(InputError, match=f"{codec} picture of 160x96 where at most 80x48"):
        decode(codec, data, HEIGHT, WIDTH)


def test_another_codecs_data_is_refused(picture):
    with pytest.raises(InputError, match="webp data"):
        decode("webp", best_within("jpeg", picture, 3000).data, HEIGHT, WIDTH)


def test_unknown_codec():
    for call in (lambda: available("bpg"), lambda: best_within("bpg", np.zeros((8, 8, 3), np.uint8), 100)):
        with pytest.raises(InputError, match="--baseline bpg: unknown; choose from jpeg, webp, avif, jxl"):
            call()


def test_missing_plugin(monkeypatch, picture):
    monkeypatch.setitem(__import__("sys").modules, "pillow_jxl", None)
    assert not available("jxl")
    with pytest.raises(InputError, match="--baseline jxl: not installed; pip install pillow-jxl-plugin"):
        best_within("jxl", picture, 1000)


def test_equal_pictures_have_infinite_psnr(picture):
    assert baselines._psnr(picture, picture) == math.inf
    assert baselines._psnr(picture, picture ^ 1) == pytest.approx(quality_of(picture, picture ^ 1), abs=1e-3)
