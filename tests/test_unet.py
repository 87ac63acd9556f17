"""The semantic UNet: state-dict names, an independent forward pass, SPADE, and what flags do."""

import math

import pytest
import torch
from torch.nn import functional as F

from guided_diffusion import InputError, create_model_and_diffusion, model_and_diffusion_defaults
from guided_diffusion.diffusion.nn import AttentionBlock
from guided_diffusion.diffusion.spade import LabelModulation, SPADEGroupNorm
from guided_diffusion.diffusion.unet import ResBlock, SPADEResBlock, check_size

TINY = {
    "image_size": 32,
    "num_channels": 32,
    "channel_mult": "1,2",
    "num_res_blocks": 1,
    "num_head_channels": 32,
    "attention_resolutions": "16",
    "num_classes": 5,
    "resblock_updown": True,
}
SIZE = (8, 16)  # all tests run pictures of 8x16: the network does not care
LABELS = 6  # 5 classes and the edge plane


def build(**flags):
    return create_model_and_diffusion(**{**model_and_diffusion_defaults(), **TINY, **flags})[0]


def build_on_meta(**flags):
    with torch.device("meta"):
        return build(**flags)


def build_awake(**flags):
    """A network whose zero-initialised layers have values too, in evaluation mode."""
    torch.manual_seed(0)
    model = build(**flags).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05)
    return model


def inputs(n=2, labels=LABELS, size=SIZE):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 3, *size, generator=generator)
    y = torch.rand(n, labels, *size, generator=generator)
    return x, torch.tensor([0.0, 731.0, 5.5, 999.0])[:n], y


@torch.no_grad()
def run(model, *arguments):
    return model(*arguments)


# -- names and shapes -------------------------------------------------------------------------------------------------


def conv(name, inside, outside, *kernel):
    return {f"{name}.weight": (outside, inside, *kernel), f"{name}.bias": (outside,)}


def affine(name, width):
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def plain_block(name, inside, outside, emb=128):
    keys = affine(f"{name}.in_layers.0", inside) | conv(f"{name}.in_layers.2", inside, outside, 3, 3)
    keys |= conv(f"{name}.emb_layers.1", emb, 2 * outside)
    keys |= affine(f"{name}.out_layers.0", outside) | conv(f"{name}.out_layers.3", outside, outside, 3, 3)
    return keys | (conv(f"{name}.skip_connection", inside, outside, 1, 1) if inside != outside else {})


def spade(name, width):
    keys = conv(f"{name}.mlp_shared.0", LABELS, 128, 3, 3)
    return keys | conv(f"{name}.mlp_gamma", 128, width, 3, 3) | conv(f"{name}.mlp_beta", 128, width, 3, 3)


def spade_block(name, inside, outside, emb=128):
    keys = spade(f"{name}.in_norm", inside) | conv(f"{name}.in_layers.1", inside, outside, 3, 3)
    keys |= conv(f"{name}.emb_layers.1", emb, 2 * outside)
    keys |= spade(f"{name}.out_norm", outside) | conv(f"{name}.out_layers.2", outside, outside, 3, 3)
    return keys | (conv(f"{name}.skip_connection", inside, outside, 1, 1) if inside != outside else {})


def attention(name, width):
    return (
        affine(f"{name}.norm", width)
        | conv(f"{name}.qkv", width, 3 * width, 1)
        | conv(f"{name}.proj_out", width, width, 1)
    )


def tiny_keys():
    """Names and shapes of the TINY network with 6 output channels, written out block by block."""
    return {
        **conv("time_embed.0", 32, 128),
        **conv("time_embed.2", 128, 128),
        **conv("input_blocks.0.0", 3, 32, 3, 3),
        **plain_block("input_blocks.1.0", 32, 32),
        **plain_block("input_blocks.2.0", 32, 32),  # halves the size
        **plain_block("input_blocks.3.0", 32, 64),
        **attention("input_blocks.3.1", 64),
        **spade_block("middle_block.0", 64, 64),
        **attention("middle_block.1", 64),
        **spade_block("middle_block.2", 64, 64),
        **spade_block("output_blocks.0.0", 64 + 64, 64),
        **attention("output_blocks.0.1", 64),
        **spade_block("output_blocks.1.0", 64 + 32, 64),
        **attention("output_blocks.1.1", 64),
        **spade_block("output_blocks.1.2", 64, 64),  # doubles the size
        **spade_block("output_blocks.2.0", 64 + 32, 32),
        **spade_block("output_blocks.3.0", 32 + 32, 32),
        **affine("out.0", 32),
        **conv("out.2", 32, 6, 3, 3),
    }


def test_state_dict_names_and_shapes():
    found = {name: tuple(value.shape) for name, value in build_on_meta(learn_sigma=True).state_dict().items()}
    assert sorted(found.items()) == sorted(tiny_keys().items())


def test_strided_convolutions_have_their_own_names():
    found = {
        name: tuple(value.shape)
        for name, value in build_on_meta(resblock_updown=False, learn_sigma=True).state_dict().items()
    }
    expected = {k: v for k, v in tiny_keys().items() if not k.startswith(("input_blocks.2.0", "output_blocks.1.2"))}
    expected |= conv("input_blocks.2.0.op", 32, 32, 3, 3) | conv("output_blocks.1.2.conv", 64, 64, 3, 3)
    assert found == expected


PUBLISHED = {
    "image_size": 256,
    "num_channels": 256,
    "num_res_blocks": 2,
    "num_head_channels": 64,
    "channel_mult": "",
    "attention_resolutions": "32,16,8",
    "num_classes": 35,
    "learn_sigma": True,
    "resblock_updown": True,
}


def test_the_published_configuration():
    model = build_on_meta(**PUBLISHED)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    expected = {
        "time_embed.0.weight": (1024, 256),
        "input_blocks.1.0.in_layers.2.weight": (256, 256, 3, 3),
        "middle_block.0.in_norm.mlp_shared.0.weight": (128, 36, 3, 3),
        "output_blocks.2.1.qkv.weight": (3072, 1024, 1),
        "out.2.weight": (6, 256, 3, 3),
    }
    assert {name: shapes[name] for name in expected} == expected
    own = sum(math.prod(shape) for shape in shapes.values())
    assert own == pytest.approx(654.0e6, abs=0.05e6)
    # The public code counts 675 M, with an unused SPADE over 3 label channels in every encoder block.
    widths = [block.in_layers[0].num_channels for block in model.input_blocks.modules() if isinstance(block, ResBlock)]
    unused = sum(128 * 3 * 9 + 128 + 2 * (width * 128 * 9 + width) for width in widths)
    assert own + unused == pytest.approx(674.7e6, abs=0.05e6)


# -- the forward pass, once more from the state dict alone ------------------------------------------------------------


def naive_spade(p, name, x, y):
    y = F.interpolate(y, size=x.shape[2:], mode="nearest")
    hidden = F.relu(F.conv2d(y, p[f"{name}.mlp_shared.0.weight"], p[f"{name}.mlp_shared.0.bias"], padding=1))
    gamma = F.conv2d(hidden, p[f"{name}.mlp_gamma.weight"], p[f"{name}.mlp_gamma.bias"], padding=1)
    beta = F.conv2d(hidden, p[f"{name}.mlp_beta.weight"], p[f"{name}.mlp_beta.bias"], padding=1)
    return F.group_norm(x, 32) * (1 + gamma) + beta


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
        h, x = (v.repeat_interleave(2, 2).repeat_interleave(2, 3) for v in (h, x))
    h = F.conv2d(h, p[f"{name}.{first}.weight"], p[f"{name}.{first}.bias"], padding=1)
    e = F.linear(F.silu(emb), p[f"{name}.emb_layers.1.weight"], p[f"{name}.emb_layers.1.bias"])[:, :, None, None]
    if scale_shift:
        scale, shift = e[:, : h.shape[1]], e[:, h.shape[1] :]
        h = norm(h, "out_norm", "out_layers.0") * (1 + scale) + shift
    else:
        h = norm(h + e, "out_norm", "out_layers.0")
    h = F.conv2d(F.silu(h), p[f"{name}.{last}.weight"], p[f"{name}.{last}.bias"], padding=1)
    if f"{name}.skip_connection.weight" in p:
        x = F.conv2d(x, p[f"{name}.skip_connection.weight"], p[f"{name}.skip_connection.bias"])
    return x + h


def naive_attention(p, name, x, head_channels=32):
    n, c, height, width = x.shape
    flat = F.group_norm(x, 32, p[f"{name}.norm.weight"], p[f"{name}.norm.bias"]).flatten(2)
    qkv = F.conv1d(flat, p[f"{name}.qkv.weight"], p[f"{name}.qkv.bias"])
    heads = []
    for q, k, v in (part.chunk(3, 1) for part in qkv.split(3 * head_channels, 1)):  # heads first, then q, k, v
        weight = (q.transpose(1, 2) @ k / math.sqrt(head_channels)).softmax(-1)
        heads.append(v @ weight.transpose(1, 2))
    out = F.conv1d(torch.cat(heads, 1), p[f"{name}.proj_out.weight"], p[f"{name}.proj_out.bias"])
    return x + out.view(n, c, height, width)


def naive_unet(p, x, t, y, scale_shift=True):
    """The TINY network, from a state dict of the published names."""
    frequencies = torch.tensor([10000 ** (-k / 16) for k in range(16)])
    emb = torch.cat([torch.cos(t[:, None] * frequencies), torch.sin(t[:, None] * frequencies)], 1)
    emb = F.linear(emb, p["time_embed.0.weight"], p["time_embed.0.bias"])
    emb = F.linear(F.silu(emb), p["time_embed.2.weight"], p["time_embed.2.bias"])

    def block(name, h, resize=None):
        return naive_block(p, name, h, emb, y, resize, scale_shift)

    h0 = F.conv2d(x, p["input_blocks.0.0.weight"], p["input_blocks.0.0.bias"], padding=1)
    h1 = block("input_blocks.1.0", h0)
    if "input_blocks.2.0.op.weight" in p:
        h2 = F.conv2d(h1, p["input_blocks.2.0.op.weight"], p["input_blocks.2.0.op.bias"], stride=2, padding=1)
    else:
        h2 = block("input_blocks.2.0", h1, "down")
    h3 = naive_attention(p, "input_blocks.3.1", block("input_blocks.3.0", h2))
    h = block("middle_block.2", naive_attention(p, "middle_block.1", block("middle_block.0", h3)))
    h = naive_attention(p, "output_blocks.0.1", block("output_blocks.0.0", torch.cat([h, h3], 1)))
    h = naive_attention(p, "output_blocks.1.1", block("output_blocks.1.0", torch.cat([h, h2], 1)))
    if "output_blocks.1.2.conv.weight" in p:
        h = h.repeat_interleave(2, 2).repeat_interleave(2, 3)
        h = F.conv2d(h, p["output_blocks.1.2.conv.weight"], p["output_blocks.1.2.conv.bias"], padding=1)
    else:
        h = block("output_blocks.1.2", h, "up")
    h = block("output_blocks.2.0", torch.cat([h, h1], 1))
    h = block("output_blocks.3.0", torch.cat([h, h0], 1))
    h = F.silu(F.group_norm(h, 32, p["out.0.weight"], p["out.0.bias"]))
    return F.conv2d(h, p["out.2.weight"], p["out.2.bias"], padding=1)


@pytest.mark.parametrize("places", ["unet", "spadeboth", "enconly"])
@pytest.mark.parametrize("updown, scale_shift", [(True, True), (False, False)])
def test_forward_equals_the_naive_network(updown, scale_shift, places):
    model = build_awake(resblock_updown=updown, use_scale_shift_norm=scale_shift, unet_model=places, learn_sigma=True)
    arguments = inputs()
    with torch.no_grad():
        expected = naive_unet(model.state_dict(), *arguments, scale_shift)
    output = run(model, *arguments)
    assert output.shape == (2, 6, *SIZE) and output.dtype == torch.float32
    assert expected.std() > 0.05
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("learn_sigma, channels", [(True, 6), (False, 3)])
@pytest.mark.parametrize("size", [(8, 16), (10, 6), (4, 2)])
def test_output_channels_and_any_size_that_divides(learn_sigma, channels, size):
    output = run(build_awake(learn_sigma=learn_sigma), *inputs(1, size=size))
    assert output.shape == (1, channels, *size) and output.isfinite().all()


def test_the_output_and_every_residual_branch_start_at_zero():
    model = build(learn_sigma=True)
    assert not run(model, *inputs()).any()
    for block in (module for module in model.modules() if isinstance(module, ResBlock)):
        assert not block.out_layers[-1].weight.any() and not block.out_layers[-1].bias.any()
    for block in (module for module in model.modules() if isinstance(module, AttentionBlock)):
        assert not block.proj_out.weight.any()


def test_samples_in_a_batch_do_not_mix():
    model, (x, t, y) = build_awake(), inputs(3)
    together = run(model, x, t, y)
    for k in range(3):
        torch.testing.assert_close(
            run(model, *(v[k : k + 1] for v in (x, t, y))), together[k : k + 1], rtol=0, atol=1e-5
        )


def test_picture_time_and_labels_matter():
    model, (x, t, y) = build_awake(), inputs()
    output = run(model, x, t, y)
    for other in ((x + 0.1, t, y), (x, t + 5, y), (x, t, 1 - y)):
        assert (run(model, *other) - output).abs().max() > 1e-2


# -- SPADE ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_spade_equals_the_naive_formula(stride):
    torch.manual_seed(0)
    layer = SPADEGroupNorm(64, LABELS, stride)
    y = torch.randn(2, LABELS, 12, 8)
    x = torch.randn(2, 64, 12 // stride, 8 // stride) * 3 + 1
    parameters = {f"spade.{name}": value for name, value in layer.state_dict().items()}
    torch.testing.assert_close(
        layer(x, LabelModulation(y, [stride])), naive_spade(parameters, "spade", x, y), rtol=1e-5, atol=1e-5
    )


PARTS = ("input_blocks", "middle_block", "output_blocks")


@pytest.mark.parametrize(
    "places, expected",
    [("unet", PARTS[1:]), ("spadeboth", PARTS), ("enconly", PARTS[:2])],
    ids=lambda value: str(value),
)
@pytest.mark.parametrize("updown", [True, False])
def test_where_spade_blocks_are(places, expected, updown):
    model = build_on_meta(unet_model=places, resblock_updown=updown)
    for part in PARTS:
        blocks = [module for module in getattr(model, part).modules() if isinstance(module, ResBlock)]
        assert len(blocks) >= 2
        assert {isinstance(block, SPADEResBlock) for block in blocks} == {part in expected}


@pytest.mark.parametrize("places", ["unet", "spadeboth", "enconly"])
@pytest.mark.parametrize("updown", [True, False])
def test_stored_modulations_equal_the_plain_path(places, updown):
    model, (x, t, y) = build_awake(unet_model=places, resblock_updown=updown), inputs()
    with torch.no_grad():
        stored = model.cached_modulation(y)
    plain = run(model, x, t, y)
    torch.testing.assert_close(run(model, x, t, stored), plain, rtol=0, atol=1e-6)
    torch.testing.assert_close(run(model, x / 2, t + 1, stored), run(model, x / 2, t + 1, y), rtol=0, atol=1e-6)
    assert len(stored.pairs) == sum(isinstance(module, SPADEGroupNorm) for module in model.modules())
    tensors = [tensor for pair in stored.pairs for tensor in pair]
    assert model.modulation_bytes(2, *SIZE) == sum(4 * tensor.numel() for tensor in tensors)


def test_stored_modulations_spare_the_label_convolutions():
    model, (x, t, y), calls = build_awake(), inputs(), []
    for layer in (module for module in model.modules() if isinstance(module, SPADEGroupNorm)):
        layer.mlp_shared.register_forward_hook(lambda *_: calls.append(1))
    stored = model.cached_modulation(y)
    once = len(calls)
    run(model, x, t, stored)
    assert once == len(stored.pairs) and len(calls) == once
    run(model, x, t, y)
    assert len(calls) == 2 * once


# -- flags ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("updown", [True, False])
def test_checkpointing_changes_neither_output_nor_gradients(updown):
    flags = {"resblock_updown": updown, "dropout": 0.3}
    results, arguments = [], inputs()
    for use_checkpoint in (False, True):
        model, calls = build_awake(use_checkpoint=use_checkpoint, **flags).train(), []
        for module in model.modules():
            if isinstance(module, ResBlock):
                module.emb_layers.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        torch.manual_seed(3)  # the same dropout
        output = model(*arguments)
        forward = len(calls)
        output.square().mean().backward()
        assert len(calls) == (2 if use_checkpoint else 1) * forward  # every block was recomputed
        results.append((output.detach(), {name: p.grad for name, p in model.named_parameters()}))
    (plain, plain_grads), (saved, saved_grads) = results
    torch.testing.assert_close(saved, plain, rtol=0, atol=1e-6)
    assert all(gradient is not None and gradient.any() for gradient in plain_grads.values())
    for name, gradient in plain_grads.items():
        torch.testing.assert_close(saved_grads[name], gradient, rtol=1e-4, atol=1e-7)


def test_dropout_works_in_training_alone():
    model, arguments = build_awake(dropout=0.5), inputs()
    assert torch.equal(run(model, *arguments), run(model, *arguments))
    model.train()
    assert not torch.equal(run(model, *arguments), run(model, *arguments))


@pytest.mark.parametrize("scale_shift, rows", [(True, 64), (False, 32)])
def test_scale_shift_needs_twice_the_embedding(scale_shift, rows):
    weights = build_on_meta(use_scale_shift_norm=scale_shift).state_dict()
    assert weights["input_blocks.1.0.emb_layers.1.weight"].shape == (rows, 128)
    assert weights["output_blocks.3.0.emb_layers.1.weight"].shape == (rows, 128)


@pytest.mark.parametrize(
    "flags, encoder, decoder",
    [
        ({"num_head_channels": -1, "num_heads": 4}, 4, 4),
        ({"num_head_channels": -1, "num_heads": 4, "num_heads_upsample": 2}, 4, 2),
        ({"num_head_channels": 16, "num_heads": 8}, 4, 4),  # 64 / 16
        ({"num_head_channels": 64, "num_heads_upsample": 2}, 1, 1),
    ],
)
def test_number_of_heads(flags, encoder, decoder):
    model = build_on_meta(**flags)
    heads = [
        {module.num_heads for module in getattr(model, part).modules() if isinstance(module, AttentionBlock)}
        for part in PARTS
    ]
    assert heads == [{encoder}, {encoder}, {decoder}]


@pytest.mark.parametrize("flag", [False, True])
def test_attention_order_reaches_every_block(flag):
    model = build_on_meta(use_new_attention_order=flag)
    assert {m.new_order for m in model.modules() if isinstance(m, AttentionBlock)} == {flag}


def test_attention_runs_at_the_given_image_sizes():
    flags = {"image_size": 64, "channel_mult": "1,1,1,1", "attention_resolutions": "32,8"}  # rates 2 and 8
    names = [name for name, module in build_on_meta(**flags).named_modules() if isinstance(module, AttentionBlock)]
    encoder, decoder = ["input_blocks.3.1", "input_blocks.7.1"], [f"output_blocks.{k}.1" for k in (0, 1, 4, 5)]
    assert names == [*encoder, "middle_block.1", *decoder]


@pytest.mark.parametrize(
    "image_size, mults",
    [(512, (0.5, 1, 1, 2, 2, 4, 4)), (256, (1, 1, 2, 2, 4, 4)), (128, (1, 1, 2, 3, 4)), (64, (1, 2, 3, 4))],
)
def test_default_channel_multipliers(image_size, mults):
    model = build_on_meta(image_size=image_size, channel_mult="", num_channels=64, resblock_updown=False)
    weights, levels = model.state_dict(), len(mults)
    widths = [weights[f"input_blocks.{2 * k + 1}.0.in_layers.2.weight"].shape[0] for k in range(levels)]
    assert widths == [int(64 * mult) for mult in mults]
    assert len(model.input_blocks) == 2 * levels and len(model.output_blocks) == 2 * levels
    assert model.downsampling == 2 ** (levels - 1)


@pytest.mark.parametrize(
    "flags, planes", [({}, 6), ({"no_instance": True}, 5), ({"one_hot_label": False}, 2), ({"num_classes": 35}, 36)]
)
def test_conditioning_planes(flags, planes):
    model = build_awake(**flags)
    assert model.label_channels == planes
    assert run(model, *inputs(1, labels=planes)).shape == (1, 3, *SIZE)


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size, example", [((18, 32), (16, 32)), ((16, 31), (16, 32)), ((1, 8), (4, 8)), ((23, 9), (24, 8))]
)
def test_sizes_that_do_not_divide_name_sizes_that_do(size, example):
    model = build_on_meta(channel_mult="1,1,1")
    x, t, y = (v.to("meta") for v in inputs(1, size=size))
    with pytest.raises(InputError, match=f"{size[0]}x{size[1]}.*multiples of 4, for example {example[0]}x{example[1]}"):
        model(x, t, y)
    check_size(*example, model.downsampling)


@pytest.mark.parametrize(
    "flags, words",
    [
        ({"num_channels": 48}, "--num_channels 48.*48 wide.*multiple of 32"),
        ({"channel_mult": "0.5,1"}, "multiplier 0.5.*16 wide.*multiple of 32"),
        ({"channel_mult": "1,1.25"}, "multiplier 1.25.*40 wide"),
        ({"channel_mult": "1,x"}, "--channel_mult 1,x"),
        ({"image_size": 96, "channel_mult": ""}, "--image_size 96.*--channel_mult"),
        ({"num_head_channels": 48}, "--num_head_channels 48 does not divide.* 64 channels"),
        ({"num_head_channels": 0}, "--num_head_channels 0"),
        ({"num_head_channels": -1, "num_heads": 3}, "--num_heads 3 does not divide"),
        ({"num_head_channels": -1, "num_heads": 0}, "--num_heads 0"),
        ({"attention_resolutions": "16,a"}, "--attention_resolutions 16,a"),
        ({"attention_resolutions": "0"}, "--attention_resolutions 0"),
        ({"class_cond": False}, "--class_cond False"),
    ],
)
def test_flags_that_do_not_fit(flags, words):
    with pytest.raises(InputError, match=words):
        build_on_meta(**flags)


def test_any_size_works_with_channel_mult():
    assert build_on_meta(image_size=96, channel_mult="1,1,2").downsampling == 4


@pytest.mark.parametrize(
    "y, words",
    [
        (torch.zeros(2, LABELS - 1, *SIZE), r"expected \(N, 6, H, W\), found \(2, 5, 8, 16\)"),
        (torch.zeros(2, LABELS), r"found \(2, 6\)"),
        (None, "found None"),
        (torch.zeros(1, LABELS, *SIZE), "differ in N, H or W"),
        (torch.zeros(2, LABELS, 16, 16), "differ in N, H or W"),
    ],
)
def test_conditioning_that_does_not_fit(y, words):
    model, (x, t, _) = build(), inputs()
    with pytest.raises(InputError, match=words):
        model(x, t, y)


def test_modulations_check_their_labels():
    with pytest.raises(InputError, match=r"found \(2, 3, 8, 16\)"):
        build().cached_modulation(torch.zeros(2, 3, *SIZE))
