"""The digital channel: a message's bytes as LDPC code words of 5G NR with CRCs (3GPP TS 38.212), QAM, AWGN or Rayleigh.

Each part of a message is one transport block: it is cut into equal code blocks with a CRC of 24 bits each, and under
fading it meets one gain of its own. sionna supplies codes and (de)mapper, on the CPU: one draw delivers the same blocks
beside any device. Length, modulation and rate of parts are not counted (5G has a control channel for them).
"""

import functools
import itertools
import math
import random
import warnings
from dataclasses import dataclass

import numpy as np
import torch

from .. import random_streams
from ..console import InputError

MODULATIONS = {"qpsk": 2, "16qam": 4, "64qam": 6}  # bits per symbol Q

# A picture without its header is lost, and indices are worth most per bit: both go in QPSK at a low rate.
CONTROL_PARTS = ("header", "indices")
CONTROL_RATE = 1 / 3

CRC_BITS = 24
SHORT_BITS, SHORT_RATE = 292, 0.85  # up to so many bits the decoder can fail without any noise at rates above 0.85
BLOCK_BYTES = 475  # with its CRC 3824 bits: the most that one base graph (TS 38.212, 5.2.2) takes at every rate
INDEX_BLOCK_BYTES = 64  # small, so that the blocks before the first lost one still say something
ITERATIONS = 20  # of belief propagation, which are the time that decoding takes; 10 cost 0.6 dB
LIMIT_DB = 100  # beyond +-100 dB nothing changes any more; float32 stays far from its ends
BATCH = 8  # code blocks per call: larger batches leave the CPU's cache


@dataclass(frozen=True)
class Segments:
    """How a part is sent: `count` blocks of `size` payload bytes; k bits with CRC, n coded bits, Q bits per symbol."""

    count: int
    size: int
    k: int
    n: int
    bits_per_symbol: int

    @property
    def uses(self):
        """Complex channel uses of the whole part."""
        return self.count * self.n // self.bits_per_symbol


def segment(num_bytes, block_bytes, rate, bits_per_symbol):
    """Cut `num_bytes` into the fewest equal blocks of at most `block_bytes`, and size the code.

    Sizes are stepped (by 4 bytes up to 127, then by a sixteenth of the power of two below), so that few different codes
    are built; the last block is filled up with zeros.

    :param rate: wanted code rate k / n. n is rounded up to whole symbols, or down where that falls below rate 1/5.
    """
    count = -(-num_bytes // block_bytes)
    share = -(-num_bytes // max(1, count))
    step = 1 << max(2, share.bit_length() - 5)
    size = min(block_bytes, -(-share // step) * step)
    k = 8 * size + CRC_BITS
    rate = min(rate, SHORT_RATE) if k <= SHORT_BITS else rate
    n = bits_per_symbol * math.ceil(k / (rate * bits_per_symbol) - 1e-9)
    if n > 5 * k:
        n -= bits_per_symbol
    return Segments(count, size, k, n, bits_per_symbol)


@functools.cache
def _sionna():
    """Import sionna's modules (crc, ldpc, mapping; seconds, once), and put the global random states back."""
    python, numpy = random.getstate(), np.random.get_state()  # importing it reseeds them, and torch's
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that it keeps the state of several devices
        try:
            with torch.random.fork_rng():
                from sionna.phy import mapping
                from sionna.phy.fec import crc, ldpc
        except ModuleNotFoundError as error:
            raise InputError("--link digital needs sionna: pip install sionna-no-rt") from error
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
    return crc, ldpc, mapping


@functools.lru_cache(maxsize=48)  # some MB and up to 0.1 s of building each
class _BlockCode:
    """CRC, whitening, LDPC and QAM for blocks of k bits in n coded bits.

    Whitening (exclusive or with a fixed sequence, CRC included) gives symbols mean power 1 whatever the payload, and
    makes the CRC of the all-zero word, which a dead channel decodes to, wrong.
    """

    def __init__(self, k, n, bits_per_symbol):
        crc, ldpc, mapping = _sionna()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # sionna warns of rates in 0.926...0.95, which it codes all the same
            self.ldpc = ldpc.LDPC5GEncoder(k, n, num_bits_per_symbol=bits_per_symbol, device="cpu")
        self.decoder = ldpc.LDPC5GDecoder(self.ldpc, num_iter=ITERATIONS, device="cpu")
        self.crc = crc.CRCEncoder("CRC24A", k=k - CRC_BITS, device="cpu")
        self.check = crc.CRCDecoder(self.crc, device="cpu")
        self.mapper = mapping.Mapper("qam", bits_per_symbol, device="cpu")
        self.demapper = mapping.Demapper("app", "qam", bits_per_symbol, device="cpu")
        self.whitening = torch.randint(2, (k,), generator=random_streams.generator(0, "whitening", k)).float()

    def encode(self, payload):
        """Bytes (B, size) uint8 array -> symbols (B, n / Q) complex64 of mean power 1."""
        bits = torch.from_numpy(np.unpackbits(payload, axis=1)).float()
        return self.mapper(self.ldpc((self.crc(bits) - self.whitening).abs()))

    def decode(self, y, noise_power):
        """Equalised symbols (B, n / Q) and their noise variance -> B payloads, None where the CRC failed."""
        words = self.decoder(self.demapper(y, torch.tensor(noise_power)))  # (B, k)
        bits, valid = self.check((words - self.whitening).abs())
        payload = np.packbits(bits.to(torch.uint8).numpy(), axis=1)
        return [row.tobytes() if good else None for row, good in zip(payload, valid.flatten().tolist(), strict=True)]


@dataclass
class Delivery:
    """What the receiver got, and what it cost.

    :param blocks: part -> payload of each code block in order, None where its CRC failed.
    :param uses, message_bits: complex channel uses, and bits of the message before coding, of all parts.
    :param realised_es_n0_db: mean |x|^2 / mean |n|^2 of what was sent, in dB, without the fading; NaN of nothing.
    """

    blocks: dict[str, list[bytes | None]]
    uses: int
    message_bits: int
    realised_es_n0_db: float

    def part(self, name):
        """Return the whole part, or None where any of its blocks was lost."""
        return None if None in self.blocks[name] else b"".join(self.blocks[name])

    def prefix(self, name):
        """Return the bytes before the first lost block."""
        return b"".join(itertools.takewhile(lambda block: block is not None, self.blocks[name]))

    def facts(self, height, width):
        """Return the table columns of a picture's delivery; Eb/N0 is per bit of the message, before coding."""
        blocks = [block for part in self.blocks.values() for block in part]
        return {
            "channel_uses": self.uses,
            "bandwidth_ratio": self.uses / (3 * height * width),
            "realised_snr_db": self.realised_es_n0_db,
            "eb_n0_db": self.realised_es_n0_db - 10 * math.log10(self.message_bits / self.uses),
            "blocks": len(blocks),
            "block_errors": blocks.count(None),
        }


class DigitalChannel:
    """Sends a message's parts as 5G LDPC code words over AWGN or block Rayleigh fading.

    "header" and "indices" are coded in QPSK at rate 1/3, or at `code_rate` where that is lower; every other part in
    `modulation` at `code_rate`. Measured on AWGN: no block is lost of 16-QAM at rate 1/2 from Es/N0 = 7 dB (all at
    5 dB), of QPSK at 1/3 from 0 dB (all at -2.5 dB), of QPSK at 1/5 from -3 dB.

    :param snr_db: Es/N0 in dB, finite; beyond +-100 dB it acts as +-100 dB, which is all right or all lost.
    :param modulation: "qpsk", "16qam" or "64qam".
    :param code_rate: k / n of the LDPC code, 1/5...0.95 (what 5G's can do without repeating bits), CRC included in k.
    :param fading: "awgn", or "rayleigh": y = h x + n with one h ~ CN(0, 1) per part, known to the receiver. A part
        whose |h|^2 Es/N0 lies below its code's cliff is lost as a whole (outage).
    """

    def __init__(self, snr_db, modulation="16qam", code_rate=0.5, fading="awgn"):
        self.modulation, self.code_rate, self.fading = modulation, code_rate, fading
        self.noise_power = 10 ** (-min(max(snr_db, -LIMIT_DB), LIMIT_DB) / 10)  # variance N0 of the complex noise
        _sionna()

    def segments(self, name, num_bytes):
        """Return the `Segments` of a part of `num_bytes`: what it would cost, without sending it."""
        if name in CONTROL_PARTS:
            block_bytes = INDEX_BLOCK_BYTES if name == "indices" else BLOCK_BYTES
            return segment(num_bytes, block_bytes, min(CONTROL_RATE, self.code_rate), MODULATIONS["qpsk"])
        return segment(num_bytes, BLOCK_BYTES, self.code_rate, MODULATIONS[self.modulation])

    def __call__(self, sent, receiver, stream):
        """Send a `Sent`: return the receiver's `Arrival`, and table columns."""
        delivery = self.send(sent.parts, stream)
        arrived = {name: delivery.part(name) for name in delivery.blocks}
        arrival = receiver.accept(receiver.session.decode(arrived, delivery.prefix("indices")))
        return arrival, delivery.facts(*sent.y.shape[2:])

    @torch.inference_mode()
    def send(self, parts, generator):
        """Send {name: bytes} and return the `Delivery`. An empty part costs nothing and arrives.

        One number is drawn from the CPU `torch.Generator`; a part's noise and fading follow from it and its name alone.
        """
        seed = int(torch.randint(2**63 - 1, (), generator=generator))
        blocks, uses, energies = {name: [] for name in parts}, 0, torch.zeros(2, dtype=torch.float64)
        for name, data in parts.items():
            if data:
                stream = random_streams.generator(seed, "digital channel", random_streams.text_number(name))
                segments = self.segments(name, len(data))
                blocks[name], energy = self._send_part(data, segments, stream)
                uses, energies = uses + segments.uses, energies + energy
        realised = float(10 * torch.log10(energies[0] / energies[1]))  # NaN of nothing
        return Delivery(blocks, uses, 8 * sum(map(len, parts.values())), realised)

    def _send_part(self, data, segments, stream):
        """Return ([payload or None, per block], energies of symbols and noise (2,))."""
        h = torch.ones((), dtype=torch.complex64)
        if self.fading == "rayleigh":
            h = torch.randn((), dtype=torch.complex64, generator=stream)
        blocks, energies = [], torch.zeros(2, dtype=torch.float64)
        code = _BlockCode(segments.k, segments.n, segments.bits_per_symbol)
        filled = np.frombuffer(data.ljust(segments.count * segments.size, b"\0"), np.uint8)
        for payload in np.split(filled.reshape(-1, segments.size), range(BATCH, segments.count, BATCH)):
            x = code.encode(payload)  # (B, n / Q)
            noise = math.sqrt(self.noise_power) * torch.randn(x.shape, dtype=x.dtype, generator=stream)
            y = h * x + noise
            blocks += code.decode(y / h, self.noise_power / float(h.abs()) ** 2)
            energies += torch.stack([part.abs().double().square().sum() for part in (x, noise)])
        if blocks[-1]:  # cut off what filled the last block up
            blocks[-1] = blocks[-1][: len(data) - (segments.count - 1) * segments.size]
        return blocks, energies
