"""From a sampling configuration or a checkpoint to both ends of the link, the channel, and what measures the result."""

import dataclasses
import functools
import os
from pathlib import Path
from typing import Any

from .build import data_set, diffusion_from, noise_bank, picture_size, precision_of, semantic_coding, untrained_model
from .config import SampleConfig, adopt_training_config, check_adopted, parse_config, parts_of, surprises, sweep
from .console import InputError, log
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
from .link.transceiver import AnalogChannel, Receiver, Transmitter, ideal_channel
from .training import devices
from .training.checkpoint import find_weights, load_weights, trained_config

MAX_AREA = 16  # of pictures that a message may ask for, in squares of image_size
SEARCH_BATCH = 8  # candidates that run together; not --batch_size, which must not decide near ties


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A trained network, ready for reverse chains, and what belongs to it (see `load_checkpoint`).

    :param model, diffusion: the `UNetModel` on its device, without gradients, and its (respaced) `GaussianDiffusion`.
    :param bank: `NoiseBank` of (3, H, W), H the image_size, W = 2 H for cityscapes, else H; `bank.sized` has others.
    :param config: the `SampleConfig`: every flag of image_sample.py, with what training fixed; model_path is the file.
    """

    model: Any
    diffusion: Any
    bank: Any
    config: SampleConfig

    def scenes(self, extract=None):
        """Open the split of `data_dir` as a `SceneDataset`, whose `batch([k])` is the scene that `Transmitter` takes.

        :param extract: function (1, 3, H, W) -> ids (1, H, W) or scores (1, K, H, W), instead of the data set's maps.
        """
        return scenes(self.config, log, self.link[1].device, extract)

    def transmitter(self, choose=None, distance=None, point=None):
        """Return a `Transmitter`, which chooses noise as the flags say; if they say nothing, by the index in `send`.

        :param choose: selector, a function (chain, y, scene, start, on_step) -> `Choice` (`chain.choice` makes one).
        :param distance: function (pictures (N, 3, H, W), original (1, 3, H, W)) -> (N,), smaller is better: always
            searches, by the flags selection, candidates, feedback_steps, step_candidates and step_atoms.
        :param point: one of `config.sweep`; None: the config.
        """
        config, (session, make_chain, rule) = point or self.config, self.link
        if choose is None:
            distances = (lambda scene: distance) if distance else _distances(config, make_chain.device)
            choose = _chooser(config, distances)
        # A chain that stops early does so where the transmitter's did, which the message tells.
        local = config.role == "transmit" or config.local_picture or (rule is not None and config.link != "analog")
        chain, coding = make_chain(session.template, rule), semantic_coding(config)
        spending = {"sent": parts_of(config.send), "color_step": config.color_step, "target": _target(config)}
        return Transmitter(session, coding, chain, choose, local, **spending)

    def receiver(self, point=None):
        """Return a `Receiver`."""
        (session, make_chain, rule), analog = self.link, (point or self.config).link == "analog"
        return Receiver(session, functools.partial(make_chain, rule=rule if analog else None))

    @functools.cached_property
    def link(self):
        """What both ends share: the `Session`, the `ChainMaker`, and an `EarlyStop` or None."""
        config, device = self.config, next(self.model.parameters()).device
        make_chain = ChainMaker(config, self.bank, device, config.model_path, self.model)
        header = _header(config, *self.bank.shape[1:], make_chain.fingerprint)
        rule = EarlyStop(config.stop_tol, config.stop_patience, config.stop_min_steps) if config.stop_tol else None
        return Session(header, *_priors(config, self.model)), make_chain, rule


def load_checkpoint(path, device="auto", respacing=None, **flags):
    """Load a trained network, with its process and bank: a `Checkpoint`.

    :param path: a checkpoint folder (its newest whole average), an archive (.zip), or a weights file (.pt).
    :param device, respacing, flags: --device, --timestep_respacing ("": all steps; None: as the preset says), and other
        flags of image_sample.py, but no lists of link, pool and snr.
    :raises InputError: naming the file or flag.
    """
    flags |= {"model_path": path, "device": device, "timestep_respacing": respacing}
    words = [f"--{name}={value}" for name, value in flags.items() if value is not None]
    config, given = parse_config(SampleConfig, "", words)
    if len(sweep(config)) > 1:
        raise InputError("a Checkpoint is of one point: give no lists of --link, --pool and --snr")
    config.model_path = find_weights(config.model_path, log=log)
    for line in adopt_checkpoint(config, given, config.model_path):
        log(f"warning: {line}")
    model, device, height = untrained_model(config), _device(config, None), config.image_size
    load_weights(model, config.model_path)
    config.precision = precision_of(config, device, log)
    model = devices.for_sampling(model, device, config.precision, config.compile, log)
    bank = noise_bank(config, height, height * (2 if config.dataset_mode == "cityscapes" else 1))
    return Checkpoint(model, diffusion_from(config).to(device), bank, config)


def adopt_checkpoint(config, given, weights):
    """Take from the config.json of a weights file what training fixed, and check the flags; return warnings."""
    trained, source = trained_config(weights)
    warnings = adopt_training_config(config, given, trained, source) if trained else []
    check_adopted(config, given)
    if config.s > 1 and trained.get("drop_rate") == 0:
        warnings.append(f"--s {config.s:g} guides a model trained without --drop_rate, which never saw empty semantics")
    if not trained and os.path.exists(weights):
        warnings.append(f"no config.json beside {weights}: prediction, schedule and noise bank come from the flags")
    return warnings + surprises(config, given, trained)


def sampling_parts(config, weights, log, ranks=None):
    """Build what a sampling run needs, for all its points, with the file `weights`; refuse what can be refused.

    :return: dict of bank, dataset, measures, and the functions transmitter(point), receiver(point) and channel(point).
    """
    device = _device(config, ranks)
    config = dataclasses.replace(config, model_path=weights, precision=precision_of(config, device, log))
    semantic_coding(config)  # refuses wrong flags
    for point in sweep(config) if config.role == "link" else ():
        channel(point)
    measures, distances = _measures(config, device), _distances(config, device)
    model, dataset = untrained_model(config), scenes(config, log, device)
    height, width = picture_size(dataset, model)
    load_weights(model, weights)
    model = devices.for_sampling(model, device, config.precision, config.compile, log)
    batch = min(config.batch_size, config.num_samples, len(dataset)) if config.role == "link" else 1
    log(describe_label_memory(model, height, width, batch, config.precision, config.label_memory))
    bank = noise_bank(config, height, width)
    both = Checkpoint(model, None, bank, config)
    if config.role != "link" or parts_of(config.link) != ["analog"]:
        both.link[0].template.check()
    ends = {"transmitter": lambda point: both.transmitter(_chooser(point, distances), point=point)}
    ends |= {"receiver": both.receiver, "channel": channel}
    return {"bank": bank, "dataset": dataset, "measures": measures, **ends}


def receiving_parts(config, weights, log, ranks=None):
    """Build what the receiver alone needs: dict of receiver()."""
    device, model = _device(config, ranks), untrained_model(config)
    load_weights(model, weights)

    def receiver():
        session = Session.load(Path(config.messages, SESSION), *_priors(config, model))
        bank = noise_bank(config, config.image_size, 2 * config.image_size)
        make_chain = ChainMaker(config, bank, device, weights, model)
        make_chain(session.template)  # refuses another model's messages before the first
        devices.for_sampling(model, device, session.template.precision, config.compile, log)
        return Receiver(session, make_chain)

    return {"receiver": receiver}


def _priors(config, model):
    return LabelPrior.of(model, config.num_classes), ColorPrior.of(model)


def _device(config, ranks):
    device = devices.select_device(config.device, ranks)
    if config.compile:
        devices.check_compiler(device)
    return device


def scenes(config, log, device="cpu", network=None):
    """Open the split: with the data set's label maps, or with those that an extractor reads off the pictures."""
    if config.extractor == "gt" and network is None:
        return data_set(config, config.is_train, log)
    from .evaluation.segmenters import load_network, segment

    network = network or load_network(config.extractor, "extractor", device)

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
        return ideal_channel
    from .link.channel_coding import DigitalChannel

    return DigitalChannel(point.snr, point.modulation, point.code_rate, point.fading)


def describe_label_memory(model, height, width, batch, precision, limit):
    """Return a line that says whether cached SPADE modulation fits `limit`, which is --label_memory, in GiB."""
    need = model.modulation_bytes(batch, height, width, 4 if precision == "fp32" else 2) / 2**30
    how = "computed once for each chain"
    if need > limit:
        how = f"more than --label_memory {limit:g}, so computed at every step: slower; raise it or lower --batch_size"
    return f"label maps of {batch} picture{'s' if batch > 1 else ''}: {need:.2g} GiB of scales and shifts, {how}"


class ChainMaker:
    """Makes the `Chain` that a message's header asks for, with this end's model and bank; one is kept per kind.

    :param bank: a `NoiseBank`; a chain takes the one of its own picture size.
    :param weights: path of the weights file: the first 16 digits of its SHA-256 are the model's fingerprint.
    :param model: the network, on the device.
    """

    def __init__(self, config, bank, device, weights, model):
        self.config, self.bank, self.device, self.model, self._chains = config, bank, device, model, {}
        self.fingerprint = file_digest(weights).hex()[:16]

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
        check_size(header.height, header.width, self.model.downsampling)

    def _build(self, header, rule):
        steps = {"timestep_respacing": header.sampler.steps, "start_time": header.sampler.start_time}
        diffusion = diffusion_from(self.config, **steps).to(self.device)
        if header.stop_step and self.config.realism:
            # The answer is x_0's prediction at that step: every step counts as settled, and none before counts.
            rule = EarlyStop(float("inf"), 1, header.stop_step)
        precision = functools.partial(devices.autocast, self.device, header.precision)
        memory = int(self.config.label_memory * 2**30)
        fixed = self.model, diffusion, self.bank, header.sampler
        options = {}
        if self.config.color_layer:
            whole = diffusion_from(self.config, timestep_respacing="", start_time=0)
            options = {"realism": self.config.realism, "whole": whole.to(self.device)}
        return Chain(*fixed, rule, header.selected_steps, self.device, precision, memory, **options)


def _header(config, height, width, fingerprint):
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
    form |= {"height": height, "width": width, "precision": config.precision, "fingerprint": fingerprint}
    return Header(**form, **coding, **noise)


def _target(config):
    """Return the function (H, W) -> bytes of --target_bpp or --target_bytes; None without them."""
    if config.target_bytes or config.target_bpp:
        return lambda height, width: config.target_bytes or int(config.target_bpp * height * width / 8)
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
        if codebook is None:
            return select_initial(chain, y, image, candidates, measure, on_step=on_step, **search)
        if config.noise_index != "best":
            return select_per_step(chain, y, image, start, codebook, measure, on_step, weight)
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
