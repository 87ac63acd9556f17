"""The digital channel: what arrives and what it costs, its noise, outage, and sionna's manners."""

import importlib.util
import itertools
import math
import random
import sys

import numpy as np
import pytest
import torch
from test_package import run_python

from guided_diffusion.console import InputError
from guided_diffusion.link import channel_coding
from guided_diffusion.link.channel_coding import (
    BLOCK_BYTES,
    CRC_BITS,
    INDEX_BLOCK_BYTES,
    MODULATIONS,
    Delivery,
    DigitalLink,
    es_n0_to_eb_n0,
    es_n0_to_noise_power,
    segment,
)

needs_sionna = pytest.mark.skipif(importlib.util.find_spec("sionna") is None, reason="sionna-no-rt is not installed")


def payload(size, seed=0):
    return random.Random(seed).randbytes(size)


def message():
    sizes = {"header": 60, "labels": 300, "edges": 500, "indices": 40}
    return {name: payload(size, seed) for seed, (name, size) in enumerate(sizes.items())}


def stream(seed=0):
    return torch.Generator().manual_seed(seed)


def deliver(parts, snr_db, seed=0, **options):
    return DigitalLink(snr_db, **options).send(parts, stream(seed))


# -- units and configuration ------------------------------------------------------------------------------------------


def test_units_in_closed_form():
    assert es_n0_to_noise_power(0) == 1 and es_n0_to_noise_power(20) == pytest.approx(0.01)
    assert es_n0_to_noise_power(-3) == pytest.approx(1.99526, rel=1e-5)
    assert es_n0_to_eb_n0(6.4, 0.5, 4) == pytest.approx(6.4 - 3.0103, abs=1e-4)
    assert es_n0_to_eb_n0(7.0, 0.25, 4) == pytest.approx(7.0)  # one message bit per use: Eb = Es


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"modulation": "8psk"}, "--modulation 8psk: unknown; choose one of qpsk, 16qam, 64qam"),
        ({"code_rate": 0.19}, "--code_rate 0.19: .* 0.2 to 0.95"),
        ({"code_rate": 0.96}, "--code_rate 0.96: .* 0.2 to 0.95"),
        ({"code_rate": math.nan}, "--code_rate nan"),
        ({"control_rate": 0.1}, "--control_rate 0.1: .* 0.2 to 0.95"),
        ({"fading": "rice"}, "--fading rice: unknown; choose one of awgn, rayleigh"),
        ({"iterations": 0}, "iterations 0"),
        ({"snr_db": math.inf}, "--snr inf"),
        ({"snr_db": math.nan}, "--snr nan"),
    ],
)
def test_bad_options_are_named(options, named):
    with pytest.raises(InputError, match=named):
        DigitalLink(**{"snr_db": 10, **options})


def test_without_sionna_one_line_says_what_to_install(monkeypatch):
    channel_coding._sionna.cache_clear()
    for module in [name for name in sys.modules if name.startswith("sionna.")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "sionna", None)  # importing it now raises ModuleNotFoundError
    with pytest.raises(InputError, match=r"^--link digital needs sionna: pip install sionna-no-rt$"):
        DigitalLink(10)


@needs_sionna
def test_first_import_and_sending_leave_the_global_streams_alone():
    code = """
import random, numpy as np, torch
from guided_diffusion.link.channel_coding import DigitalLink
state = lambda: (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist())
before = state()
link = DigitalLink(8.0, "qpsk", fading="rayleigh")
imported = state() == before
link.send({"labels": b"abc"}, torch.Generator().manual_seed(0))
print(imported, state() == before)
import importlib, sys
importlib.reload(sys.modules["sionna.phy.config"])
print(state() == before)
"""
    assert run_python(code).stdout == "True True\nFalse\n"  # the last: sionna does reseed


# -- segmentation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [INDEX_BLOCK_BYTES, BLOCK_BYTES])
def test_segments_are_few_large_enough_and_hardly_larger(limit):
    sizes = set()
    for num_bytes in range(1, 2000):
        cut = segment(num_bytes, limit, 0.5, 4)
        sizes.add(cut.size)
        assert cut.count == math.ceil(num_bytes / limit) and cut.size <= limit
        filling = cut.count * cut.size - num_bytes
        assert 0 <= filling < cut.count * max(4, cut.size / 15) + cut.count
        assert cut.k == 8 * cut.size + CRC_BITS
    assert len(sizes) <= 64


@pytest.mark.parametrize("q", MODULATIONS.values())
@pytest.mark.parametrize("rate", [0.2, 0.25, 1 / 3, 0.5, 0.67, 0.9, 0.95])
def test_coded_length_is_the_rate_in_whole_symbols(rate, q):
    for num_bytes in (1, 5, 63, 130, 475):
        cut = segment(num_bytes, BLOCK_BYTES, rate, q)
        assert cut.n % q == 0 and abs(cut.n - cut.k / (min(rate, 0.85) if cut.k <= 292 else rate)) < q
        assert 0.2 <= cut.k / cut.n <= 0.95
        assert cut.uses * q == cut.coded_bits == cut.count * cut.n


# -- what arrives -----------------------------------------------------------------------------------------------------


@needs_sionna
@pytest.mark.parametrize("rate", [0.2, 0.31, 0.5, 0.75, 0.95])
@pytest.mark.parametrize("modulation", MODULATIONS)
def test_a_clean_channel_delivers_every_byte(modulation, rate):
    parts = {
        "header": payload(1),
        "labels": payload(3),
        "edges": payload(38),
        "more": payload(190),
        "indices": payload(130),
    }
    received = deliver(parts, 100, modulation=modulation, code_rate=rate, iterations=5)
    assert {name: received.part(name) for name in parts} == parts
    assert {name: received.prefix(name) for name in parts} == parts
    assert received.block_errors == 0 and received.blocks_sent == 1 + 1 + 1 + 1 + 3


@needs_sionna
@pytest.mark.parametrize("snr", [100, 3000.0, 1e308])
@pytest.mark.parametrize("fading", channel_coding.FADINGS)
def test_from_100_db_nothing_is_lost_in_large_parts(snr, fading):
    parts = {"picture": payload(3001)}
    received = deliver(parts, snr, fading=fading, modulation="64qam", code_rate=0.9, iterations=3)
    assert received.part("picture") == parts["picture"]
    assert received.blocks_sent == 7 and len(received.blocks["picture"][0]) == 432


@needs_sionna
@pytest.mark.parametrize("data", [b"\0" * 100, b"\xff" * 100, payload(100)], ids=["zeros", "ones", "random"])
@pytest.mark.parametrize("snr", [-20, -30, -99, -1e308])
def test_a_dead_channel_delivers_nothing_and_raises_nothing(data, snr):
    received = deliver({"header": data, "labels": data, "indices": data}, snr, iterations=3)
    assert received.blocks == {"header": [None], "labels": [None], "indices": [None, None]}
    assert received.block_errors == received.blocks_sent == 4
    assert received.part("labels") is None and received.prefix("indices") == b""


@needs_sionna
def test_not_even_unusable_symbols_pass_the_crc():
    code = channel_coding._block_code(8 * 12 + CRC_BITS, 240, 4, 3)
    for dead in (0.0, math.nan):
        assert code.decode(torch.full((2, 60), dead, dtype=torch.complex64), 1.0) == [None, None]


@needs_sionna
def test_the_crc_catches_a_decoder_that_errs(monkeypatch):
    code = channel_coding._block_code(8 * 12 + CRC_BITS, 240, 4, 3)
    sent = np.frombuffer(payload(24), np.uint8).reshape(2, 12)
    decoder = code.decoder

    def flip_one(llr):
        words = decoder(llr)
        words[1, 7] = 1 - words[1, 7]
        return words

    monkeypatch.setattr(code, "decoder", flip_one, raising=False)
    assert code.decode(code.encode(sent), 0.01) == [sent[0].tobytes(), None]


@needs_sionna
def test_empty_parts_cost_nothing_and_arrive():
    received = deliver({"labels": b"", "indices": b"", "header": payload(10)}, 10, fading="rayleigh")
    assert received.part("labels") == b"" and received.prefix("indices") == b""
    assert received.uses["labels"] == received.uses["indices"] == 0 and received.blocks_sent == 1
    nothing = deliver({"labels": b""}, 10)
    assert nothing.message_bits == nothing.coded_bits == 0 and math.isnan(nothing.realised_eb_n0_db)


def test_part_and_prefix():
    blocks = {"whole": [b"ab", b"c"], "middle": [b"ab", None, b"d"], "first": [None, b"b"], "empty": []}
    received = Delivery(blocks, {}, {}, 0, 0, math.nan)
    assert [received.part(name) for name in blocks] == [b"abc", None, None, b""]
    assert [received.prefix(name) for name in blocks] == [b"abc", b"ab", b"", b""]
    assert (received.block_errors, received.blocks_sent) == (2, 7)


# -- what it costs ----------------------------------------------------------------------------------------------------


@needs_sionna
@pytest.mark.parametrize("modulation", MODULATIONS)
def test_uses_and_rates_are_those_of_the_bits_sent(modulation):
    link, parts = DigitalLink(20, modulation, 0.5, iterations=3), message()
    received = link.send(parts, stream())
    cuts = {name: link.segments(name, len(data)) for name, data in parts.items()}
    assert received.uses == {name: cut.uses for name, cut in cuts.items()}
    assert cuts["labels"].bits_per_symbol == MODULATIONS[modulation] and cuts["indices"].bits_per_symbol == 2
    assert received.message_bits == 8 * 900 and received.coded_bits == sum(cut.coded_bits for cut in cuts.values())
    # Bits per use, all parts together: what Eb/N0 is about.
    per_use = received.message_bits / sum(received.uses.values())
    assert received.rate * received.bits_per_symbol == pytest.approx(per_use)
    assert received.realised_eb_n0_db == pytest.approx(received.realised_es_n0_db - 10 * math.log10(per_use))


@needs_sionna
def test_control_is_never_weaker_than_the_maps():
    assert DigitalLink(5).segments("header", 60).n == pytest.approx(3 * 504, abs=2)
    low = DigitalLink(5, "qpsk", 0.2)
    assert low.segments("header", 60) == low.segments("labels", 60)


# -- the noise --------------------------------------------------------------------------------------------------------


@needs_sionna
@pytest.mark.parametrize("modulation", MODULATIONS)
@pytest.mark.parametrize("data", [payload(1900), b"\0" * 1900], ids=["random", "zeros"])
def test_realised_es_n0_is_the_one_asked_for(data, modulation):
    for snr in (-7.5, 12):
        received = deliver({"labels": data}, snr, modulation=modulation, code_rate=1 / 3, iterations=1)
        assert received.realised_es_n0_db == pytest.approx(snr, abs=0.15)


@needs_sionna
def test_the_same_generator_delivers_the_same():
    parts = {"indices": payload(64 * 12)}
    one, again, other = (deliver(parts, -1.4, seed) for seed in (4, 4, 5))
    assert one == again
    assert one.blocks != other.blocks and 0 < one.block_errors < one.blocks_sent


@needs_sionna
def test_a_part_does_not_depend_on_what_else_is_sent():
    parts = {"indices": payload(64 * 12)}
    alone, among = deliver(parts, -1.4), deliver({"labels": payload(20), **parts, "header": payload(3)}, -1.4)
    assert 0 < alone.block_errors < alone.blocks_sent
    assert alone.blocks["indices"] == among.blocks["indices"]


@needs_sionna
def test_the_caller_s_generator_moves_on():
    link, generator = DigitalLink(-1.4), stream()
    first, second = (link.send({"indices": payload(64)}, generator).realised_es_n0_db for _ in range(2))
    assert first != second


@needs_sionna
def test_maps_have_a_cliff_and_control_lies_below_it():
    parts = {"labels": payload(4 * 122), "indices": payload(4 * 64)}
    above, between, below = (deliver(parts, snr) for snr in (8, 4, -4))
    assert above.block_errors == 0
    assert between.part("labels") is None and between.part("indices") == parts["indices"]
    assert below.block_errors == below.blocks_sent


@needs_sionna
def test_more_noise_never_brings_a_lost_part_back():
    parts = {f"map {k}": payload(16, k) for k in range(6)}
    arrived = [{n for n in parts if deliver(parts, snr).part(n) is not None} for snr in (9, 6.5, 6, 5.5, 3)]
    assert all(more >= fewer for more, fewer in itertools.pairwise(arrived))
    assert len(arrived[0]) == 6 and not arrived[-1]


@needs_sionna
def test_rayleigh_outage_follows_the_gain_of_each_part():
    parts = {f"map {k}": payload(60, k) for k in range(40)}
    received = deliver(parts, 10, fading="rayleigh")
    assert received.realised_es_n0_db == pytest.approx(10, abs=0.2)  # without the fading
    lost = {name for name in parts if received.part(name) is None}
    level = {name: 10 + 10 * math.log10(gain) for name, gain in received.gains.items()}
    assert {name for name in parts if level[name] < 4} <= lost <= {name for name in parts if level[name] < 8}
    assert 5 < len(lost) < 30
    assert len(set(level.values())) == 40 and sum(received.gains.values()) / 40 == pytest.approx(1, abs=0.4)


@needs_sionna
def test_awgn_has_no_gain():
    assert deliver({"labels": b"abc"}, 10).gains == {"labels": 1.0}
