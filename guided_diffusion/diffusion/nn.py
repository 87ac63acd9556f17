"""Small network parts shared by the UNet."""

import math

import torch
from torch import nn


def timestep_embedding(timesteps, dim, max_period=10000):
    """Sinusoidal embedding, cosines first (Vaswani et al. 2017, in the order that guided-diffusion weights expect).

    :param timesteps: (N,) original timesteps; may be fractional.
    :param dim: width of the embedding; an odd width gets one zero column.
    :return: (N, dim) float32 in [-1, 1].
    """
    half = dim // 2
    frequencies = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32, device=timesteps.device) / half)
    angles = timesteps[:, None].float() * frequencies  # (N, half)
    embedding = torch.cat([angles.cos(), angles.sin()], dim=-1)
    return nn.functional.pad(embedding, (0, dim % 2))


def zero_module(module):
    """Zero all parameters, so that a residual branch starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def normalization(channels):
    """GroupNorm with the 32 groups of the guided-diffusion family."""
    return nn.GroupNorm(32, channels)


class Upsample(nn.Module):
    """Double both sides by nearest neighbour, then an optional 3x3 convolution.

    :param channels: width; the convolution keeps it.
    """

    def __init__(self, channels, use_conv):
        super().__init__()
        if use_conv:
            self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.use_conv = use_conv

    def forward(self, x):
        x = nn.functional.interpolate(x, scale_factor=2, mode="nearest")  # (N, C, 2H, 2W)
        return self.conv(x) if self.use_conv else x


class Downsample(nn.Module):
    """Halve both sides, by a strided 3x3 convolution or by 2x2 averages.

    :param channels: width; the convolution keeps it.
    """

    def __init__(self, channels, use_conv):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1) if use_conv else nn.AvgPool2d(2)

    def forward(self, x):
        return self.op(x)  # (N, C, H/2, W/2)


class AttentionBlock(nn.Module):
    """Multi-head self-attention over all positions, with a residual.

    :param channels: width; `num_heads` must divide it.
    :param new_order: split q, k, v before the heads. The legacy order, heads first, is what published weights use.
    """

    def __init__(self, channels, num_heads, new_order=False):
        super().__init__()
        self.num_heads, self.new_order = num_heads, new_order
        self.norm = normalization(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = zero_module(nn.Conv1d(channels, channels, 1))

    def forward(self, x):
        n, c, *size = x.shape
        flat = x.reshape(n, c, -1)  # (N, C, L)
        qkv = self.qkv(self.norm(flat))  # (N, 3C, L)
        if self.new_order:
            qkv = qkv.view(n, 3, self.num_heads, c // self.num_heads, -1).transpose(1, 2)
        else:
            qkv = qkv.view(n, self.num_heads, 3, c // self.num_heads, -1)
        q, k, v = qkv.transpose(-1, -2).unbind(2)  # each (N, heads, L, C/heads)
        attended = nn.functional.scaled_dot_product_attention(q, k, v)
        attended = attended.transpose(-1, -2).reshape(n, c, -1)  # (N, C, L)
        return (flat + self.proj_out(attended)).view(n, c, *size)
