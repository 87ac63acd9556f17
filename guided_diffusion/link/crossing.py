"""How messages cross: noise on the planes (GESCO), coded bits, or bits that simply arrive.

Each way has `cross(sent, receiver, stream)`: it gives the receiver's `Arrival` (None: nothing can be made of it) and what
there is to report, as a dict of table columns.
"""

import torch

from .channel import sent_planes, transmit
from .message import receive_parts
from .transceiver import Arrival


class AnalogCrossing:
    """Gaussian noise on the semantic planes, then a pool (see `channel`); header and indices arrive.

    :param sigma: standard deviation of the noise.
    :param pool: "None", "med", "mean" or "max".
    """

    def __init__(self, sigma, pool="None"):
        self.sigma, self.pool = sigma, pool

    def cross(self, sent, receiver, stream):
        """Send one message; `stream` is a CPU generator."""
        header = sent.message.header
        received = transmit(
            sent.y,
            self.sigma,
            generators=[stream],
            num_classes=header.num_classes,
            one_hot=header.one_hot,
            pool=self.pool,
        )
        message = sent.message
        arrival = Arrival(header, received, message.start_index or 0, message.codewords)
        return arrival, analog_facts(sent.y, self.sigma, header.num_classes, header.one_hot)


def analog_facts(y, sigma, num_classes, one_hot):
    """Report what one conditioning (1, C, H, W) costs on the analog channel.

    P planes of H x W real values take PHW/2 complex uses. `realised_snr_db` is the mean power of the sent planes over
    sigma^2, the true signal-to-noise ratio beside the nominal one.
    """
    height, width = y.shape[2:]
    sent = sent_planes(y, num_classes, one_hot)[0]
    uses = int(sent.sum()) * height * width / 2
    power = float(y[0, sent].square().mean()) if sent.any() else 0.0
    realised = 10 * torch.tensor(power / sigma**2).log10().item() if sigma and power else float("inf")
    return {"channel_uses": uses, "bandwidth_ratio": uses / (3 * height * width), "realised_snr_db": realised}


class IdealCrossing:
    """The message's bytes arrive as they are."""

    def cross(self, sent, receiver, stream):
        """Send one message."""
        return receiver.accept(receive_parts(sent.message.parts())), {}


class DigitalCrossing:
    """The message's bytes, channel-coded part by part (see `channel_coding`).

    :param link: a `DigitalLink`.
    """

    def __init__(self, link):
        self.link = link

    def cross(self, sent, receiver, stream):
        """Send one message; `stream` is a CPU generator."""
        parts = sent.message.parts()
        delivery = self.link.send(parts, stream)
        arrived = {name: delivery.part(name) for name in parts}
        arrival = receiver.accept(receive_parts(arrived, delivery.prefix("indices")))
        height, width = sent.y.shape[2:]
        return arrival, digital_facts(delivery, height, width)


def digital_facts(delivery, height, width):
    """Report what one `Delivery` cost, and how it went."""
    uses = sum(delivery.uses.values())
    return {
        "channel_uses": uses,
        "bandwidth_ratio": uses / (3 * height * width),
        "realised_snr_db": delivery.realised_es_n0_db,
        "eb_n0_db": delivery.realised_eb_n0_db,
        "blocks": delivery.blocks_sent,
        "block_errors": delivery.block_errors,
    }
