"""The semantic UNet of SDM (arXiv 2207.00050): a guided-diffusion UNet whose decoder is modulated by the label map.

Parameter names are those of the published state dicts of guided-diffusion, SDM, GESCO and Diff-GO-n.
"""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..console import InputError
from .nn import AttentionBlock, Downsample, Upsample, normalization, timestep_embedding, zero_module
from .spade import CachedModulation, GuidedModulation, LabelModulation, NullModulation, SPADEGroupNorm

DEFAULT_CHANNEL_MULT = {512: (0.5, 1, 1, 2, 2, 4, 4), 256: (1, 1, 2, 2, 4, 4), 128: (1, 1, 2, 3, 4), 64: (1, 2, 3, 4)}

# Which parts carry SPADE blocks: (encoder, decoder). The middle always does.
SPADE_PLACES = {"unet": (False, True), "spadeboth": (True, True), "enconly": (True, False)}


class ResBlock(nn.Module):
    """Residual block with GroupNorm (guided diffusion, arXiv 2105.05233, app. A).

    :param channels, out_channels: widths, multiples of 32.
    :param emb_channels: width of the time embedding.
    :param stride: downsampling rate of the block's input.
    :param up, down: resample by 2 inside the block.
    :param scale_shift: the time embedding scales and shifts the second norm; otherwise it is added.
    """

    def __init__(
        self,
        channels,
        out_channels,
        emb_channels,
        *,
        dropout,
        scale_shift,
        label_channels,
        stride,
        up=False,
        down=False,
    ):
        super().__init__()
        self.scale_shift, self.updown = scale_shift, up or down
        self.resample = Upsample(channels, False) if up else Downsample(channels, False) if down else nn.Identity()
        out_stride = stride // 2 if up else stride * 2 if down else stride
        self._add_norms(channels, out_channels, label_channels, stride, out_stride, dropout)
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, (2 if scale_shift else 1) * out_channels))
        same = channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(channels, out_channels, 1)

    def _add_norms(self, channels, out_channels, label_channels, stride, out_stride, dropout):
        del label_channels, stride, out_stride  # a plain block does not see the label map
        conv_in = nn.Conv2d(channels, out_channels, 3, padding=1)
        conv_out = zero_module(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.in_layers = nn.Sequential(normalization(channels), nn.SiLU(), conv_in)
        self.out_layers = nn.Sequential(normalization(out_channels), nn.SiLU(), nn.Dropout(dropout), conv_out)

    def norm_in(self, x, maps):
        return self.in_layers[:2](x)

    def norm_out(self, h, maps):
        return self.out_layers[0](h)

    def forward(self, x, emb, maps):
        h = self.resample(self.norm_in(x, maps))
        x = self.resample(x)
        h = self.in_layers[-1](h)  # (N, out_channels, H', W')
        emb = self.emb_layers(emb)[..., None, None]
        if self.scale_shift:
            h = self.norm_out(h, maps)
            scale, shift = emb.to(h.dtype).chunk(2, dim=1)
            h = torch.addcmul(shift, h, 1 + scale)
        else:
            h = self.norm_out(h + emb.to(h.dtype), maps)
        return self.skip_connection(x) + self.out_layers[-3:](h)


class SPADEResBlock(ResBlock):
    """Residual block whose two norms are SPADE norms (SDM, section 3.2)."""

    def _add_norms(self, channels, out_channels, label_channels, stride, out_stride, dropout):
        conv_in = nn.Conv2d(channels, out_channels, 3, padding=1)
        conv_out = zero_module(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.in_norm = SPADEGroupNorm(channels, label_channels, stride)
        self.in_layers = nn.Sequential(nn.SiLU(), conv_in)
        self.out_norm = SPADEGroupNorm(out_channels, label_channels, out_stride)
        self.out_layers = nn.Sequential(nn.SiLU(), nn.Dropout(dropout), conv_out)

    def norm_in(self, x, maps):
        return self.in_layers[0](self.in_norm(x, maps))

    def norm_out(self, h, maps):
        return self.out_norm(h, maps)


class TimestepSequential(nn.Sequential):
    """A sequence that hands the time embedding and the label maps to the blocks that take them."""

    def forward(self, x, emb, maps, use_checkpoint):
        for layer in self:
            heavy = isinstance(layer, (ResBlock, AttentionBlock))
            arguments = (x, emb, maps) if isinstance(layer, ResBlock) else (x,)
            if heavy and use_checkpoint and torch.is_grad_enabled():
                x = checkpoint(layer, *arguments, use_reentrant=False)
            else:
                x = layer(*arguments)
        return x


class _Blocks:
    """Makes the blocks of one network: what they share is said once."""

    def __init__(self, emb_channels, label_channels, dropout, scale_shift, updown, num_head_channels, new_order):
        self.shared = {"dropout": dropout, "scale_shift": scale_shift, "label_channels": label_channels}
        self.emb_channels, self.updown = emb_channels, updown
        self.num_head_channels, self.new_order = num_head_channels, new_order

    def residual(self, spade, channels, out_channels, stride, **resample):
        kind = SPADEResBlock if spade else ResBlock
        return kind(channels, out_channels, self.emb_channels, stride=stride, **self.shared, **resample)

    def attention(self, channels, num_heads):
        return AttentionBlock(channels, _head_count(channels, num_heads, self.num_head_channels), self.new_order)

    def down(self, spade, channels, stride):
        return (
            self.residual(spade, channels, channels, stride, down=True) if self.updown else Downsample(channels, True)
        )

    def up(self, spade, channels, stride):
        return self.residual(spade, channels, channels, stride, up=True) if self.updown else Upsample(channels, True)


class UNetModel(nn.Module):
    """Noise predictor epsilon_theta(x_t, t, m).

    :param in_channels, out_channels: 3, and 3 or 6 (learned variance).
    :param model_channels: base width; every level width `mult * model_channels` must be a multiple of 32.
    :param label_channels: planes of the conditioning y.
    :param attention_strides: downsampling rates at which attention runs.
    :param channel_mult: width multiplier of each level; each level but the last halves the size.
    :param num_head_channels: width of one attention head; -1 uses `num_heads` (`num_heads_upsample` in the decoder).
    :param places: "unet", "spadeboth" or "enconly".
    """

    def __init__(
        self,
        *,
        model_channels,
        out_channels,
        label_channels,
        num_res_blocks,
        attention_strides,
        channel_mult,
        in_channels=3,
        dropout=0.0,
        num_heads=4,
        num_heads_upsample=-1,
        num_head_channels=-1,
        use_scale_shift_norm=True,
        resblock_updown=False,
        use_new_attention_order=False,
        use_checkpoint=False,
        places="unet",
    ):
        super().__init__()
        self.model_channels, self.label_channels, self.use_checkpoint = model_channels, label_channels, use_checkpoint
        self.downsampling = 2 ** (len(channel_mult) - 1)
        widths = [_level_width(mult, model_channels) for mult in channel_mult]
        emb_channels = 4 * model_channels
        blocks = _Blocks(
            emb_channels,
            label_channels,
            dropout,
            use_scale_shift_norm,
            resblock_updown,
            num_head_channels,
            use_new_attention_order,
        )
        spade_encoder, spade_decoder = SPADE_PLACES[places]
        self.time_embed = nn.Sequential(
            nn.Linear(model_channels, emb_channels), nn.SiLU(), nn.Linear(emb_channels, emb_channels)
        )
        stem = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        encoder, skips = _encoder(blocks, widths, num_res_blocks, attention_strides, spade_encoder, num_heads)
        self.input_blocks = nn.ModuleList([TimestepSequential(stem), *encoder])
        deepest = widths[-1]
        self.middle_block = TimestepSequential(
            blocks.residual(True, deepest, deepest, self.downsampling),
            blocks.attention(deepest, num_heads),
            blocks.residual(True, deepest, deepest, self.downsampling),
        )
        heads = num_heads if num_heads_upsample == -1 else num_heads_upsample
        decoder = _decoder(blocks, widths, skips, num_res_blocks, attention_strides, spade_decoder, heads)
        self.output_blocks = nn.ModuleList(decoder)
        out_conv = zero_module(nn.Conv2d(widths[0], out_channels, 3, padding=1))
        self.out = nn.Sequential(normalization(widths[0]), nn.SiLU(), out_conv)
        self.spades = [module for module in self.modules() if isinstance(module, SPADEGroupNorm)]
        for number, spade in enumerate(self.spades):
            spade.number = number
        self.encoder_sees_labels = spade_encoder

    def cached_modulation(self, maps):
        """Return every SPADE layer's scale and shift: all that the network computes from the label map alone.

        :param maps: (N, C, H, W) conditioning y, or what `label_modulation` or `null_modulation` gives.
        :return: `CachedModulation`, which `forward` takes in place of y, to be reused over a whole reverse chain.
        """
        maps = self.label_modulation(maps) if maps is None or torch.is_tensor(maps) else maps
        return CachedModulation([maps.scale_shift(spade) for spade in self.spades])

    def null_modulation(self, y):
        """Return the `NullModulation` of y's size."""
        self._check_labels(y)
        return NullModulation(y)

    def label_modulation(self, y):
        """Return `LabelModulation` of y (N, C, H, W), which `forward` takes in place of y: computed at every call."""
        self._check_labels(y)
        return LabelModulation(y)

    def modulation_bytes(self, n, height, width, itemsize=4):
        """Return the memory, in bytes, that `cached_modulation` takes for n pictures, with `itemsize` bytes for a number."""
        elements = sum(2 * spade.mlp_gamma.out_channels / spade.stride**2 for spade in self.spades)
        return int(itemsize * n * height * width * elements)

    def forward(self, x, t, y):
        """Predict the noise (or x_0, or v), and the variance where it is learned.

        :param x: (N, 3, H, W) noisy picture; the downsampling must divide H and W.
        :param t: (N,) original timesteps, 0...999 for 1000 steps; may be fractional.
        :param y: (N, C, H, W) conditioning, or the result of `cached_modulation(y)`, or `GuidedModulation`.
        :return: (N, 3 or 6, H, W) float32; with `GuidedModulation` (2N, ...), the conditional predictions first.
        """
        check_size(x.shape[2], x.shape[3], self.downsampling)
        if y is None or torch.is_tensor(y):
            self._check_labels(y, x)
        maps = LabelModulation(y) if torch.is_tensor(y) else y
        embedded = timestep_embedding(t, self.model_channels).to(self.time_embed[0].weight.dtype)
        emb = self.time_embed(embedded)  # (N, emb_channels)
        h, skips = x, []
        twice = isinstance(maps, GuidedModulation)
        if twice and self.encoder_sees_labels:
            h, emb, twice = _twice(h), _twice(emb), False
        for stage in self.input_blocks:
            h = stage(h, emb, maps, self.use_checkpoint)
            skips.append(h)
        if twice:  # an encoder without SPADE gives both halves of guidance the same
            h, emb = _twice(h), _twice(emb)
        h = self.middle_block(h, emb, maps, self.use_checkpoint)
        for stage in self.output_blocks:
            skip = skips.pop()
            h = stage(torch.cat([h, _twice(skip) if twice else skip], dim=1), emb, maps, self.use_checkpoint)
        return self.out(h).float()

    def _check_labels(self, y, x=None):
        if y is None or y.ndim != 4 or y.shape[1] != self.label_channels:
            found = "None" if y is None else tuple(y.shape)
            raise InputError(f"conditioning y: expected (N, {self.label_channels}, H, W), found {found}")
        if x is not None and (y.shape[0], *y.shape[2:]) != (x.shape[0], *x.shape[2:]):
            raise InputError(f"conditioning y {tuple(y.shape)} and picture {tuple(x.shape)} differ in N, H or W")


def _encoder(blocks, widths, num_res_blocks, attention_strides, spade, num_heads):
    """Return the encoder's stages after the first convolution, and the widths of all skip connections."""
    stages, channels, stride = [], widths[0], 1
    skips = [channels]
    for level, width in enumerate(widths):
        for _ in range(num_res_blocks):
            layers = [blocks.residual(spade, channels, width, stride)]
            channels = width
            if stride in attention_strides:
                layers.append(blocks.attention(channels, num_heads))
            stages.append(TimestepSequential(*layers))
            skips.append(channels)
        if level != len(widths) - 1:
            stages.append(TimestepSequential(blocks.down(spade, channels, stride)))
            skips.append(channels)
            stride *= 2
    return stages, skips


def _decoder(blocks, widths, skips, num_res_blocks, attention_strides, spade, num_heads):
    """Return the decoder's stages; each takes one skip connection, the last first."""
    stages, skips, channels, stride = [], list(skips), widths[-1], 2 ** (len(widths) - 1)
    for level, width in reversed(list(enumerate(widths))):
        for i in range(num_res_blocks + 1):
            layers = [blocks.residual(spade, channels + skips.pop(), width, stride)]
            channels = width
            if stride in attention_strides:
                layers.append(blocks.attention(channels, num_heads))
            if level and i == num_res_blocks:
                layers.append(blocks.up(spade, channels, stride))
                stride //= 2
            stages.append(TimestepSequential(*layers))
    return stages


def _twice(x):
    return torch.cat([x, x])  # not `repeat`, which forgets the memory layout


def check_size(height, width, divisor):
    """Raise InputError unless `divisor`, the network's total downsampling, divides both sides of the picture."""
    if height % divisor or width % divisor:
        nearest = [max(divisor, round(side / divisor) * divisor) for side in (height, width)]
        raise InputError(
            f"picture size {height}x{width}: this network halves {divisor.bit_length() - 1} times, so both sides must be"
            f" multiples of {divisor}, for example {nearest[0]}x{nearest[1]}; change --image_size or --channel_mult"
        )


def _level_width(mult, model_channels):
    width = int(mult * model_channels)
    if width < 32 or width % 32:
        raise InputError(
            f"--num_channels {model_channels} with channel multiplier {mult:g} makes a level {width} wide;"
            " every level must be a multiple of 32"
        )
    return width


def _head_count(channels, num_heads, num_head_channels):
    size = num_head_channels if num_head_channels != -1 else None
    if size is None and num_heads > 0 and channels % num_heads == 0:
        return num_heads
    if size and size > 0 and channels % size == 0:
        return channels // size
    flag = f"--num_head_channels {size}" if size is not None else f"--num_heads {num_heads}"
    raise InputError(f"{flag} does not divide an attention layer of {channels} channels")
