"""Classical codecs under a byte budget."""

import io

import numpy as np
import pytest
from PIL import Image

from guided_diffusion.console import InputError
from guided_diffusion.data.pictures import from_uint8
from guided_diffusion.evaluation import codecs
from guided_diffusion.evaluation.codecs import (
    SCALES,
    base,
    best_within,
    check_installed,
    container_bytes,
    decode,
    payload,
)
from guided_diffusion.evaluation.metrics import psnr
from guided_diffusion.flags import CODECS

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


def installed(codec):
    try:
        check_installed(codec)
    except InputError:
        pytest.skip(f"{codec} is not installed")
    return codec


@pytest.fixture(params=[codec for codec in CODECS if codec == base(codec)])
def codec(request):
    return installed(request.param)


@pytest.fixture(params=[codec for codec in CODECS if codec != base(codec)])
def bare_codec(request):
    return installed(request.param)


def quality_of(made, original):
    return float(psnr(from_uint8(made), from_uint8(original)))


def test_best_within_fits_and_shows_what_the_receiver_sees(codec, picture):
    budget = container_bytes(codec) + (800 if codec == "jpeg" else 600)
    coded = best_within(codec, picture, budget)
    assert len(coded.data) <= budget
    assert np.array_equal(decode(coded.data, HEIGHT, WIDTH), coded.picture)
    assert coded.picture.shape == picture.shape and coded.picture.dtype == np.uint8
    with Image.open(io.BytesIO(coded.data)) as image:
        assert image.format.lower() == codec
        assert image.size == (WIDTH // coded.scale, HEIGHT // coded.scale)
    assert 10 < container_bytes(codec) < 400
    assert best_within(codec, picture, 30) is None


def jpeg_file(bare, whole):
    """Put Huffman tables and scans back among the agreed parts of a file of the same quality."""
    out, place, rest = b"\xff\xd8", 2, bare
    while whole[place + 1] != 0xD9:
        end = place + 2 + int.from_bytes(whole[place + 2 : place + 4], "big")
        segment = whole[place:end]
        if segment[1] == 0xC4 and rest.startswith(segment):
            rest = rest[len(segment) :]
        out, place = out + segment, end
        if segment[1] == 0xDA:
            while whole[place] != 0xFF or whole[place + 1] in (0, *range(0xD0, 0xD8)):
                out, rest, place = out + rest[:1], rest[1:], place + 1
    assert not rest
    return out + b"\xff\xd9"


@pytest.mark.parametrize("quality", [5, 60])
def test_bare_payload_is_what_the_container_held(bare_codec, quality, picture):
    """The file can be made again of its payload and of what was agreed."""
    whole_codec, small = base(bare_codec), Image.fromarray(picture)
    for options in codecs.SEARCHED.get(bare_codec, codecs.SEARCHED[whole_codec]):
        whole = codecs.encode(bare_codec, small, quality, options)
        sent = payload(bare_codec, whole)
        assert payload(whole_codec, whole) == whole
        if bare_codec == "webp-bare":
            assert whole[:16] + len(sent).to_bytes(4, "little") + sent + bytes(len(sent) % 2) == whole
        elif bare_codec == "avif-bare":
            assert whole.endswith((8 + len(sent)).to_bytes(4, "big") + b"mdat" + sent) and len(sent) < len(whole) - 250
            assert sent[:3] == bytes([0x12, 0, 0x0A])  # temporal delimiter, sequence header
        else:
            assert jpeg_file(sent, whole) == whole and len(sent) < len(whole) - 190


def test_standard_huffman_tables_are_agreed(picture):
    whole = codecs.encode("jpeg", Image.fromarray(picture), 60, {"subsampling": "4:2:0", "optimize": False})
    assert whole.count(b"\xff\xc4") == 4 and b"\xff\xc4" not in payload("jpeg-bare", whole)
    optimised = codecs.encode("jpeg", Image.fromarray(picture), 60, {"subsampling": "4:2:0", "optimize": True})
    assert payload("jpeg-bare", optimised).count(b"\xff\xc4") == 4


def test_bare_codecs_are_better_within_the_same_bytes(bare_codec, picture):
    budget = container_bytes(base(bare_codec)) + 250
    bare, whole = (best_within(name, picture, budget) for name in (bare_codec, base(bare_codec)))
    assert len(bare.data) <= budget and container_bytes(bare_codec) < container_bytes(base(bare_codec)) - 15
    assert quality_of(bare.picture, picture) > quality_of(whole.picture, picture) + 0.1


def test_best_within_is_better_with_more_bytes(codec, picture):
    budgets = [container_bytes(codec) + spare for spare in (250, 900, 4000)]
    values = [quality_of(best_within(codec, picture, budget).picture, picture) for budget in budgets]
    assert values[0] + 0.3 < values[1] < values[2] - 0.1


@pytest.mark.parametrize("codec", ["jpeg", "webp"])
def test_best_within_is_as_good_as_trying_everything(codec, picture):
    whole = Image.fromarray(picture)
    scores = []
    for scale in SCALES:
        small = whole.resize((WIDTH // scale, HEIGHT // scale), Image.Resampling.LANCZOS) if scale > 1 else whole
        for variant in codecs.SEARCHED[codec]:
            for quality in range(1, codecs.QUALITIES[codec][1] + 1):
                data = codecs.encode(codec, small, quality, variant)
                if len(data) <= 500:
                    scores.append(quality_of(decode(data, HEIGHT, WIDTH), picture))
    found = best_within(codec, picture, 500)
    assert quality_of(found.picture, picture) > max(scores) - 0.15  # bisection may miss by a quality step


def test_best_within_takes_tiny_pictures(codec):
    flat = np.full((4, 6, 3), 77, np.uint8)
    assert np.abs(best_within(codec, flat, 2000).picture.astype(int) - 77).max() <= 3


def test_codec_missing_plugin(monkeypatch):
    monkeypatch.setattr("guided_diffusion.evaluation.codecs.pillow_jxl", None)
    with pytest.raises(InputError, match="--baseline jxl: not installed; pip install pillow-jxl-plugin"):
        check_installed("jxl")
