"""Three ways over the channel: noise on the planes, bits that arrive, coded bits."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from guided_diffusion.data.semantics import SemanticCoding
from guided_diffusion.link.channel import transmit
from guided_diffusion.link.crossing import AnalogCrossing, DigitalCrossing, IdealCrossing, analog_facts
from guided_diffusion.link.transceiver import Header, Receiver, Transmitter

CLASSES, SIZE = 5, (16, 32)
HEADER = Header(height=1, width=1, num_classes=CLASSES, bank_size=16, steps="3")


def stream(seed=0):
    return torch.Generator().manual_seed(seed)


def sent_scene(seed=0, **form):
    """What a transmitter sends of a scene with classes 0, 2 and 4 in vertical bands, and random image edges."""
    columns = torch.tensor([0, 2, 4]).repeat_interleave(11)[: SIZE[1]]
    label = columns.roll(seed).expand(1, 1, *SIZE).contiguous()
    edge = torch.rand(1, 1, *SIZE, generator=stream(seed))
    transmitter = Transmitter(dataclasses.replace(HEADER, **form), SemanticCoding(1, 2), None)
    return transmitter.send({"label": label, "instance": label.int(), "image_edge": edge}, 3 + seed)


# -- analog -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form, planes", [({}, 4), ({"edge_plane": False}, 3), ({"one_hot": False}, 2)])
def test_uses_are_counted_by_planes(form, planes):
    sent, pixels = sent_scene(**form), SIZE[0] * SIZE[1]
    facts = analog_facts(sent.y, 0.36, CLASSES, form.get("one_hot", True))
    assert facts["channel_uses"] == planes * pixels / 2
    assert facts["bandwidth_ratio"] == pytest.approx(planes / 6)


def test_the_snr_is_the_mean_power_over_the_noise():
    sent = sent_scene(edge_plane=False)
    # Three planes of ones and zeros whose powers add up to 1: a third each, on average
    facts = analog_facts(sent.y, 0.36, CLASSES, True)
    assert facts["realised_snr_db"] == pytest.approx(10 * math.log10(1 / 3 / 0.36**2), abs=1e-4)
    received = transmit(sent.y, 0.36, generators=[stream()], num_classes=CLASSES)
    planes = [0, 2, 4]
    noise = (received - sent.y)[0, planes].square().mean()
    measured = 10 * math.log10(sent.y[0, planes].square().mean() / noise)
    assert measured == pytest.approx(facts["realised_snr_db"], abs=0.3)


def test_without_noise_or_power_the_snr_is_infinite():
    y = sent_scene().y
    assert analog_facts(y, 0.0, CLASSES, True)["realised_snr_db"] == math.inf
    empty = analog_facts(torch.zeros(1, CLASSES, 4, 4), 0.1, CLASSES, True)
    assert empty == {"channel_uses": 0, "bandwidth_ratio": 0, "realised_snr_db": math.inf}


@pytest.mark.parametrize("pool", ["None", "med", "mean", "max"])
@pytest.mark.parametrize("form", [{}, {"one_hot": False}])
def test_the_analog_way_is_the_channel(pool, form):
    sent = sent_scene(**form)
    arrival, _ = AnalogCrossing(0.22, pool).cross(sent, None, stream(7))
    one_hot = form.get("one_hot", True)
    wanted = transmit(sent.y, 0.22, generators=[stream(7)], num_classes=CLASSES, one_hot=one_hot, pool=pool)
    assert torch.equal(arrival.y, wanted) and not torch.equal(arrival.y, sent.y)
    assert (arrival.header, arrival.start, arrival.codewords, arrival.problems) == (sent.message.header, 3, (), ())


# -- ideal ------------------------------------------------------------------------------------------------------------


def same(arrival, sent):
    return (
        torch.equal(arrival.y, sent.y)
        and arrival.header == sent.message.header
        and arrival.start == sent.message.start_index
        and not arrival.problems
    )


def test_bits_that_arrive_are_the_message():
    sent = sent_scene()
    arrival, facts = IdealCrossing().cross(sent, Receiver(None), stream())
    assert same(arrival, sent) and facts == {}


# -- digital ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def link():
    """Function that makes a digital link."""
    pytest.importorskip("sionna")
    from guided_diffusion.link.channel_coding import DigitalLink

    return DigitalLink


@pytest.mark.parametrize("snr", [100, 20])
def test_a_good_digital_channel_is_ideal(link, snr):
    sent = sent_scene()
    arrival, facts = DigitalCrossing(link(snr)).cross(sent, Receiver(None), stream())
    assert same(arrival, sent) and facts["block_errors"] == 0 and facts["blocks"] >= 3
    assert facts["realised_snr_db"] == pytest.approx(snr, abs=1)
    bits = 8 * len(sent.message.to_bytes())
    assert facts["bandwidth_ratio"] == facts["channel_uses"] / (3 * SIZE[0] * SIZE[1])
    # All in all R Q = message bits per use
    offset = 10 * math.log10(bits / facts["channel_uses"])
    assert facts["eb_n0_db"] == pytest.approx(facts["realised_snr_db"] - offset, abs=1e-6)


@pytest.mark.parametrize("fading", ["awgn", "rayleigh"])
@pytest.mark.parametrize("snr", [-20, -400])
def test_a_dead_digital_channel_gives_nothing_and_does_not_crash(link, snr, fading):
    receiver, crossing = Receiver(None), DigitalCrossing(link(snr, fading=fading))
    for seed in range(2):
        arrival, facts = crossing.cross(sent_scene(seed), receiver, stream(seed))
        assert arrival is None and facts["block_errors"] == facts["blocks"]


def test_between_them_control_survives_and_maps_are_replaced(link):
    receiver = Receiver(None)
    first, second = sent_scene(0), sent_scene(1)
    IdealCrossing().cross(first, receiver, None)
    arrival, facts = DigitalCrossing(link(2)).cross(second, receiver, stream())
    assert arrival.problems == ("labels", "edges") and arrival.start == 4
    assert 0 < facts["block_errors"] < facts["blocks"]
    # The last good label map, with the boundaries between its classes
    assert torch.equal(arrival.y[:, :CLASSES], first.y[:, :CLASSES])
    assert set(np.flatnonzero(arrival.y[0, CLASSES, 0])) == {10, 11, 21, 22}


def test_the_digital_draw_follows_from_the_stream(link):
    crossing, found = DigitalCrossing(link(2)), []
    for seed in (5, 5, 6):
        found.append(crossing.cross(sent_scene(), Receiver(None), stream(seed))[1])
    assert found[0] == found[1] and found[0]["realised_snr_db"] != found[2]["realised_snr_db"]
