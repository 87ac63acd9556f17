"""From a sampling configuration to both ends of the link, the channel between them, and what measures the result."""

import copy
import dataclasses
import functools
from pathlib import Path

from .build import data_set, diffusion_from, noise_bank, picture_size, precision_of, semantic_coding, untrained_model
from .config import parts_of, sweep
from .console import InputError
from .data.datasets import PictureFolder
from .diffusion.sampling import EarlyStop
from .diffusion.solvers import SamplerSettings
from .diffusion.unet import check_size
from .evaluation.metrics import Metrics, distance
from .evaluation.report import Measures
from .files import file_digest
from .link.channel import snr_to_sigma
from .link.color_layer import ColorPrior
from .link.label_prior import LabelPrior
from .link.message import SESSION, Header, Session
from .link.selection import Chain, StepCodebook, rare_weights, select_both, select_initial, select_per_step
from .link.transceiver import AnalogChannel, DigitalChannel, IdealChannel, Receiver, Transmitter
from .training import devices
from .training.checkpoint import load_weights

MAX_AREA = 16  # of pictures that a message may ask for, in squares of image_size
SEARCH_BATCH = 8  # candidates that run together; not --batch_size, which must not decide near ties


def sampling_parts(config, weights, log, ranks=None):
    """Build what a sampling run needs, for all its points, with the file `weights`; refuse what can be refused.

    :return: dict of bank, dataset, measures, and the functions transmitter(point), receiver(point) and channel(point).
    """
    device = _device(config, ranks)
    precision, coding = precision_of(config, device, log), semantic_coding(config)
    for point in sweep(config) if config.role == "link" else ():
        channel(point)
    measures, distances = _measures(config, device), _distances(config, device)
    model, dataset = untrained_model(config), scenes(config, log, device)
    height, width = picture_size(dataset, model)
    load_weights(model, weights)
    model = devices.for_sampling(model, device, precision, config.compile, log)
    batch = min(config.batch_size, config.num_samples, len(dataset)) if config.role == "link" else 1
    log(describe_label_memory(model, height, width, batch, precision, config.label_memory))
    make_chain = ChainMaker(config, height, width, device, weights, lambda precision: model)
    session = Session(_header(config, precision, height, width, make_chain.fingerprint), *_priors(config, model))
    if config.role != "link" or parts_of(config.link) != ["analog"]:
        session.template.check()
    rule = EarlyStop(config.stop_tol, config.stop_patience, config.stop_min_steps) if config.stop_tol else None

    def transmitter(point):
        # A chain that stops early does so where the transmitter's did, which the message tells.
        local = point.role == "transmit" or point.local_picture or (rule is not None and point.link != "analog")
        chain = make_chain(session.template, rule)
        spending = {"sent": parts_of(config.send), "color_step": config.color_step, "target": _target(point)}
        return Transmitter(session, coding, chain, _chooser(point, distances), local, **spending)

    def receiver(point):
        maker = functools.partial(make_chain, rule=rule if point.link == "analog" else None)
        return Receiver(session, maker)

    ends = {"transmitter": transmitter, "receiver": receiver, "channel": channel}
    return {"bank": make_chain.bank, "dataset": dataset, "measures": measures, **ends}


def receiving_parts(config, weights, log, ranks=None):
    """Build what the receiver alone needs: dict of make_chain (Header -> `Chain`) and receiver()."""
    device, model = _device(config, ranks), untrained_model(config)
    precision_of(config, device, log)
    load_weights(model, weights)

    @functools.cache
    def model_of(precision):  # another message may ask for another one
        shared = precision == "fp32" and not config.compile  # neither rounds nor compiles it
        own = model if shared else copy.deepcopy(model)
        return devices.for_sampling(own, device, precision, config.compile, log)

    make_chain = ChainMaker(config, config.image_size, 2 * config.image_size, device, weights, model_of)

    def receiver():
        return Receiver(Session.load(Path(config.messages, SESSION), *_priors(config, model)), make_chain)

    return {"make_chain": make_chain, "receiver": receiver}


def _priors(config, model):
    return LabelPrior.of(model, config.num_classes), ColorPrior.of(model)


def _device(config, ranks):
    device = devices.select_device(config.device, ranks)
    if config.compile:
        devices.check_compiler(device)
    return device


def scenes(config, log, device="cpu"):
    """Open the split: with the data set's label maps, or with those that an extractor reads off the pictures."""
    if config.extractor == "gt":
        return data_set(config, config.is_train, log)
    from .evaluation.segmenters import load_network, segment

    network = load_network(config.extractor, "extractor", device)

    def extract(image):
        return segment(network, image, config.num_classes, "extractor").cpu()

    place = config.dataset_mode, config.data_dir, config.image_size
    chosen = {"only": config.only, "leave_out": config.leave_out}
    return PictureFolder(*place, config.is_train, extract, config.no_instance, **chosen)


def channel(point):
    """Return the channel of one point."""
    if point.link == "analog":
        return AnalogChannel(snr_to_sigma(point.snr), point.pool)
    if point.link == "ideal":
        return IdealChannel()
    from .link.channel_coding import DigitalLink

    return DigitalChannel(DigitalLink(point.snr, point.modulation, point.code_rate, point.fading))


def describe_label_memory(model, height, width, batch, precision, limit):
    """Return a line that says whether cached SPADE modulation fits `limit`, which is --label_memory, in GiB."""
    need = model.modulation_bytes(batch, height, width, 4 if precision == "fp32" else 2) / 2**30
    how = "computed once for each chain"
    if need > limit:
        how = f"more than --label_memory {limit:g}, so computed at every step: slower; raise it or lower --batch_size"
    return f"label maps of {batch} picture{'s' if batch > 1 else ''}: {need:.2g} GiB of scales and shifts, {how}"


class ChainMaker:
    """Makes the `Chain` that a message's header asks for, with this end's model and bank; one is kept per kind.

    :param height, width: of the pictures that `bank` has noise for; a chain takes the bank of its own size.
    :param weights: path of the weights file: the first 16 digits of its SHA-256 are the model's fingerprint.
    :param model_of: function precision -> network.
    """

    def __init__(self, config, height, width, device, weights, model_of):
        self.config, self.device, self.model_of, self._chains = config, device, model_of, {}
        self.fingerprint, self.bank = file_digest(weights).hex()[:16], noise_bank(config, height, width)

    def __call__(self, header, rule=None):
        """Return the chain. A header without a stop step leaves stopping to `rule`, an `EarlyStop` or None."""
        self._check(header)
        maps = {"height": 1, "width": 1, "boundaries": False, "label_scale": 1, "edge_levels": 0, "edge_scale": 1}
        key = dataclasses.replace(header, **maps), rule
        if key not in self._chains:
            self._chains[key] = self._build(header, rule)
        return self._chains[key]

    def _check(self, header):
        """Refuse a message that was made for another model, or is too large a picture."""
        config = self.config
        names = ("fingerprint", "num_classes", "one_hot", "edge_plane", "bank_seed", "bank_size")
        maps = config.num_classes, config.one_hot_label, not config.no_instance
        ours = self.fingerprint, *maps, config.noise_bank_seed, config.noise_bank_size
        for name, own in zip(names, ours, strict=True):
            if getattr(header, name) != own:
                found = f"the message was made with {name} {getattr(header, name)!r}, these weights have {own!r}"
                raise InputError(f"{found}; give --model_path the transmitter's file")
        if header.height * header.width > MAX_AREA * config.image_size**2:
            found = f"the message is of a {header.height}x{header.width} picture"
            raise InputError(f"{found}, more than {MAX_AREA} times --image_size {config.image_size} squared")
        if devices.usable_precision(self.device, header.precision)[0] != header.precision:
            raise InputError(f"the message needs {header.precision}, which this device lacks; receive it elsewhere")
        check_size(header.height, header.width, self.model_of(header.precision).downsampling)

    def _build(self, header, rule):
        steps = {"timestep_respacing": header.sampler.steps, "start_time": header.sampler.start_time}
        diffusion = diffusion_from(self.config, **steps).to(self.device)
        if header.stop_step and self.config.realism:
            # The answer is x_0's prediction at that step: every step counts as settled, and none before counts.
            rule = EarlyStop(float("inf"), 1, header.stop_step)
        precision = functools.partial(devices.autocast, self.device, header.precision)
        memory = int(self.config.label_memory * 2**30)
        fixed = self.model_of(header.precision), diffusion, self.bank, header.sampler
        options = {}
        if self.config.color_layer:
            whole = diffusion_from(self.config, timestep_respacing="", start_time=0)
            options = {"realism": self.config.realism, "whole": whole.to(self.device)}
        return Chain(*fixed, rule, header.selected_steps, self.device, precision, memory, **options)


def _header(config, precision, height, width, fingerprint):
    """Return the template of all messages' headers."""
    selecting, eta = config.selection != "initial", config.eta if config.sampler == "ddim" else 0.0
    variance = "posterior" if selecting and config.sampler == "ddpm" else "model"
    chain = {"method": config.sampler, "steps": config.timestep_respacing, "tail_steps": config.tail_steps}
    chain["start_time"] = config.start_time if config.color_layer else 0
    clip = config.clip_denoised and not config.color_layer  # what a layer lacks has no range
    sampler = SamplerSettings(**chain, s=config.s, eta=eta, clip_denoised=clip, variance=variance)
    form = {"num_classes": config.num_classes, "one_hot": config.one_hot_label, "edge_plane": not config.no_instance}
    coding = {"label_scale": config.label_scale or 1, "edge_scale": config.edge_scale}
    coding["edge_levels"] = 0 if config.no_instance else config.edge_levels
    noise = {"bank_seed": config.noise_bank_seed, "bank_size": config.noise_bank_size, "sampler": sampler}
    noise |= {"start_sent": config.selection != "per_step", "selected_steps": 0}
    if selecting:
        every = max(1, diffusion_from(config).num_timesteps - max(1, config.tail_steps))
        noise |= {"selected_steps": config.selected_steps or every, "step_candidates": config.step_candidates}
        noise["step_atoms"] = config.step_atoms
    form |= {"height": height, "width": width, "precision": precision, "fingerprint": fingerprint}
    return Header(**form, **coding, **noise)


def _target(config):
    """Return the function (H, W) -> bytes of --target_bpp or --target_bytes; None without them."""
    if config.target_bytes:
        return lambda height, width: config.target_bytes
    if config.target_bpp:
        return lambda height, width: int(config.target_bpp * height * width / 8)
    return None


def _distances(config, device):
    """Return a function from a scene to its distance (candidates, image) -> (N,); None where nothing is searched."""
    if config.noise_index != "best" and config.selection == "initial":
        return None
    if config.distance != "segmenter":
        measure = distance(config.distance, config.lpips_weights, device)
        return lambda scene: measure
    from .evaluation.segmenters import disagreement, load_network

    network = load_network(config.segmenter, "segmenter", device)
    return lambda scene: lambda pictures, _: disagreement(network, pictures, scene["label"], config.num_classes)


def _chooser(config, distances):
    """Return the transmitter's function (chain, y, scene, start) -> `Choice`, or None where nothing is chosen."""
    if distances is None:
        return None
    codebook = StepCodebook(config.step_candidates, config.step_atoms) if config.selection != "initial" else None
    search = {"batch_size": SEARCH_BATCH, "feedback_steps": config.feedback_steps}

    def choose(chain, y, scene, start, on_step=None):
        image, measure, candidates = scene["image"], distances(scene), range(config.candidates)
        weight = rare_weights(scene["label"]).to(chain.device) if config.selection_weight == "rare" else 1.0
        if config.noise_index != "best":
            return select_per_step(chain, y, image, start, codebook, measure, on_step, weight)
        if codebook is None:
            return select_initial(chain, y, image, candidates, measure, on_step=on_step, **search)
        return select_both(chain, y, image, candidates, codebook, measure, on_step, weight, **search)

    return choose


def _measures(config, device):
    """Return the `Measures` that were asked for, with their networks."""
    names, codecs, networks = parts_of(config.metrics), parts_of(config.baseline), {}
    for codec in codecs:
        from .evaluation.codecs import check_installed

        check_installed(codec)
    if config.features or "miou" in names:
        from .evaluation.segmenters import features_of, load_network, segment
    if config.features and {"fid", "kid"} & {*names}:
        networks["features"] = features_of(load_network(config.features, "features", device))
    if "miou" in names:
        network = load_network(config.segmenter, "segmenter", device)
        networks["segmenter"] = lambda images: segment(network, images, config.num_classes)
    files = config.lpips_weights, config.fid_weights
    metrics = Metrics(names, config.num_classes, *files, device=device, **networks)
    if "miou" in names and config.extractor != "gt":
        metrics.notes.add("miou is measured against the extractor's label maps: the pictures' own are not known")
    return Measures(metrics, codecs)
