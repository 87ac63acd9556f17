"""Conditioning tensors against naive loops."""

import pytest
import torch

from guided_diffusion.console import InputError
from guided_diffusion.data.semantics import (
    SemanticCoding,
    boundaries,
    conditioning_channels,
    describe,
    edge_symbols,
    encode_semantics,
    received_semantics,
    restore,
    shrink_labels,
    smooth_labels,
)

K = 6


@pytest.fixture
def scene():
    stream = torch.Generator().manual_seed(1)
    label = torch.randint(K, (2, 1, 5, 7), generator=stream)
    instance = torch.randint(3, (2, 1, 5, 7), generator=stream, dtype=torch.int32) + 30_000
    image_edge = torch.rand(2, 1, 5, 7, generator=stream)
    return label, instance, image_edge


def naive_edges(ids, label=None):
    """Pixels with a neighbour of another id, and given labels of the same class."""
    edge, (_, _, height, width) = torch.zeros(ids.shape), ids.shape
    for n, _, i, j in torch.cartesian_prod(*map(torch.arange, ids.shape)).tolist():
        for a, b in ((i - 1, j), (i + 1, j), (i, j - 1), (i, j + 1)):
            inside = 0 <= a < height and 0 <= b < width
            if inside and (label is None or label[n, 0, a, b] == label[n, 0, i, j]):
                edge[n, 0, i, j] += bool(ids[n, 0, a, b] != ids[n, 0, i, j])
    return edge.clamp(max=1)


def test_encode_semantics_one_hot_against_a_loop(scene):
    label = scene[0]
    y = encode_semantics(label, None, None, K)
    expected = torch.zeros(2, K, 5, 7)
    for b, i, j in torch.cartesian_prod(*map(torch.arange, (2, 5, 7))).tolist():
        expected[b, label[b, 0, i, j], i, j] = 1
    assert y.dtype == torch.float32 and torch.equal(y, expected)
    for dtype in (torch.uint8, torch.int16, torch.int32):
        assert torch.equal(encode_semantics(label.to(dtype), None, None, K), expected)


def test_boundaries_between_instances_against_a_loop(scene):
    assert torch.equal(boundaries(scene[1]).float(), naive_edges(scene[1]))
    instance = torch.tensor([[[[26_000, 26_000 + 256]]]], dtype=torch.int32)  # alike in 8 bits
    assert boundaries(instance).all()


def test_encode_semantics_edge_plane_is_the_sum_of_both_edges(scene):
    label, instance, image_edge = scene
    y = encode_semantics(label, instance, image_edge, K)
    assert y.shape == (2, K + 1, 5, 7)
    torch.testing.assert_close(y[:, K:], naive_edges(instance) + image_edge, rtol=0, atol=0)
    assert torch.equal(y[:, :K], encode_semantics(label, None, None, K))
    assert torch.equal(encode_semantics(label, instance, None, K)[:, K:], naive_edges(instance))
    assert torch.equal(encode_semantics(label, None, image_edge, K)[:, K:], image_edge)


@pytest.mark.parametrize("one_hot", [True, False])
def test_encode_semantics_zero_edge_plane_when_wanted_but_absent(scene, one_hot):
    y = encode_semantics(scene[0], None, None, K, one_hot=one_hot, edge_plane=True)
    assert y.shape[1] == conditioning_channels(K, one_hot) == conditioning_channels(K, one_hot, no_instance=True) + 1
    assert not y[:, -1].any()


def test_encode_semantics_two_channel_form_is_raw_ids_and_edges(scene):
    label, instance, image_edge = scene
    y = encode_semantics(label, instance, image_edge, K, one_hot=False)
    assert torch.equal(y, torch.cat([label.float(), naive_edges(instance) + image_edge], dim=1))


@pytest.mark.parametrize("one_hot", [True, False])
@pytest.mark.parametrize("bad", [-1, K, 255])
def test_encode_semantics_names_bad_ids(scene, bad, one_hot):
    label = scene[0].clone()
    label[1, 0, 2, 3] = bad
    with pytest.raises(InputError, match=rf"id {bad}\b.*num_classes is {K}\b"):
        encode_semantics(label, None, None, K, one_hot=one_hot)


def grown(seed=3, height=13, width=18):
    """Blocky labels and instances that never span classes, with image edges on the 8-bit grid."""
    stream = torch.Generator().manual_seed(seed)
    label = torch.randint(K, (2, 1, -(-height // 3), -(-width // 3)), generator=stream)
    part = torch.randint(3, label.shape, generator=stream)
    label, part = (p.repeat_interleave(3, 2).repeat_interleave(3, 3)[:, :, :height, :width] for p in (label, part))
    edge = torch.randint(256, label.shape, generator=stream) / 255
    return label, label * 1000 + part, edge


def test_received_semantics_without_loss_the_receiver_has_the_data_sets_semantics():
    scene = grown()
    for form in ({}, {"one_hot": False}, {"edge_plane": False}):
        assert torch.equal(received_semantics(*scene, K, **form), encode_semantics(*scene, K, **form))


def test_boundaries_within_classes_are_what_the_label_map_does_not_tell():
    label, instance, _ = grown()
    inner = boundaries(instance, label)
    assert torch.equal(inner.float(), naive_edges(instance, label)) and inner.any()
    assert torch.equal(boundaries(label) | inner, boundaries(instance))


@pytest.mark.parametrize("scale", [2, 4, 8])
def test_restore_small_label_maps_come_from_pixels_of_their_blocks(scale):
    label = grown()[0]
    coding = SemanticCoding(label_scale=scale)
    small, _, _ = describe(label, None, None, coding)
    assert small.shape == (2, 1, -(-13 // scale), -(-18 // scale))
    y = restore(small, None, None, coding, (13, 18), K)
    assert y.shape[2:] == (13, 18) and torch.equal(y.sum(1)[:, 0], torch.ones_like(y.sum(1)[:, 0]))
    restored = y[:, :K].argmax(1, keepdim=True)
    middle = label[:, :, scale // 2 :: scale, scale // 2 :: scale]
    assert torch.equal(restored[:, :, ::scale, ::scale][:, :, : middle.shape[2], : middle.shape[3]], middle)


def test_edge_symbols_levels():
    edge = grown()[2]
    assert edge_symbols(edge, SemanticCoding(edge_levels=0)) is None
    binary = edge_symbols(edge, SemanticCoding(edge_levels=2, edge_threshold=0.4))
    assert torch.equal(binary, (edge >= 0.4).to(torch.uint8))
    for levels in (3, 16, 256):
        symbols = edge_symbols(edge, SemanticCoding(edge_levels=levels))
        assert symbols.max() == levels - 1
        assert (symbols / (levels - 1) - edge).abs().max() <= 0.5 / (levels - 1) + 1e-6
    small = edge_symbols(edge, SemanticCoding(edge_scale=4))
    assert small.shape == (2, 1, 4, 5) and int(small[0, 0, 0, 0]) == round(float(edge[0, 0, :4, :4].max()) * 255)


def test_received_semantics_edges_not_sent_leave_boundaries_alone():
    label, instance, edge = grown()
    for given in (instance, None):
        y = received_semantics(label, given, edge, K, coding=SemanticCoding(edge_levels=0))
        assert torch.equal(y, encode_semantics(label, given, None, K, edge_plane=True))


@pytest.mark.parametrize(
    "bad", [{"label_scale": 3}, {"edge_levels": 1}, {"edge_levels": 257}, {"edge_threshold": 0}, {"edge_scale": 0}]
)
def test_semantic_coding_bad_source_coding_names_the_flag(bad):
    with pytest.raises(InputError, match=f"--{next(iter(bad))}"):
        SemanticCoding(**bad)


def naive_regions(label):
    """4-connected regions of one map (H, W), by flood fill: lists of (row, column)."""
    height, width = label.shape
    left, found = {(i, j) for i in range(height) for j in range(width)}, []
    while left:
        stack, region = [left.pop()], []
        while stack:
            i, j = stack.pop()
            region.append((i, j))
            for near in ((i - 1, j), (i + 1, j), (i, j - 1), (i, j + 1)):
                if near in left and label[near] == label[i, j]:
                    left.remove(near)
                    stack.append(near)
        found.append(region)
    return found


def naive_smooth(label, least):
    """`smooth_labels` of one map (H, W)."""
    height, width = label.shape
    around = [(0, 0), (0, -1), (0, 1), (-1, 0), (1, 0), (-1, -1), (-1, 1), (1, -1), (1, 1)]
    voted = label.clone()
    for i in range(height):
        for j in range(width):
            places = [(min(max(i + a, 0), height - 1), min(max(j + b, 0), width - 1)) for a, b in around]
            near = [int(label[place]) for place in places]
            voted[i, j] = max(dict.fromkeys(near), key=near.count)
    small = {place for region in naive_regions(voted) if len(region) < least for place in region}
    if len(small) == voted.numel():
        return voted
    while small:
        ring = {}
        for i, j in small:
            for near in ((i, j - 1), (i, j + 1), (i - 1, j), (i + 1, j)):
                if near not in small and 0 <= near[0] < height and 0 <= near[1] < width:
                    ring[i, j] = int(voted[near])
                    break
        for place, value in ring.items():
            voted[place] = value
        small -= {*ring}
    return voted


def winding():
    """A map of one region that winds: bars of four rows, joined alternately on the right and on the left."""
    label = torch.zeros(1, 1, 40, 41, dtype=torch.int64)
    for row in range(0, 40, 8):
        label[..., row : row + 4, :] = 1
        label[..., row + 4 : row + 8, slice(37, 41) if row % 16 == 0 else slice(4)] = 1
    return label


RANDOM = torch.cat([grown()[0], torch.randint(3, (2, 1, 13, 18), generator=torch.Generator().manual_seed(0))])


@pytest.mark.parametrize("least", [1, 4, 9, 909, 1000])  # 909: the size of the region that winds
def test_smooth_labels_against_loops_and_flood_fill(least):
    for label in (RANDOM.repeat_interleave(2, 3), winding()):
        for own, smooth in zip(label[:, 0], smooth_labels(label, least)[:, 0], strict=True):
            assert torch.equal(smooth, naive_smooth(own, least))
            assert least > 9 or min(map(len, naive_regions(smooth))) >= least


def test_describe_smooths_before_it_shrinks():
    label = grown()[0]
    coding = SemanticCoding(label_scale=2, label_smooth=9)
    assert torch.equal(describe(label, None, None, coding)[0], shrink_labels(smooth_labels(label, 9), 2))
    y = received_semantics(label, None, None, K, coding=coding)
    assert torch.equal(y, received_semantics(smooth_labels(label, 9), None, None, K, coding=SemanticCoding(2)))
