"""The semantic UNet of SDM (arXiv 2207.00050): a guided-diffusion UNet whose decoder is modulated by the label map.

Parameter names are those of the published state dicts of guided-diffusion, SDM, GESCO and Diff-GO-n.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..console import InputError
from .nn import AttentionBlock, Downsample, Upsample, normalization, timestep_embedding, zero_module
from .spade import CachedModulation, GuidedModulation, LabelModulation, Modulation, SPADEGroupNorm

DEFAULT_CHANNEL_MULT = {512: (0.5, 1, 1, 2, 2, 4, 4), 256: (1, 1, 2, 2, 4, 4), 128: (1, 1, 2, 3, 4), 64: (1, 2, 3, 4)}
SPADE_PLACES = {"unet": (False, True), "spadeboth": (True, True), "enconly": (True, False)}  # in (encoder, decoder)


class ResBlock(nn.Module):
    """Residual block with GroupNorm (guided diffusion, arXiv 2105.05233, app. A).

    :param channels, out_channels: widths, multiples of 32.
    :param stride: downsampling rate of the block's input.
    :param resample: "up" or "down" (by 2, inside the block) or "".
    :param emb_channels: width of the time embedding. :param spade: of y, and hidden; `SPADEResBlock` alone sees them.
    :param scale_shift: the time embedding scales and shifts the second norm; otherwise it is added.
    """

    def __init__(self, channels, out_channels, stride, resample, emb_channels, spade, dropout, scale_shift):
        super().__init__()
        self.scale_shift, self.resample, out_stride = scale_shift, nn.Identity(), stride
        if resample == "up":
            self.resample, out_stride = Upsample(channels, False), stride // 2
        if resample == "down":
            self.resample, out_stride = Downsample(channels, False), stride * 2
        conv_in = nn.Conv2d(channels, out_channels, 3, padding=1)
        conv_out = zero_module(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self._add_layers(conv_in, conv_out, nn.Dropout(dropout), spade, (stride, out_stride))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, (2 if scale_shift else 1) * out_channels))
        self.skip_connection = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)

    def _add_layers(self, conv_in, conv_out, dropout, spade, strides):
        self.in_layers = nn.Sequential(normalization(conv_in.in_channels), nn.SiLU(), conv_in)
        self.out_layers = nn.Sequential(normalization(conv_out.in_channels), nn.SiLU(), dropout, conv_out)

    def norm_in(self, x, modulation):
        return self.in_layers[0](x)

    def norm_out(self, h, modulation):
        return self.out_layers[0](h)

    def forward(self, x, emb, modulation):
        h = self.in_layers[-2](self.norm_in(x, modulation))
        h = self.in_layers[-1](self.resample(h))  # (N, out_channels, H', W')
        emb = self.emb_layers(emb)[..., None, None]
        if self.scale_shift:
            h = self.norm_out(h, modulation)
            scale, shift = emb.to(h.dtype).chunk(2, dim=1)
            h = torch.addcmul(shift, h, 1 + scale)
        else:
            h = self.norm_out(h + emb.to(h.dtype), modulation)
        return self.skip_connection(self.resample(x)) + self.out_layers[-3:](h)


class SPADEResBlock(ResBlock):
    """Residual block whose two norms are SPADE norms (SDM, section 3.2)."""

    def _add_layers(self, conv_in, conv_out, dropout, spade, strides):
        self.in_norm = SPADEGroupNorm(conv_in.in_channels, spade[0], strides[0], spade[1])
        self.in_layers = nn.Sequential(nn.SiLU(), conv_in)
        self.out_norm = SPADEGroupNorm(conv_out.in_channels, spade[0], strides[1], spade[1])
        self.out_layers = nn.Sequential(nn.SiLU(), dropout, conv_out)

    def norm_in(self, x, modulation):
        return self.in_norm(x, modulation)

    def norm_out(self, h, modulation):
        return self.out_norm(h, modulation)


class TimestepSequential(nn.Sequential):
    """A sequence that hands the time embedding and the modulation to the blocks that take them."""

    def forward(self, x, emb, modulation, use_checkpoint):
        for layer in self:
            arguments = (x, emb, modulation) if isinstance(layer, ResBlock) else (x,)
            if use_checkpoint and torch.is_grad_enabled() and isinstance(layer, (ResBlock, AttentionBlock)):
                x = checkpoint(layer, *arguments, use_reentrant=False)
            else:
                x = layer(*arguments)
        return x


@dataclass(frozen=True)
class _Blocks:
    """The blocks of one network: what they share stands here, once.

    :param attention_strides: downsampling rates at which attention runs.
    :param num_head_channels: width of one attention head; -1: `num_heads` heads (`num_heads_upsample` in the decoder).
    """

    emb_channels: int
    label_channels: int
    num_res_blocks: int
    attention_strides: set
    spade_channels: int = 128
    dropout: float = 0.0
    num_heads: int = 4
    num_heads_upsample: int = -1
    num_head_channels: int = -1
    use_scale_shift_norm: bool = True
    resblock_updown: bool = False
    use_new_attention_order: bool = False

    def residual(self, spade, channels, out_channels, stride, resample=""):
        kind = SPADEResBlock if spade else ResBlock
        widths = self.label_channels, self.spade_channels
        shared = (self.emb_channels, widths, self.dropout, self.use_scale_shift_norm)
        return kind(channels, out_channels, stride, resample, *shared)

    def attention(self, channels, num_heads):
        by_width = self.num_head_channels != -1
        flag, value = ("num_head_channels", self.num_head_channels) if by_width else ("num_heads", num_heads)
        if value < 1 or channels % value:
            raise InputError(f"--{flag} {value} does not divide an attention layer of {channels} channels")
        return AttentionBlock(channels, channels // value if by_width else value, self.use_new_attention_order)

    def layers(self, spade, channels, width, stride, num_heads):
        """Return a residual block and, where the picture is small enough, attention."""
        layers = [self.residual(spade, channels, width, stride)]
        return [*layers, self.attention(width, num_heads)] if stride in self.attention_strides else layers

    def resampling(self, spade, channels, stride, direction):
        if self.resblock_updown:
            return self.residual(spade, channels, channels, stride, direction)
        return Upsample(channels, True) if direction == "up" else Downsample(channels, True)

    def encoder(self, spade, widths):
        """Return the stages after the first convolution, and the widths of all skip connections."""
        stages, skips, stride = [], [widths[0]], 1
        for level, width in enumerate(widths):
            for _ in range(self.num_res_blocks):
                stages.append(self.layers(spade, skips[-1], width, stride, self.num_heads))
                skips.append(width)
            if level != len(widths) - 1:
                stages.append([self.resampling(spade, width, stride, "down")])
                skips.append(width)
                stride *= 2
        return stages, skips

    def decoder(self, spade, widths, skips):
        """Return the stages; each takes one skip connection, the last first."""
        num_heads = self.num_heads if self.num_heads_upsample == -1 else self.num_heads_upsample
        stages, channels, stride = [], widths[-1], 2 ** (len(widths) - 1)
        for level, width in reversed(list(enumerate(widths))):
            for _ in range(self.num_res_blocks + 1):
                stages.append(self.layers(spade, channels + skips.pop(), width, stride, num_heads))
                channels = width
            if level:
                stages[-1].append(self.resampling(spade, channels, stride, "up"))
                stride //= 2
        return stages


class UNetModel(nn.Module):
    """Noise predictor epsilon_theta(x_t, t, m).

    :param model_channels: base width; every level width `mult * model_channels` must be a multiple of 32.
    :param out_channels: 3, or 6 with a learned variance.
    :param label_channels, layer_channels: planes of the conditioning y: those that SPADE sees, and behind them those of
        a colour layer, which join the noisy picture at the network's input.
    :param channel_mult: width multiplier of each level; each level but the last halves the size.
    :param places: where SPADE blocks are, beside the middle: "unet" (decoder), "spadeboth" or "enconly" (encoder).
    :param options: the other fields of `_Blocks`.
    """

    def __init__(
        self,
        model_channels,
        out_channels,
        label_channels,
        channel_mult,
        places="unet",
        use_checkpoint=False,
        layer_channels=0,
        **options,
    ):
        super().__init__()
        self.model_channels, self.use_checkpoint = model_channels, use_checkpoint
        self.label_channels, self.layer_channels = label_channels, layer_channels
        self.downsampling = 2 ** (len(channel_mult) - 1)
        self.encoder_sees_labels, decoder_sees_labels = SPADE_PLACES[places]
        widths = [int(mult * model_channels) for mult in channel_mult]
        if any(width < 32 or width % 32 for width in widths):
            raise InputError(f"--num_channels {model_channels}: levels {widths} wide; each must be a multiple of 32")
        emb_channels, deepest = 4 * model_channels, widths[-1]
        blocks = _Blocks(emb_channels, label_channels, **options)
        linear = nn.Linear(model_channels, emb_channels)
        self.time_embed = nn.Sequential(linear, nn.SiLU(), nn.Linear(emb_channels, emb_channels))
        stem = nn.Conv2d(3 + layer_channels, widths[0], 3, padding=1)
        stages, skips = blocks.encoder(self.encoder_sees_labels, widths)
        self.input_blocks = nn.ModuleList(TimestepSequential(*layers) for layers in ([stem], *stages))
        self.middle_block = TimestepSequential(
            blocks.residual(True, deepest, deepest, self.downsampling),
            blocks.attention(deepest, blocks.num_heads),
            blocks.residual(True, deepest, deepest, self.downsampling),
        )
        stages = blocks.decoder(decoder_sees_labels, widths, skips)
        self.output_blocks = nn.ModuleList(TimestepSequential(*layers) for layers in stages)
        out_conv = zero_module(nn.Conv2d(widths[0], out_channels, 3, padding=1))
        self.out = nn.Sequential(normalization(widths[0]), nn.SiLU(), out_conv)
        self.spades = [module for module in self.modules() if isinstance(module, SPADEGroupNorm)]
        for number, spade in enumerate(self.spades):
            spade.number = number
        self.strides = sorted({spade.stride for spade in self.spades})

    def label_modulation(self, y, x=None):
        """Return the `LabelModulation` of y (N, C, H, W), computed at every call; x: pictures that y must fit."""
        shape, channels = tuple(getattr(y, "shape", ())), self.label_channels + self.layer_channels
        if len(shape) != 4 or shape[1] != channels:
            raise InputError(f"conditioning y: expected (N, {channels}, H, W), found {shape}")
        if x is not None and (y.shape[0], *y.shape[2:]) != (x.shape[0], *x.shape[2:]):
            raise InputError(f"conditioning y {tuple(y.shape)} and picture {tuple(x.shape)} differ in N, H or W")
        return LabelModulation(y[:, : self.label_channels], self.strides)

    def cached_modulation(self, modulation):
        """Return the `CachedModulation` of a modulation, for a whole reverse chain."""
        return CachedModulation([modulation.scale_shift(spade) for spade in self.spades])

    def modulation_bytes(self, n, height, width, itemsize=4):
        """Return the memory of a `CachedModulation` for n pictures, in bytes, with `itemsize` bytes for a number."""
        elements = sum(2 * spade.mlp_gamma.out_channels / spade.stride**2 for spade in self.spades)
        return int(itemsize * n * height * width * elements)

    def forward(self, x, t, y):
        """Predict the noise (or x_0, or v), and the variance where it is learned.

        :param x: (N, 3, H, W) noisy picture; the downsampling must divide H and W.
        :param t: (N,) original timesteps, 0...999 for 1000 steps; may be fractional.
        :param y: (N, C, H, W) conditioning, or a `Modulation` in its place; x then has the colour layer's planes, too.
        :return: (N, 3 or 6, H, W) float32; with `GuidedModulation` (2N, ...), the conditional predictions first.
        """
        check_size(*x.shape[2:], self.downsampling)
        modulation = y if isinstance(y, Modulation) else self.label_modulation(y, x)
        if modulation is not y and self.layer_channels:
            x = torch.cat([x, y[:, self.label_channels :]], dim=1)
        embedded = timestep_embedding(t, self.model_channels).to(self.time_embed[0].weight.dtype)
        h, emb, skips = x, self.time_embed(embedded), []  # emb: (N, emb_channels)
        twice = isinstance(modulation, GuidedModulation)
        if twice and self.encoder_sees_labels:
            h, emb, twice = _twice(h), _twice(emb), False
        for stage in self.input_blocks:
            h = stage(h, emb, modulation, self.use_checkpoint)
            skips.append(h)
        if twice:  # an encoder without SPADE gives both halves of guidance the same
            h, emb = _twice(h), _twice(emb)
        h = self.middle_block(h, emb, modulation, self.use_checkpoint)
        for stage in self.output_blocks:
            skip = _twice(skips.pop()) if twice else skips.pop()
            h = stage(torch.cat([h, skip], dim=1), emb, modulation, self.use_checkpoint)
        return self.out(h).float()


def _twice(x):
    return torch.cat([x, x])  # not `repeat`, which forgets the memory layout


def check_size(height, width, divisor):
    """Raise InputError unless `divisor`, the network's total downsampling, divides both sides of the picture."""
    if height % divisor or width % divisor:
        needed = f"both sides must be multiples of {divisor}; change --image_size or --channel_mult"
        raise InputError(f"picture size {height}x{width}: {needed}")
