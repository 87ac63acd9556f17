"""Small network parts against naive versions of themselves."""

import math

import pytest
import torch
from conftest import normals
from torch.nn.functional import conv2d

from guided_diffusion.diffusion.nn import AttentionBlock, Downsample, Upsample, timestep_embedding


def test_timestep_embedding_is_cosines_then_sines():
    timesteps = torch.tensor([0.0, 1.0, 12.5, 999.0])
    embedding = timestep_embedding(timesteps, 8)
    assert embedding.dtype == torch.float32
    for row, t in zip(embedding.tolist(), timesteps.tolist(), strict=True):
        angles = [t * 10000 ** (-k / 4) for k in range(4)]
        expected = [math.cos(a) for a in angles] + [math.sin(a) for a in angles]
        assert row == pytest.approx(expected, abs=2e-4)  # float32 angles up to 999
    assert torch.equal(timestep_embedding(torch.tensor([1, 999]), 8), embedding[[1, 3]])


def naive_upsample(x):
    return x.repeat_interleave(2, 2).repeat_interleave(2, 3)


def test_upsample_repeats_pixels_then_convolves():
    x, layer = normals(2, 3, 4, 5), Upsample(3, True)
    torch.testing.assert_close(Upsample(3, False)(x), naive_upsample(x), rtol=0, atol=0)
    torch.testing.assert_close(layer(x), conv2d(naive_upsample(x), layer.conv.weight, layer.conv.bias, padding=1))


def test_downsample_averages_two_by_two_or_convolves_with_stride_two():
    x, layer = normals(2, 3, 4, 6), Downsample(3, True)
    expected = (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4
    torch.testing.assert_close(Downsample(3, False)(x), expected)
    torch.testing.assert_close(layer(x), conv2d(x, layer.op.weight, layer.op.bias, padding=1)[..., ::2, ::2])


def naive_attention(block, x, num_heads, new_order):
    """Attention by explicit row ranges of qkv and einsum, one head after the other."""
    c, d = x.shape[1], x.shape[1] // num_heads
    normed = torch.nn.functional.group_norm(x, 32, block.norm.weight, block.norm.bias).flatten(2)
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
@pytest.mark.parametrize("num_heads", [1, 8])
def test_attention_equals_the_naive_sum(num_heads, new_order):
    torch.manual_seed(0)
    block, x = AttentionBlock(64, num_heads, new_order), normals(2, 64, 3, 5)
    torch.testing.assert_close(block(x), x, rtol=0, atol=0)  # starts as the identity
    torch.nn.init.normal_(block.proj_out.weight, std=0.1)
    torch.nn.init.normal_(block.norm.weight)
    expected = naive_attention(block, x, num_heads, new_order)
    for layout in (x, x.contiguous(memory_format=torch.channels_last)):
        torch.testing.assert_close(block(layout), expected, rtol=1e-5, atol=1e-5)
