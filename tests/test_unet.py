"""The semantic UNet: state-dict names, an independent forward pass, SPADE, and what flags do."""

import pytest
import test_nn
import torch
from conftest import normals, tiny_network
from torch.nn import functional as F

from guided_diffusion import InputError, create_model_and_diffusion, model_and_diffusion_defaults
from guided_diffusion.diffusion.nn import AttentionBlock
from guided_diffusion.diffusion.unet import ResBlock, SPADEResBlock

TINY = {"image_size": 32, "num_channels": 32, "channel_mult": "1,2", "num_res_blocks": 1, "num_head_channels": 32}
TINY |= {"attention_resolutions": "16", "num_classes": 5, "resblock_updown": True}
SIZE = (8, 16)  # all tests run pictures of 8x16: the network does not care
LABELS = 6  # 5 classes and the edge plane
PARTS = ("input_blocks", "middle_block", "output_blocks")


def build(device="meta", **flags):
    with torch.device(device):
        return create_model_and_diffusion(**{**model_and_diffusion_defaults(), **TINY, **flags})[0]


def build_awake(**flags):
    return tiny_network(**{"learn_sigma": False, **TINY, **flags})[0]


def inputs(n=2, labels=LABELS, size=SIZE):
    return normals(n, 3, *size), torch.tensor([0.0, 731.0, 5.5])[:n], normals(n, labels, *size, seed=1).sigmoid()


def conv(p, name, x, padding=1, **options):
    return F.conv2d(x, p[f"{name}.weight"], p[f"{name}.bias"], padding=padding, **options)


def naive_spade(p, name, x, y):
    hidden = F.relu(conv(p, f"{name}.mlp_shared.0", F.interpolate(y, size=x.shape[2:], mode="nearest")))
    return F.group_norm(x, 32) * (1 + conv(p, f"{name}.mlp_gamma", hidden)) + conv(p, f"{name}.mlp_beta", hidden)


def naive_block(p, name, x, emb, y, resize=None, scale_shift=True):
    has_spade = f"{name}.in_norm.mlp_shared.0.weight" in p
    first, last = ("in_layers.1", "out_layers.2") if has_spade else ("in_layers.2", "out_layers.3")

    def norm(h, spade_name, plain_name):
        if has_spade:
            return naive_spade(p, f"{name}.{spade_name}", h, y)
        return F.group_norm(h, 32, p[f"{name}.{plain_name}.weight"], p[f"{name}.{plain_name}.bias"])

    h = F.silu(norm(x, "in_norm", "in_layers.0"))
    if resize == "down":
        h, x = F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)
    if resize == "up":
        h, x = F.interpolate(h, scale_factor=2), F.interpolate(x, scale_factor=2)
    h = conv(p, f"{name}.{first}", h)
    e = F.linear(F.silu(emb), p[f"{name}.emb_layers.1.weight"], p[f"{name}.emb_layers.1.bias"])[:, :, None, None]
    if scale_shift:
        scale, shift = e[:, : h.shape[1]], e[:, h.shape[1] :]
        h = norm(h, "out_norm", "out_layers.0") * (1 + scale) + shift
    else:
        h = norm(h + e, "out_norm", "out_layers.0")
    h = conv(p, f"{name}.{last}", F.silu(h))
    if f"{name}.skip_connection.weight" in p:
        x = conv(p, f"{name}.skip_connection", x, 0)
    return x + h


def naive_attention(p, name, x):
    own = {key.removeprefix(f"{name}."): value for key, value in p.items() if key.startswith(f"{name}.")}
    return test_nn.naive_attention(own, x, x.shape[1] // 32)


def naive_unet(p, x, t, y, scale_shift=True):
    """The TINY network, from a state dict of the published names."""
    frequencies = torch.tensor([10000 ** (-k / 16) for k in range(16)])
    emb = torch.cat([torch.cos(t[:, None] * frequencies), torch.sin(t[:, None] * frequencies)], 1)
    emb = F.linear(emb, p["time_embed.0.weight"], p["time_embed.0.bias"])
    emb = F.linear(F.silu(emb), p["time_embed.2.weight"], p["time_embed.2.bias"])

    def block(name, h, resize=None):
        return naive_block(p, name, h, emb, y, resize, scale_shift)

    h0 = conv(p, "input_blocks.0.0", x)
    h1 = block("input_blocks.1.0", h0)
    if "input_blocks.2.0.op.weight" in p:
        h2 = conv(p, "input_blocks.2.0.op", h1, stride=2)
    else:
        h2 = block("input_blocks.2.0", h1, "down")
    h3 = naive_attention(p, "input_blocks.3.1", block("input_blocks.3.0", h2))
    h = block("middle_block.2", naive_attention(p, "middle_block.1", block("middle_block.0", h3)))
    h = naive_attention(p, "output_blocks.0.1", block("output_blocks.0.0", torch.cat([h, h3], 1)))
    h = naive_attention(p, "output_blocks.1.1", block("output_blocks.1.0", torch.cat([h, h2], 1)))
    if "output_blocks.1.2.conv.weight" in p:
        h = conv(p, "output_blocks.1.2.conv", F.interpolate(h, scale_factor=2))
    else:
        h = block("output_blocks.1.2", h, "up")
    h = block("output_blocks.2.0", torch.cat([h, h1], 1))
    h = block("output_blocks.3.0", torch.cat([h, h0], 1))
    return conv(p, "out.2", F.silu(F.group_norm(h, 32, p["out.0.weight"], p["out.0.bias"])))


@pytest.mark.parametrize("places", ["unet", "spadeboth", "enconly"])
@pytest.mark.parametrize("updown, scale_shift", [(True, True), (False, False)])
def test_forward_equals_the_naive_network(updown, scale_shift, places):
    model = build_awake(resblock_updown=updown, use_scale_shift_norm=scale_shift, unet_model=places, learn_sigma=True)
    x, t, y = inputs(size=(10, 6) if updown else SIZE)
    expected = naive_unet(model.state_dict(), x, t, y, scale_shift)
    output = model(x, t, y)
    assert output.shape == (2, 6, *x.shape[2:]) and output.dtype == torch.float32 and expected.std() > 0.05
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    alone = model(x[1:], t[1:], y[1:])
    torch.testing.assert_close(alone, output[1:], rtol=0, atol=1e-5)  # samples in a batch do not mix
    cached = model.cached_modulation(model.label_modulation(y))
    torch.testing.assert_close(model(x, t, cached), output, rtol=0, atol=1e-6)
    needed = sum(tensor.nbytes for pair in cached.pairs for tensor in pair)
    assert model.modulation_bytes(2, *x.shape[2:]) == needed and len(cached.pairs) == len(model.spades)


def test_output_and_every_residual_branch_start_at_zero():
    model = build("cpu", learn_sigma=True)
    assert not model(*inputs()).any()
    for module in model.modules():
        if isinstance(module, ResBlock):
            assert not module.out_layers[-1].weight.any() and not module.out_layers[-1].bias.any()
        if isinstance(module, AttentionBlock):
            assert not module.proj_out.weight.any()


@pytest.mark.parametrize("places, expected", [("unet", PARTS[1:]), ("spadeboth", PARTS), ("enconly", PARTS[:2])])
@pytest.mark.parametrize("updown", [True, False])
def test_unet_model_says_where_spade_blocks_are(places, expected, updown):
    model = build(unet_model=places, resblock_updown=updown)
    for part in PARTS:
        blocks = [module for module in getattr(model, part).modules() if isinstance(module, ResBlock)]
        assert {isinstance(block, SPADEResBlock) for block in blocks} == {part in expected}


def test_use_checkpoint_changes_neither_output_nor_gradients():
    results = []
    for use_checkpoint in (False, True):
        model, calls = build_awake(use_checkpoint=use_checkpoint, dropout=0.3).train(), []
        for module in model.modules():
            if isinstance(module, ResBlock):
                module.emb_layers.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        torch.manual_seed(3)  # the same dropout
        output = model(*inputs())
        forward = len(calls)
        output.square().mean().backward()
        assert len(calls) == (2 if use_checkpoint else 1) * forward  # every block was recomputed
        results.append([output.detach(), *(p.grad for p in model.parameters())])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)
    assert all(gradient.any() for gradient in results[0])


@pytest.mark.parametrize(
    "flags, encoder, decoder",
    [
        ({"num_head_channels": -1, "num_heads": 4}, 4, 4),
        ({"num_head_channels": -1, "num_heads": 4, "num_heads_upsample": 2}, 4, 2),
        ({"num_head_channels": 16, "num_heads": 8, "num_heads_upsample": 2}, 4, 4),  # 64 / 16
    ],
)
def test_num_heads_of_encoder_and_decoder(flags, encoder, decoder):
    model, heads = build(**flags, use_new_attention_order=True), []
    for part in PARTS:
        blocks = [module for module in getattr(model, part).modules() if isinstance(module, AttentionBlock)]
        heads.append({(block.num_heads, block.new_order) for block in blocks})
    assert heads == [{(encoder, True)}, {(encoder, True)}, {(decoder, True)}]


def test_attention_resolutions_are_image_sizes():
    flags = {"image_size": 64, "channel_mult": "1,1,1,1", "attention_resolutions": "32,8"}  # rates 2 and 8
    names = [name for name, module in build(**flags).named_modules() if isinstance(module, AttentionBlock)]
    encoder, decoder = ["input_blocks.3.1", "input_blocks.7.1"], [f"output_blocks.{k}.1" for k in (0, 1, 4, 5)]
    assert names == [*encoder, "middle_block.1", *decoder]


@pytest.mark.parametrize(
    "image_size, mults",
    [(512, (0.5, 1, 1, 2, 2, 4, 4)), (256, (1, 1, 2, 2, 4, 4)), (128, (1, 1, 2, 3, 4)), (64, (1, 2, 3, 4))],
)
def test_channel_mult_defaults(image_size, mults):
    model = build(image_size=image_size, channel_mult="", num_channels=64, resblock_updown=False)
    widths = [model.input_blocks[2 * k + 1][0].in_layers[-1].out_channels for k in range(len(mults))]
    assert widths == [int(64 * mult) for mult in mults] and model.downsampling == 2 ** (len(mults) - 1)


@pytest.mark.parametrize("flags, planes", [({}, 6), ({"no_instance": True}, 5), ({"one_hot_label": False}, 2)])
def test_conditioning_planes(flags, planes):
    assert build_awake(**flags)(*inputs(1, labels=planes)).shape == (1, 3, *SIZE)


@pytest.mark.parametrize(
    "flags, words",
    [
        ({"num_channels": 48}, r"--num_channels 48: levels \[48, 96\].*multiple of 32"),
        ({"channel_mult": "1,x"}, "--channel_mult 1,x"),
        ({"image_size": 96, "channel_mult": ""}, "--image_size 96.*--channel_mult"),
        ({"num_head_channels": 48}, "--num_head_channels 48 does not divide.* 64 channels"),
        ({"num_head_channels": 0}, "--num_head_channels 0"),
        ({"num_head_channels": -1, "num_heads": 3}, "--num_heads 3 does not divide"),
        ({"class_cond": False}, "--class_cond False"),
    ],
)
def test_flags_that_do_not_fit(flags, words):
    with pytest.raises(InputError, match=words):
        build(**flags)


FOUND, DIFFER = r"expected \(N, 6, H, W\), found \(2, 5, 8, 16\)", "differ in N, H or W"
SHAPES = [(SIZE, (2, 5, *SIZE), FOUND), (SIZE, (1, 6, *SIZE), DIFFER), (SIZE, (2, 6, 16, 16), DIFFER)]
SHAPES += [((18, 32), (2, 6, 18, 32), "18x32.*multiples of 4"), ((8, 9), (2, 6, 8, 9), "8x9.*multiples of 4")]


@pytest.mark.parametrize("size, labels, words", SHAPES)
def test_shapes_that_do_not_fit(size, labels, words):
    x, t, _ = inputs(size=size)
    with pytest.raises(InputError, match=words):
        build("cpu", channel_mult="1,1,1")(x, t, torch.zeros(labels))
