"""Both ends of the link and the channel between them (Diff-GOn, arXiv 2412.06980, fig. 1): scene, message, picture.

Both ends condition on the semantics *after* source coding, and draw all that is random from (bank seed, index,
timestep). So after a channel without errors the receiver's picture, made alone (batch 1), is the transmitter's local
one: bit for bit on one machine, library version and thread count.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch

from ..console import InputError
from ..data.pictures import to_uint8
from ..data.semantics import LABEL_SCALES, SemanticCoding, conditioning_channels, describe, restore
from ..diffusion.sampling import SampleResult
from .channel import sent_planes, transmit
from .color_layer import TRAINED, encode_color, received_planes
from .message import CRC_BYTES, Header, Message, receive_parts
from .selection import Choice

LABEL_SHARE = 1 / 3  # of a target's bytes that a label map finer than the coarsest may take


def condition(header, label, boundary=None, edges=None):
    """Build the conditioning that a message stands for; both ends call this.

    :param label, boundary, edges: as in `Message`; a boundary or edges that are lost, too, are None.
    :return: (1, C, H, W) float32.
    """
    size, form = (header.height, header.width), (header.num_classes, header.one_hot, header.edge_plane)
    coding = SemanticCoding(header.label_scale, header.edge_levels, edge_scale=header.edge_scale)
    if header.boundaries and boundary is None:
        boundary = np.zeros(size, bool)  # boundaries between classes follow from the labels
    maps = label.astype(np.int64), boundary, edges
    planes = (None if plane is None else torch.from_numpy(plane)[None, None] for plane in maps)  # (1, 1, h, w) each
    return restore(*planes, coding, size, *form)


@dataclass(frozen=True)
class Sent:
    """What the transmitter has for one scene: message, conditioning (1, C, H, W), and the choice if one was made."""

    message: Message
    y: torch.Tensor
    choice: Choice | None


class Transmitter:
    """Turns scenes into messages.

    :param template: a `Header` that says everything but the picture's size and what is found out on the way.
    :param coding, chain: the `SemanticCoding`, and the `Chain` that both ends run, for local generative feedback.
    :param choose: function (chain, y, scene, start, on_step) -> `Choice`, or None to take the start that is asked for.
    :param local: make the local picture even where nothing is chosen.
    :param color_step, color_prior: of the colour layer (see `encode_color`); None: the network has none.
    :param target: function (H, W) -> bytes that a message never exceeds; None: no limit. It decides the label scale and
        the colour step that are 0: the finest label map that takes at most `LABEL_SHARE` of the bytes, else the
        coarsest, and then the finest colour layer that fits.
    """

    def __init__(self, template, coding, chain, choose=None, local=False, color_step=0, color_prior=None, target=None):
        self.template, self.coding, self.chain, self.choose, self.local = template, coding, chain, choose, local
        self.color_step, self.color_prior, self.target = color_step, color_prior, target

    def describe(self, scene, start=0):
        """Write the message of one scene whose chain starts from bank entry `start`.

        :param scene: dict of label (1, 1, H, W) and, where there are, instance and image_edge (see `load_data`).
        :return: (`Message`, y): the message, and the conditioning (1, C, H, W) that it stands for.
        :raises InputError: the smallest message is larger than the target.
        """
        coding, color = self.coding, b""
        if self.target:
            coding, left = self._spend(scene, self.target(*scene["label"].shape[2:]))
        message, y = self._semantics(scene, start, coding)
        if self.color_prior is None:
            return message, y
        if "image" in scene:
            picture = to_uint8(scene["image"])[0]
            color = self._finest(picture, left) if self.target else self._layer(picture, self.color_step)
        planes = received_planes(color, y.shape[2:], self.color_prior)
        return replace(message, color=color), torch.cat([y, planes], dim=1)

    def _spend(self, scene, target):
        """Return the `SemanticCoding` of a picture, and how many of the target's bytes are left for its layer."""
        header = self.template
        choice = tuple(range(header.step_atoms)), (1,) * header.step_atoms  # any: all take the same bits
        rest = {"codewords": (choice,) * header.selected_steps}
        for scale in LABEL_SCALES if not self.coding.label_scale else [self.coding.label_scale]:
            coding = replace(self.coding, label_scale=scale)
            message = replace(self._semantics(scene, 0, coding)[0], **rest)
            if len(message.parts["labels"]) <= LABEL_SHARE * target:
                break
        left = target - len(message.to_bytes())
        if left < 0:
            found = f"{scene['path'][0]}: its smallest message without colours has {len(message.to_bytes())} bytes"
            raise InputError(f"{found}, the target is {target}; raise --target_bpp, or give a larger --label_scale")
        return coding, left

    def _layer(self, picture, step):
        return bytes([step]) + encode_color(picture, step, self.color_prior)

    def _finest(self, picture, left):
        """Return the colour part with the smallest step whose bytes fit, or none where none does."""
        steps, best = [self.color_step] if self.color_step else TRAINED, b""
        low, high = 0, len(steps) - 1
        while low <= high:
            middle = (low + high) // 2
            color = self._layer(picture, steps[middle])
            if len(color) + CRC_BYTES <= left:
                best, high = color, middle - 1
            else:
                low = middle + 1
        return best

    def _semantics(self, scene, start, coding):
        """Return the message of a scene's semantics and noise, and the conditioning (1, C, H, W) it stands for."""
        planes = describe(scene["label"], scene.get("instance"), scene.get("image_edge"), coding)
        label, boundary, edges = (None if plane is None else plane[0, 0].numpy() for plane in planes)
        if not self.template.edge_plane:
            boundary = edges = None
        height, width = scene["label"].shape[2:]
        levels = 0 if edges is None else coding.edge_levels
        size = {"height": height, "width": width, "label_scale": coding.label_scale}
        header = replace(self.template, **size, boundaries=boundary is not None, edge_levels=levels)
        maps = label.astype("uint8"), boundary, edges
        return Message(header, *maps, start if header.start_sent else None), condition(header, *maps)

    def send(self, scene, start, on_step=None):
        """Describe one scene, choose its noise, and write the message: `Sent`.

        :param scene: as for `describe`, with image (1, 3, H, W) where noise is to be chosen.
        :param start, on_step: bank index of x_T where none is chosen; called at every step of every local chain.
        """
        if self.choose is not None and "image" not in scene:
            raise InputError("noise selection compares with the picture, and this split has labels alone")
        (message, y), choice = self.describe(scene, start), None
        if self.choose is not None:
            choice = self.choose(self.chain, y, scene, start, on_step)
        elif self.local:
            choice = self.chain.choice(self.chain.run(y, [start], on_step=on_step), start)
        if choice is not None:
            stop = choice.steps % self.chain.diffusion.num_timesteps  # 0: it did not
            header, start = replace(message.header, stop_step=stop), choice.index if message.header.start_sent else None
            message = replace(message, header=header, start_index=start, codewords=choice.codewords)
        return Sent(message, y, choice)


@dataclass(frozen=True)
class Arrival:
    """What a receiver knows of one picture: y is the conditioning (1, C, H, W), the rest as in `Message`."""

    header: Header
    y: torch.Tensor
    start: int
    codewords: tuple
    problems: tuple = ()


class Receiver:
    """Turns what arrived into pictures, and never fails on what the channel did.

    Error concealment: lost labels become the null conditioning, edges none, indices entry 0 and seeded noise.

    :param make_chain: function Header -> `Chain`; raises InputError where the message was not made for this receiver.
    :param color_prior: of a network with a colour layer, or None.
    """

    def __init__(self, make_chain, color_prior=None):
        self.make_chain, self.color_prior = make_chain, color_prior

    def accept(self, reception):
        """Make an `Arrival` of what `receive_parts` returns; None where the header is lost."""
        header = reception.header
        if header is None:
            return None
        channels = conditioning_channels(header.num_classes, header.one_hot, not header.edge_plane)
        y = torch.zeros(1, channels, header.height, header.width)
        if reception.label is not None:
            y = condition(header, reception.label, reception.boundary, reception.edges)
        if self.color_prior is not None:
            planes = received_planes(reception.color, (header.height, header.width), self.color_prior)
            y = torch.cat([y, planes], dim=1)
        return Arrival(header, y, reception.start_index or 0, reception.codewords, reception.problems)

    def pictures(self, arrivals, on_step=None):
        """Run the chains of arrivals of one picture size, together where they ask for one chain: a `SampleResult`."""
        chains, found = [self.make_chain(arrival.header) for arrival in arrivals], {}
        for chain in {id(chain): chain for chain in chains}.values():
            own = {k: arrival for k, arrival in enumerate(arrivals) if chains[k] is chain}
            y, starts = torch.cat([each.y for each in own.values()]), [each.start for each in own.values()]
            result = chain.run(y, starts, [each.codewords for each in own.values()], on_step=on_step)
            found |= zip(own, zip(result.images, result.steps, strict=True), strict=True)
        return SampleResult(*(torch.stack(each) for each in zip(*(found[k] for k in sorted(found)), strict=True)))


# Each channel has `send(sent, receiver, stream)`: it sends one `Sent`, with noise from the CPU generator `stream`, and
# returns the receiver's `Arrival` (None where the header is lost) and a dict of table columns.


class AnalogChannel:
    """Gaussian noise sigma on the semantic planes, then a pool (see `channel`); header and indices arrive."""

    def __init__(self, sigma, pool="None"):
        self.sigma, self.pool = sigma, pool

    def send(self, sent, receiver, stream):
        message, header = sent.message, sent.message.header
        form = {"num_classes": header.num_classes, "one_hot": header.one_hot}
        channels = conditioning_channels(header.num_classes, header.one_hot, not header.edge_plane)
        semantics, layer = sent.y[:, :channels], sent.y[:, channels:]  # a colour layer arrives as it is
        received = transmit(semantics, self.sigma, generators=[stream], pool=self.pool, **form)
        received, facts = torch.cat([received, layer], dim=1), analog_facts(semantics, self.sigma, **form)
        return Arrival(header, received, message.start_index or 0, message.codewords), facts


class IdealChannel:
    """The message's bytes arrive as they are."""

    def send(self, sent, receiver, stream):
        return receiver.accept(receive_parts(sent.message.parts)), {}


class DigitalChannel:
    """The message's bytes, channel-coded part by part by a `DigitalLink` (see `channel_coding`)."""

    def __init__(self, link):
        self.link = link

    def send(self, sent, receiver, stream):
        delivery = self.link.send(sent.message.parts, stream)
        arrived = {name: delivery.part(name) for name in delivery.blocks}
        arrival = receiver.accept(receive_parts(arrived, delivery.prefix("indices")))
        return arrival, digital_facts(delivery, *sent.y.shape[2:])


def analog_facts(y, sigma, num_classes, one_hot):
    """Report what one conditioning (1, C, H, W) costs on the analog channel: P real planes take PHW/2 complex uses.

    `realised_snr_db` is the mean power of the sent planes over sigma^2, the true ratio beside the nominal one.
    """
    planes = y[0, sent_planes(y, num_classes, one_hot)[0]]  # (P, H, W)
    uses, power = planes.numel() / 2, float(planes.square().mean())
    realised = 10 * torch.tensor(power / sigma**2).log10().item() if sigma and power else math.inf
    return {"channel_uses": uses, "bandwidth_ratio": uses / (3 * y[0, 0].numel()), "realised_snr_db": realised}


def digital_facts(delivery, height, width):
    """Report what one `Delivery` cost, and how it went; Eb/N0 is per bit of the message, before coding."""
    uses, blocks = delivery.uses, [block for part in delivery.blocks.values() for block in part]
    return {
        "channel_uses": uses,
        "bandwidth_ratio": uses / (3 * height * width),
        "realised_snr_db": delivery.realised_es_n0_db,
        "eb_n0_db": delivery.realised_es_n0_db - 10 * math.log10(delivery.message_bits / uses),
        "blocks": len(blocks),
        "block_errors": blocks.count(None),
    }
