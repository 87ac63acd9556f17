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
from guided_diffusion.link.channel_coding import MODULATIONS, DigitalChannel, segment
from guided_diffusion.random_streams import generator, text_number

pytest.importorskip("sionna")


def payload(size, seed=0):
    return random.Random(seed).randbytes(size)


def deliver(parts, snr_db, seed=0, **options):
    return DigitalChannel(snr_db, **options).send(parts, torch.Generator().manual_seed(seed))


def lost(delivery):
    """(code blocks lost, code blocks) of a delivery."""
    blocks = list(itertools.chain(*delivery.blocks.values()))
    return blocks.count(None), len(blocks)


def test_digital_link_without_sionna_says_what_to_install(monkeypatch):
    channel_coding._sionna.cache_clear()
    for module in [name for name in sys.modules if name.startswith("sionna.")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "sionna", None)  # importing it now raises ModuleNotFoundError
    with pytest.raises(InputError, match=r"^--link digital needs sionna: pip install sionna-no-rt$"):
        DigitalChannel(10)


@pytest.mark.slow
def test_digital_link_leaves_the_global_streams_alone():
    code = """
import random, numpy as np, torch
from guided_diffusion.link.channel_coding import DigitalChannel
state = lambda: (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist())
before = state()
link = DigitalChannel(8.0, "qpsk", fading="rayleigh")
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


@pytest.mark.parametrize(("modulation", "rate"), [("qpsk", 0.2), ("16qam", 0.5), ("64qam", 0.95), ("qpsk", 0.95)])
def test_send_over_a_clean_channel_delivers_every_byte_in_the_uses_of_its_segments(modulation, rate):
    sizes = {"header": 1, "labels": 3, "edges": 38, "more": 1901, "indices": 130, "empty": 0}
    link, parts = DigitalChannel(100, modulation, rate), {name: payload(size) for name, size in sizes.items()}
    received = link.send(parts, torch.Generator().manual_seed(0))
    assert {name: received.part(name) for name in parts} == parts
    assert {name: received.prefix(name) for name in parts} == parts
    assert lost(received) == (0, 1 + 1 + 1 + 5 + 3) and received.message_bits == 8 * sum(sizes.values())
    cuts = {name: link.segments(name, size) for name, size in sizes.items()}
    assert received.uses == sum(cut.uses for cut in cuts.values()) and cuts["empty"].uses == 0
    assert cuts["labels"].bits_per_symbol == MODULATIONS[modulation] and cuts["indices"].bits_per_symbol == 2


@pytest.mark.parametrize(("data", "snr"), [(b"\0" * 100, -1e308), (payload(100), -20)], ids=["zeros", "random"])
def test_send_over_a_dead_channel_delivers_nothing_and_raises_nothing(data, snr):
    received = deliver({"header": data, "labels": data, "indices": data}, snr)
    assert received.blocks == {"header": [None], "labels": [None], "indices": [None, None]}
    assert received.part("labels") is None and received.prefix("indices") == b""


def test_block_code_crc_catches_unusable_symbols_and_a_decoder_that_errs(monkeypatch):
    code = channel_coding._BlockCode(8 * 12 + channel_coding.CRC_BITS, 240, 4)
    for dead in (0.0, math.nan):
        assert code.decode(torch.full((2, 60), dead, dtype=torch.complex64), 1.0) == [None, None]
    sent, decoder = np.frombuffer(payload(24), np.uint8).reshape(2, 12), code.decoder

    def flip_one(llr):
        words = decoder(llr)
        words[1, 7] = 1 - words[1, 7]
        return words

    monkeypatch.setattr(code, "decoder", flip_one, raising=False)
    assert code.decode(code.encode(sent), 0.01) == [sent[0].tobytes(), None]


@pytest.mark.parametrize(("data", "snr"), [(payload(1900), -7.5), (b"\0" * 1900, 12)], ids=["random", "zeros"])
def test_send_realises_the_es_n0_asked_for(data, snr):
    assert deliver({"labels": data}, snr, code_rate=1 / 3).realised_es_n0_db == pytest.approx(snr, abs=0.15)


def test_send_draws_from_the_generator_and_the_part_alone():
    parts = {"indices": payload(64 * 12)}
    one, among = (deliver(more | parts, -1.4, 4) for more in ({}, {"labels": payload(20), "header": payload(3)}))
    assert one.blocks["indices"] == among.blocks["indices"] and 0 < lost(one)[0] < lost(one)[1]
    stream = torch.Generator().manual_seed(4)
    first, second = (DigitalChannel(-1.4).send(parts, stream) for _ in range(2))
    assert first == one and second.blocks != one.blocks  # the caller's generator moves on


def test_send_has_a_cliff_and_that_of_control_lies_lower():
    parts = {"labels": payload(4 * 122), "indices": payload(4 * 64)}
    above, between, below = (deliver(parts, snr) for snr in (8, 4, -4))
    low = DigitalChannel(5, "qpsk", 0.2)
    assert low.segments("header", 60) == low.segments("labels", 60)  # control is never weaker than the maps
    assert between.part("labels") is None and between.part("indices") == parts["indices"]
    assert lost(above) == (0, 6) and lost(below) == (6, 6)


def test_send_over_rayleigh_fading_loses_parts_by_their_gain():
    parts = {f"map {k}": payload(60, k) for k in range(40)}
    received = deliver(parts, 10, fading="rayleigh")
    assert received.realised_es_n0_db == pytest.approx(10, abs=0.2)  # without the fading
    seed = int(torch.randint(2**63 - 1, (), generator=torch.Generator().manual_seed(0)))
    streams = {name: generator(seed, "digital channel", text_number(name)) for name in parts}
    gains = {name: torch.randn((), dtype=torch.complex64, generator=stream) for name, stream in streams.items()}
    level = {name: 10 + 20 * math.log10(h.abs()) for name, h in gains.items()}
    missing = {name for name in parts if received.part(name) is None}
    assert {name for name in parts if level[name] < 4} <= missing <= {name for name in parts if level[name] < 8}
    assert 5 < len(missing) < 30
