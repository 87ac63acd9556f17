"""Small network parts against naive versions of themselves."""

import math

import pytest
import torch
from torch.nn.functional import conv2d

from guided_diffusion.diffusion.nn import (
    AttentionBlock,
    Downsample,
    Upsample,
    normalization,
    timestep_embedding,
    zero_module,
)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("dim", [8, 7, 64])
def test_timestep_embedding_is_cosines_then_sines(dim):
    timesteps = torch.tensor([0.0, 1.0, 12.5, 999.0])
    embedding = timestep_embedding(timesteps, dim)
    half = dim // 2
    assert embedding.shape == (4, dim) and embedding.dtype == torch.float32
    for row, t in zip(embedding.tolist(), timesteps.tolist(), strict=True):
        angles = [t * 10000 ** (-k / half) for k in range(half)]
        expected = [math.cos(a) for a in angles] + [math.sin(a) for a in angles] + [0.0] * (dim % 2)
        assert row == pytest.approx(expected, abs=2e-4)  # float32 angles up to 999


def test_timestep_embedding_takes_integers():
    t = torch.tensor([3, 500])
    torch.testing.assert_close(timestep_embedding(t, 16), timestep_embedding(t.float(), 16), rtol=0, atol=0)


def test_timestep_embedding_honours_max_period():
    embedding = timestep_embedding(torch.tensor([2.0]), 4, max_period=100)
    expected = [[math.cos(2), math.cos(0.2), math.sin(2), math.sin(0.2)]]
    torch.testing.assert_close(embedding, torch.tensor(expected))


def test_normalization_has_32_groups_and_an_affine_part():
    norm = normalization(64)
    assert norm.num_groups == 32 and norm.weight.shape == norm.bias.shape == (64,)
    groups = norm(torch.randn(2, 64, 5, 7) * 3 + 2).reshape(2, 32, -1)
    torch.testing.assert_close(groups.mean(-1), torch.zeros(2, 32), rtol=0, atol=1e-5)
    torch.testing.assert_close(groups.var(-1, correction=0), torch.ones(2, 32), rtol=0, atol=1e-4)


def test_zero_module_zeroes_every_parameter():
    module = zero_module(torch.nn.Conv2d(3, 4, 3))
    assert not any(p.any() for p in module.parameters())
    assert len(list(module.parameters())) == 2


def _naive_upsample(x):
    out = torch.empty(*x.shape[:2], 2 * x.shape[2], 2 * x.shape[3])
    for i in range(out.shape[2]):
        for j in range(out.shape[3]):
            out[:, :, i, j] = x[:, :, i // 2, j // 2]
    return out


def test_upsample_repeats_pixels():
    x = torch.randn(2, 3, 4, 5)
    torch.testing.assert_close(Upsample(3, False)(x), _naive_upsample(x), rtol=0, atol=0)


def test_upsample_convolves_after_enlarging():
    x, layer = torch.randn(2, 3, 4, 5), Upsample(3, True)
    expected = conv2d(_naive_upsample(x), layer.conv.weight, layer.conv.bias, padding=1)
    torch.testing.assert_close(layer(x), expected)


def test_downsample_averages_two_by_two():
    x = torch.randn(2, 3, 4, 6)
    expected = (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4
    layer = Downsample(3, False)
    torch.testing.assert_close(layer(x), expected)
    assert not list(layer.parameters())


def test_downsample_convolves_with_stride_two():
    x, layer = torch.randn(2, 3, 4, 6), Downsample(3, True)
    every_pixel = conv2d(x, layer.op.weight, layer.op.bias, padding=1)
    torch.testing.assert_close(layer(x), every_pixel[..., ::2, ::2])


def _attention_block(num_heads, new_order, channels=64):
    block = AttentionBlock(channels, num_heads, new_order)
    torch.nn.init.normal_(block.proj_out.weight, std=0.1)
    torch.nn.init.normal_(block.norm.weight)
    return block


def _naive_attention(block, x, num_heads, new_order):
    """Attention by explicit row ranges of qkv and einsum, one head after the other."""
    n, c, h, w = x.shape
    d = c // num_heads
    normed = torch.nn.functional.group_norm(x, 32, block.norm.weight, block.norm.bias).reshape(n, c, h * w)
    qkv = torch.einsum("oc,ncl->nol", block.qkv.weight[..., 0], normed) + block.qkv.bias[:, None]
    heads = []
    for k in range(num_heads):
        if new_order:  # all q, all k, all v; each by heads
            starts = [part * c + k * d for part in range(3)]
        else:  # head by head; each q, k, v
            starts = [(3 * k + part) * d for part in range(3)]
        q, key, v = (qkv[:, start : start + d] for start in starts)
        weight = torch.einsum("ndi,ndj->nij", q, key).div(math.sqrt(d)).softmax(-1)
        heads.append(torch.einsum("nij,ndj->ndi", weight, v))
    out = torch.einsum("oc,ncl->nol", block.proj_out.weight[..., 0], torch.cat(heads, 1)) + block.proj_out.bias[:, None]
    return x + out.reshape(x.shape)


@pytest.mark.parametrize("new_order", [False, True])
@pytest.mark.parametrize("num_heads", [1, 2, 8])
def test_attention_equals_the_naive_sum(num_heads, new_order):
    block, x = _attention_block(num_heads, new_order), torch.randn(2, 64, 3, 5)
    torch.testing.assert_close(block(x), _naive_attention(block, x, num_heads, new_order), rtol=1e-5, atol=1e-5)


def test_the_legacy_head_order_is_the_default_and_matters():
    block, x = _attention_block(4, False), torch.randn(1, 64, 2, 4)
    other = AttentionBlock(64, 4, new_order=True)
    other.load_state_dict(block.state_dict())
    assert AttentionBlock(64, 4).new_order is False
    assert (block(x) - other(x)).abs().max() > 1e-2


def test_attention_starts_as_the_identity():
    x = torch.randn(2, 64, 3, 5)
    torch.testing.assert_close(AttentionBlock(64, 2)(x), x, rtol=0, atol=0)


def test_attention_does_not_depend_on_the_memory_format():
    block, x = _attention_block(2, False), torch.randn(2, 64, 4, 6)
    torch.testing.assert_close(block(x.contiguous(memory_format=torch.channels_last)), block(x), rtol=1e-5, atol=1e-5)
