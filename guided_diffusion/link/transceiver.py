"""Both ends of the link and the channel between them (Diff-GOn, arXiv 2412.06980, fig. 1): scene, message, picture.

Both ends condition on the semantics *after* source coding, and draw all that is random from (bank seed, index,
timestep). So after a channel without errors the receiver's picture, made alone (batch 1), is the transmitter's local
one: bit for bit on one machine, library version and thread count.
"""

import functools
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
from .message import Header, Message, Session, to_bytes
from .selection import Choice

LABEL_SHARE = 1 / 3  # of a target's bytes that a label map finer than the coarsest may take


def condition(message, color_prior=None):
    """Build the conditioning (1, C, H, W) float32 that a `Message` stands for; both ends call this.

    What it lacks is the null conditioning: a label map (then edges, too) that is None, a colour layer without bytes.

    :param color_prior: of a network with a colour layer, whose planes are then the last four.
    """
    header, boundary = message.header, message.boundary
    size, form = (header.height, header.width), (header.num_classes, header.one_hot, header.edge_plane)
    if message.label is None:
        y = torch.zeros(1, conditioning_channels(form[0], form[1], not form[2]), *size)
    else:
        coding = SemanticCoding(header.label_scale, header.edge_levels, edge_scale=header.edge_scale)
        if header.boundaries and boundary is None:
            boundary = np.zeros(size, bool)  # boundaries between classes follow from the labels
        maps = message.label.astype(np.int64), boundary, message.edges
        planes = (None if plane is None else torch.from_numpy(plane)[None, None] for plane in maps)  # (1, 1, h, w) each
        y = restore(*planes, coding, size, *form)
    if color_prior is None:
        return y
    return torch.cat([y, received_planes(message.color, size, color_prior)], dim=1)


@dataclass(frozen=True)
class Sent:
    """What the transmitter has for one scene: message, conditioning (1, C, H, W), and the choice if one was made."""

    session: Session
    message: Message
    y: torch.Tensor
    choice: Choice | None

    @functools.cached_property
    def parts(self):
        """The message's parts (see `Session.encode`)."""
        return self.session.encode(self.message)


class Transmitter:
    """Turns scenes into messages.

    :param session: a `Session`, whose template says everything but what is found out on the way.
    :param coding, chain: the `SemanticCoding`, and the `Chain` that both ends run, for local generative feedback.
    :param choose: function (chain, y, scene, start, on_step) -> `Choice`, or None to take the start that is asked for.
    :param local: make the local picture even where nothing is chosen.
    :param sent: which of "labels" and "color" are sent; the latter where the session has a prior for it.
    :param color_step: of the colour layer (see `encode_color`).
    :param target: function (H, W) -> bytes that a message never exceeds; None: no limit. Where the
        label scale is 0, it sends the finest map that takes at most `LABEL_SHARE` of the bytes (all, without a layer),
        else the coarsest; and then the finest layer that fits, but none finer than `color_step`.
    """

    def __init__(
        self, session, coding, chain, choose=None, local=False, sent=("labels", "color"), color_step=0, target=None
    ):
        self.session, self.coding, self.chain, self.choose, self.local = session, coding, chain, choose, local
        self.sent, self.color_step, self.target = sent, color_step, target

    def describe(self, scene, start=0):
        """Write the message of one scene whose chain starts from bank entry `start`.

        :param scene: dict of label (1, 1, H, W) and, where there are, instance and image_edge (see `load_data`).
        :return: (`Message`, y): the message, and the conditioning (1, C, H, W) that it stands for.
        :raises InputError: the smallest message is larger than the target.
        """
        coding, left, prior, color = self.coding, None, self.session.color_prior, b""
        if self.target:
            coding, left = self._spend(scene, self.target(*scene["label"].shape[2:]))
        message = self._semantics(scene, start, coding)
        if prior and "color" in self.sent and "image" in scene:
            color = self._layer(to_uint8(scene["image"])[0], left)
        message = replace(message, color=color)
        return message, condition(message, prior)

    def _spend(self, scene, target):
        """Return the `SemanticCoding` of a picture, and how many of the target's bytes are left for its layer."""
        template, found = self.session.template, None
        share = LABEL_SHARE if self.session.color_prior and "color" in self.sent else 1
        choice = tuple(range(template.step_atoms)), (1,) * template.step_atoms  # any: all take the same bits
        for scale in [self.coding.label_scale] if self.coding.label_scale else reversed(LABEL_SCALES):
            coding = replace(self.coding, label_scale=scale)
            message = replace(self._semantics(scene, 0, coding), codewords=(choice,) * template.selected_steps)
            if self.chain and self.chain.early_stop:
                message = replace(message, header=replace(message.header, stop_step=len(self.chain.diffusion.kept)))
            parts = self.session.encode(message)
            if found and (len(parts["labels"]) > share * target or len(to_bytes(parts)) > target):
                break
            found = coding, target - len(to_bytes(parts))
        if found[1] < 0:
            size = f"{scene['path'][0]}: its smallest message without colours has {target - found[1]} bytes"
            raise InputError(f"{size}, the target is {target}; raise it, --label_scale or lower --step_atoms")
        return found

    def _layer(self, picture, left):
        """Return the colour part of a picture (H, W, 3) uint8; with so many bytes left the finest, or none."""
        finest, best = self.color_step or TRAINED[0], b""
        steps = [finest] if left is None else range(finest, max(finest, TRAINED[-1]) + 1)
        low, high = 0, len(steps) - 1
        while low <= high:
            middle = (low + high) // 2
            color = bytes([steps[middle]]) + encode_color(picture, steps[middle], self.session.color_prior)
            if left is None or len(color) <= left:
                best, high = color, middle - 1
            else:
                low = middle + 1
        return best

    def _semantics(self, scene, start, coding):
        """Return the message of a scene's semantics and noise."""
        template, label, boundary, edges = self.session.template, None, None, None
        if "labels" in self.sent:
            planes = describe(scene["label"], scene.get("instance"), scene.get("image_edge"), coding)
            label, boundary, edges = (None if plane is None else plane[0, 0].numpy() for plane in planes)
            label = label.astype("uint8")
        if not template.edge_plane:
            boundary = edges = None
        height, width = scene["label"].shape[2:]
        size = {"height": height, "width": width, "label_scale": coding.label_scale}
        levels = 0 if edges is None else coding.edge_levels
        header = replace(template, **size, boundaries=boundary is not None, edge_levels=levels)
        return Message(header, label, boundary, edges, start if header.start_sent else None)

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
        return Sent(self.session, message, y, choice)


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

    :param session: a `Session`, which reads the messages.
    :param make_chain: function Header -> `Chain`; raises InputError where the message was not made for this receiver.
    """

    def __init__(self, session, make_chain):
        self.session, self.make_chain = session, make_chain

    def accept(self, message):
        """Make an `Arrival` of a `Message`, or of what arrived of one; None where the header is lost."""
        if message.header is None:
            return None
        try:
            y = condition(message, self.session.color_prior)
        except InputError:  # its layer is damaged
            message = replace(message, color=b"", problems=(*message.problems, "color"))
            y = condition(message, self.session.color_prior)
        return Arrival(message.header, y, message.start_index or 0, message.codewords, message.problems)

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
        if message.label is None:  # no plane is sent
            return receiver.accept(message), {"channel_uses": 0, "bandwidth_ratio": 0, "realised_snr_db": math.inf}
        form = {"num_classes": header.num_classes, "one_hot": header.one_hot}
        channels = conditioning_channels(header.num_classes, header.one_hot, not header.edge_plane)
        semantics, layer = sent.y[:, :channels], sent.y[:, channels:]  # a colour layer arrives as it is
        received = transmit(semantics, self.sigma, generators=[stream], pool=self.pool, **form)
        received, facts = torch.cat([received, layer], dim=1), analog_facts(semantics, self.sigma, **form)
        return Arrival(header, received, message.start_index or 0, message.codewords), facts


class IdealChannel:
    """The message arrives as it is."""

    def send(self, sent, receiver, stream):
        return receiver.accept(receiver.session.decode(sent.parts)), {}


class DigitalChannel:
    """The message, channel-coded part by part by a `DigitalLink` (see `channel_coding`)."""

    def __init__(self, link):
        self.link = link

    def send(self, sent, receiver, stream):
        delivery = self.link.send(sent.parts, stream)
        arrived = {name: delivery.part(name) for name in delivery.blocks}
        arrival = receiver.accept(receiver.session.decode(arrived, delivery.prefix("indices")))
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
    snr = delivery.realised_es_n0_db
    facts = {"channel_uses": uses, "bandwidth_ratio": uses / (3 * height * width), "realised_snr_db": snr}
    facts["eb_n0_db"] = snr - 10 * math.log10(delivery.message_bits / uses)
    return facts | {"blocks": len(blocks), "block_errors": blocks.count(None)}
