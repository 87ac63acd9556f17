"""The digital channel: what arrives and what it costs, its noise, outage, and sionna's manners."""

import itertools
import math
import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from guided_diffusion.console import InputError
from guided_diffusion.link import channel_coding
from guided_diffusion.link.channel_coding import MODULATIONS, DigitalLink, segment

pytest.importorskip("sionna")


def payload(size, seed=0):
    return random.Random(seed).randbytes(size)


def deliver(parts, snr_db, seed=0, **options):
    return DigitalLink(snr_db, **options).send(parts, torch.Generator().manual_seed(seed))


def test_units_in_closed_form():
    assert [DigitalLink(db).noise_power for db in (0, 20)] == [1, pytest.approx(0.01)]
    assert channel_coding.es_n0_to_eb_n0(6.4, 0.5, 4) == pytest.approx(6.4 - 3.0103, abs=1e-4)
    assert channel_coding.es_n0_to_eb_n0(7.0, 0.25, 4) == pytest.approx(7.0)  # one message bit per use: Eb = Es


def test_digital_link_without_sionna_says_what_to_install(monkeypatch):
    channel_coding._sionna.cache_clear()
    for module in [name for name in sys.modules if name.startswith("sionna.")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "sionna", None)  # importing it now raises ModuleNotFoundError
    with pytest.raises(InputError, match=r"^--link digital needs sionna: pip install sionna-no-rt$"):
        DigitalLink(10)


@pytest.mark.slow
def test_digital_link_leaves_the_global_streams_alone():
    code = """
import random, numpy as np, torch
from guided_diffusion.link.channel_coding import DigitalLink
state = lambda: (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist())
before = state()
link = DigitalLink(8.0, "qpsk", fading="rayleigh")
imported = state() == before
link.send({"labels": b"abc"}, torch.Generator().manual_seed(0))
print(imported, state() == before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True True\n"


@pytest.mark.parametrize("limit", [channel_coding.INDEX_BLOCK_BYTES, channel_coding.BLOCK_BYTES])
def test_segment_makes_few_large_blocks_at_the_rate_in_whole_symbols(limit):
    sizes, modulations = set(), MODULATIONS.values()
    for num_bytes, rate, q in itertools.product(range(1, 1000, 3), (0.2, 1 / 3, 0.5, 0.95), modulations):
        cut = segment(num_bytes, limit, rate, q)
        sizes.add(cut.size)
        assert cut.count == math.ceil(num_bytes / limit) and cut.size <= limit
        filling = cut.count * cut.size - num_bytes
        assert 0 <= filling < cut.count * max(4, cut.size / 15) + cut.count
        assert cut.k == 8 * cut.size + channel_coding.CRC_BITS
        assert cut.n % q == 0 and abs(cut.n - cut.k / (min(rate, 0.85) if cut.k <= 292 else rate)) < q
        assert 0.2 <= cut.k / cut.n <= 0.95 and cut.uses * q == cut.count * cut.n
    assert len(sizes) <= 64


@pytest.mark.parametrize("rate", [0.2, 0.5, 0.95])
@pytest.mark.parametrize("modulation", MODULATIONS)
def test_send_over_a_clean_channel_delivers_every_byte(modulation, rate):
    sizes = {"header": 1, "labels": 3, "edges": 38, "more": 1901, "indices": 130, "empty": 0}
    parts = {name: payload(size) for name, size in sizes.items()}
    received = deliver(parts, 100, modulation=modulation, code_rate=rate, iterations=5)
    assert {name: received.part(name) for name in parts} == parts
    assert {name: received.prefix(name) for name in parts} == parts
    assert received.block_errors == 0 and received.blocks_sent == 1 + 1 + 1 + 5 + 3
    assert received.uses["empty"] == 0


@pytest.mark.parametrize(("data", "snr"), [(b"\0" * 100, -1e308), (payload(100), -20)], ids=["zeros", "random"])
def test_send_over_a_dead_channel_delivers_nothing_and_raises_nothing(data, snr):
    received = deliver({"header": data, "labels": data, "indices": data}, snr, iterations=3)
    assert received.blocks == {"header": [None], "labels": [None], "indices": [None, None]}
    assert received.block_errors == received.blocks_sent == 4
    assert received.part("labels") is None and received.prefix("indices") == b""


def test_block_code_crc_catches_unusable_symbols_and_a_decoder_that_errs(monkeypatch):
    code = channel_coding._BlockCode(8 * 12 + channel_coding.CRC_BITS, 240, 4, 3)
    for dead in (0.0, math.nan):
        assert code.decode(torch.full((2, 60), dead, dtype=torch.complex64), 1.0) == [None, None]
    sent = np.frombuffer(payload(24), np.uint8).reshape(2, 12)
    decoder = code.decoder

    def flip_one(llr):
        words = decoder(llr)
        words[1, 7] = 1 - words[1, 7]
        return words

    monkeypatch.setattr(code, "decoder", flip_one, raising=False)
    assert code.decode(code.encode(sent), 0.01) == [sent[0].tobytes(), None]


@pytest.mark.parametrize("modulation", MODULATIONS)
def test_send_costs_the_uses_of_its_segments(modulation):
    sizes = {"header": 60, "labels": 300, "edges": 500, "indices": 40}
    link, parts = DigitalLink(20, modulation, 0.5, iterations=3), {name: payload(size) for name, size in sizes.items()}
    received = link.send(parts, torch.Generator().manual_seed(0))
    cuts = {name: link.segments(name, len(data)) for name, data in parts.items()}
    assert received.uses == {name: cut.uses for name, cut in cuts.items()}
    assert cuts["labels"].bits_per_symbol == MODULATIONS[modulation] and cuts["indices"].bits_per_symbol == 2
    assert received.message_bits == 8 * 900 and received.coded_bits == sum(cut.count * cut.n for cut in cuts.values())
    per_use = received.message_bits / sum(received.uses.values())  # all parts together: what Eb/N0 is about
    assert received.realised_eb_n0_db == pytest.approx(received.realised_es_n0_db - 10 * math.log10(per_use))


def test_send_realises_the_es_n0_asked_for():
    for data, modulation, snr in (
        (payload(1900), "16qam", -7.5),
        (b"\0" * 1900, "64qam", 12),
        (payload(999), "qpsk", 3),
    ):
        received = deliver({"labels": data}, snr, modulation=modulation, code_rate=1 / 3, iterations=1)
        assert received.realised_es_n0_db == pytest.approx(snr, abs=0.15)


def test_send_draws_from_the_generator_and_the_part_alone():
    parts = {"indices": payload(64 * 12)}
    one, again, other = (deliver(parts, -1.4, seed) for seed in (4, 4, 5))
    assert one == again and one.blocks != other.blocks and 0 < one.block_errors < one.blocks_sent
    among = deliver({"labels": payload(20), **parts, "header": payload(3)}, -1.4, 4)
    assert one.blocks["indices"] == among.blocks["indices"]
    generator = torch.Generator().manual_seed(4)
    first, second = (DigitalLink(-1.4).send(parts, generator) for _ in range(2))
    assert first == one and second != one  # the caller's generator moves on


def test_send_has_a_cliff_and_that_of_control_lies_lower():
    parts = {"labels": payload(4 * 122), "indices": payload(4 * 64)}
    above, between, below = (deliver(parts, snr) for snr in (8, 4, -4))
    low = DigitalLink(5, "qpsk", 0.2)
    assert low.segments("header", 60) == low.segments("labels", 60)  # control is never weaker than the maps
    assert above.block_errors == 0
    assert between.part("labels") is None and between.part("indices") == parts["indices"]
    assert below.block_errors == below.blocks_sent


def test_send_over_rayleigh_fading_loses_parts_by_their_gain():
    parts = {f"map {k}": payload(60, k) for k in range(40)}
    received = deliver(parts, 10, fading="rayleigh")
    assert received.realised_es_n0_db == pytest.approx(10, abs=0.2)  # without the fading
    lost = {name for name in parts if received.part(name) is None}
    level = {name: 10 + 10 * math.log10(gain) for name, gain in received.gains.items()}
    assert {name for name in parts if level[name] < 4} <= lost <= {name for name in parts if level[name] < 8}
    assert 5 < len(lost) < 30
    assert len(set(level.values())) == 40 and sum(received.gains.values()) / 40 == pytest.approx(1, abs=0.4)
    assert deliver({"labels": b"abc"}, 10).gains == {"labels": 1.0}
