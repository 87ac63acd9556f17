"""Attention against a naive sum (the other parts: test_unet)."""

import math

import pytest
import torch
from conftest import normals
from torch.nn import functional as F

from guided_diffusion.diffusion.nn import AttentionBlock


def naive_attention(p, x, num_heads, new_order=False):
    """Attention of the parameters of a block, one head after the other."""
    flat = F.group_norm(x, 32, p["norm.weight"], p["norm.bias"]).flatten(2)
    qkv = F.conv1d(flat, p["qkv.weight"], p["qkv.bias"])
    heads, d = [], x.shape[1] // num_heads
    for k in range(num_heads):
        if new_order:  # all q, all k, all v; each by heads
            starts = [(part * num_heads + k) * d for part in range(3)]
        else:  # head by head; each q, k, v
            starts = [(3 * k + part) * d for part in range(3)]
        q, key, v = (qkv[:, start : start + d] for start in starts)
        weight = (q.transpose(1, 2) @ key / math.sqrt(d)).softmax(-1)
        heads.append(v @ weight.transpose(1, 2))
    return x + F.conv1d(torch.cat(heads, 1), p["proj_out.weight"], p["proj_out.bias"]).view(x.shape)


@pytest.mark.parametrize("new_order", [False, True])
@pytest.mark.parametrize("num_heads", [1, 8])
def test_attention_equals_the_naive_sum(num_heads, new_order):
    torch.manual_seed(0)
    block, x = AttentionBlock(64, num_heads, new_order), normals(2, 64, 3, 5)
    torch.testing.assert_close(block(x), x, rtol=0, atol=0)  # starts as the identity
    torch.nn.init.normal_(block.proj_out.weight, std=0.1)
    torch.nn.init.normal_(block.norm.weight)
    expected = naive_attention(block.state_dict(), x, num_heads, new_order)
    for layout in (x, x.contiguous(memory_format=torch.channels_last)):
        torch.testing.assert_close(block(layout), expected, rtol=1e-5, atol=1e-5)
