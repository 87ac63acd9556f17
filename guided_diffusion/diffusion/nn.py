"""Small network parts shared by the UNet."""

import math

import torch
from torch import nn


def timestep_embedding(timesteps, dim):
    """Sinusoidal embedding, cosines first (Vaswani et al. 2017, in the order that guided-diffusion weights expect).

    :param timesteps: (N,) original timesteps; may be fractional.
    :param dim: width of the embedding, even.
    :return: (N, dim) float32 in [-1, 1].
    """
    half = dim // 2
    powers = torch.arange(half, dtype=torch.float32, device=timesteps.device)
    frequencies = torch.exp(-math.log(10000) * powers / half)
    angles = timesteps[:, None].float() * frequencies  # (N, half)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def zero_module(module):
    """Zero all parameters, so that a residual branch starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def normalization(channels):
    """GroupNorm with the 32 groups of the guided-diffusion family."""
    return nn.GroupNorm(32, channels)


class Upsample(nn.Module):
    """Double both sides by nearest neighbour, then an optional 3x3 convolution that keeps the width `channels`."""

    def __init__(self, channels, use_conv):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if use_conv else nn.Identity()

    def forward(self, x):
        return self.conv(nn.functional.interpolate(x, scale_factor=2, mode="nearest"))  # (N, C, 2H, 2W)


class Downsample(nn.Module):
    """Halve both sides, by a strided 3x3 convolution that keeps the width `channels`, or by 2x2 averages."""

    def __init__(self, channels, use_conv):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1) if use_conv else nn.AvgPool2d(2)

    def forward(self, x):
        return self.op(x)  # (N, C, H/2, W/2)


class Pointwise(nn.Conv1d):
    """A convolution of kernel size 1, with its parameters' shapes, on tokens (N, L, C)."""

    def forward(self, tokens):
        return nn.functional.linear(tokens, self.weight[..., 0], self.bias)


class AttentionBlock(nn.Module):
    """Multi-head self-attention over all positions, with a residual.

    :param channels: width; `num_heads` must divide it.
    :param new_order: split q, k, v before the heads. The legacy order, heads first, is what published weights use.
    """

    def __init__(self, channels, num_heads, new_order=False):
        super().__init__()
        self.num_heads, self.new_order = num_heads, new_order
        self.norm = normalization(channels)
        self.qkv = Pointwise(channels, 3 * channels, 1)
        self.proj_out = zero_module(Pointwise(channels, channels, 1))

    def forward(self, x):
        n, c, height, width = x.shape
        # Channels last, as torch's fused attention wants its heads; free where the network runs in that layout.
        tokens = self.norm(x).permute(0, 2, 3, 1).reshape(n, height * width, c)
        qkv = self.qkv(tokens)  # (N, L, 3C)
        if self.new_order:
            q, k, v = qkv.view(n, -1, 3, self.num_heads, c // self.num_heads).unbind(2)
        else:
            q, k, v = qkv.view(n, -1, self.num_heads, 3, c // self.num_heads).unbind(3)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))  # each (N, heads, L, C/heads)
        attended = nn.functional.scaled_dot_product_attention(q, k, v)
        attended = self.proj_out(attended.transpose(1, 2).reshape(n, -1, c))  # (N, L, C)
        return x + attended.view(n, height, width, c).permute(0, 3, 1, 2)
