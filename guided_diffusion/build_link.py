"""From a sampling configuration to both ends of the link, the channel between them, and what measures the result."""

import copy
import dataclasses
import functools

from .build import data_set, diffusion_from, noise_bank, picture_size, precision_of, semantic_coding, untrained_model
from .config import parts_of, points
from .console import InputError
from .data.datasets import PictureFolder
from .diffusion.sampling import EarlyStop
from .diffusion.solvers import SamplerSettings
from .diffusion.unet import check_size
from .evaluation import codecs as baselines
from .evaluation import segmenters
from .evaluation.measures import Measures
from .evaluation.memory import describe_label_memory
from .evaluation.metrics import Metrics, distance
from .files import digest_once
from .link.channel import snr_to_sigma
from .link.channel_coding import DigitalLink
from .link.message import Header
from .link.noise_bank import NoiseBank
from .link.selection import Chain, StepCodebook, select_both, select_initial, select_per_step
from .link.source_coding import jxl_available
from .link.transceiver import AnalogChannel, DigitalChannel, IdealChannel, Receiver, Transmitter
from .training.checkpoint import load_weights
from .training.distributed import autocast, select_device, usable_precision
from .training.placement import check_compiler, compiled, for_sampling, placed, rounded

MAX_AREA = 16  # of pictures that a message may ask for, in squares of image_size
SEARCH_BATCH = 8  # candidates that run together; not --batch_size, which must not decide near ties


def sampling_parts(config, weights, log, ranks=None):
    """Build what a sampling run needs, for all its points.

    :param weights: path of the weights.
    :return: dict of model (on its device), diffusion, bank, dataset, coding, device, precision, measures, early_stop, and
        the functions transmitter(point), receiver(point) and crossing(point).
    """
    device = select_device(config.device, ranks)
    precision = precision_of(config, device, log)
    if config.compile:
        check_compiler(device)
    coding = semantic_coding(config)  # checks its flags before the long work, as what follows does
    for codec in parts_of(config.baseline):
        baselines.check_installed(codec)
    if not jxl_available():
        log(
            "JPEG XL is not installed (pip install pillow-jxl-plugin): edges with many levels take more bytes without it"
        )
    if config.role == "link":
        for point in points(config):
            crossing(point)
    measures = _measures(config, device)
    distances = _distances(config, device)
    model = untrained_model(config)
    dataset = scenes(config, log, device)
    height, width = picture_size(dataset, model)
    load_weights(model, weights)
    model = for_sampling(model, device, precision, config.compile, log)
    batch = min(config.batch_size, config.num_samples, len(dataset)) if config.role == "link" else 1
    log(describe_label_memory(model, height, width, batch, precision, config.label_memory))
    diffusion = diffusion_from(config).to(device)
    if config.tail_steps > diffusion.num_timesteps:
        raise InputError(f"--tail_steps {config.tail_steps}: the chain has {diffusion.num_timesteps} steps")
    rule = EarlyStop(config.stop_tol, config.stop_patience, config.stop_min_steps) if config.stop_tol else None
    parts = {
        "model": model,
        "diffusion": diffusion,
        "bank": noise_bank(config, height, width),
        "dataset": dataset,
        "coding": coding,
        "device": device,
        "precision": precision,
        "measures": measures,
        "early_stop": rule,
    }
    if parts["bank"] is None:
        return parts
    make_chain = ChainMaker(config, {precision: model}, device, weights, bank=parts["bank"])
    template = _header(config, precision, height, width, make_chain.fingerprint)
    template = dataclasses.replace(template, selected_steps=_selected(config, parts["diffusion"]))
    if config.role != "link" or parts_of(config.link) != ["analog"]:
        template.check()  # what no message can carry is refused before the long work

    def transmitter(point):
        # A chain that stops early does so where the transmitter's did, which the message tells.
        local = point.role == "transmit" or point.local_picture or (rule is not None and point.link != "analog")
        return Transmitter(template, coding, make_chain(template, rule), _chooser(point, distances), local)

    def receiver(point):
        return Receiver(functools.partial(make_chain, rule=rule if point.link == "analog" else None))

    return parts | {"transmitter": transmitter, "receiver": receiver, "crossing": crossing}


def receiving_parts(config, weights, log, ranks=None):
    """Build what the receiver alone needs: dict of make_chain (Header -> `Chain`) and receiver()."""
    device = select_device(config.device, ranks)
    precision_of(config, device, log)
    if config.compile:
        check_compiler(device)
    model = untrained_model(config)
    load_weights(model, weights)
    model = placed(model, device).eval().requires_grad_(False)
    make_chain = ChainMaker(config, {}, device, weights, functools.partial(_model_of, config, model, log))
    return {"make_chain": make_chain, "receiver": lambda: Receiver(make_chain)}


def scenes(config, log, device="cpu"):
    """Open the split: with the data set's label maps, or with those that an extractor reads off the pictures."""
    if config.extractor == "gt":
        return data_set(config, config.is_train, log)
    network = segmenters.load_network(config.extractor, "extractor", device)

    def extract(image):
        return segmenters.segment(network, image.to(device), config.num_classes, "extractor").cpu()

    return PictureFolder(
        config.dataset_mode, config.data_dir, config.image_size, config.is_train, extract, config.no_instance
    )


def crossing(point):
    """Return the channel of one point."""
    if point.link == "analog":
        return AnalogChannel(snr_to_sigma(point.snr), point.pool)
    if point.link == "digital":
        return DigitalChannel(DigitalLink(point.snr, point.modulation, point.code_rate, point.fading))
    return IdealChannel()


def _model_of(config, model, log, precision):
    """Return the network made ready for a message's precision."""
    shared = precision == "fp32" and not config.compile
    ready = model if shared else rounded(copy.deepcopy(model), precision)  # another message may ask for another one
    return compiled(ready, log) if config.compile else ready


class ChainMaker:
    """Makes the `Chain` that a message's header asks for, with this receiver's model; one is kept per kind.

    :param models: dict from precision to the network made ready for it.
    :param make_model: function precision -> network, for those that are not there.
    :param weights: path of the weights file: the first 8 bytes of its SHA-256 are the model's fingerprint.
    :param bank: the configuration's `NoiseBank`, where there is one already.
    """

    def __init__(self, config, models, device, weights, make_model=None, bank=None):
        self.config, self.device, self._models, self._make_model = config, device, models, make_model
        self.fingerprint = digest_once(weights)[:8]
        self._chains, self._banks = {}, {} if bank is None else {(bank.seed, bank.size): bank}

    def __call__(self, header, rule=None):
        """Return the chain. A header without a stop step leaves stopping to `rule`, an `EarlyStop` or None."""
        self._check(header)
        plain = dataclasses.replace(
            header, height=1, width=1, boundaries=False, label_scale=1, edge_levels=0, edge_scale=1
        )
        key = plain, rule
        if key not in self._chains:
            self._chains[key] = self._build(header, rule)
        return self._chains[key]

    def _check(self, header):
        config = self.config
        if header.fingerprint != self.fingerprint:
            raise InputError(
                f"the message was made for other weights (fingerprint {header.fingerprint.hex()}, these have"
                f" {self.fingerprint.hex()}); give --model_path the transmitter's file"
            )
        theirs = header.num_classes, header.one_hot, header.edge_plane
        ours = config.num_classes, config.one_hot_label, not config.no_instance
        if theirs != ours:
            raise InputError(
                f"the message's label space (classes, one-hot, edge plane) is {theirs}, the model's {ours};"
                " give --model_path the transmitter's file"
            )
        # A message must not make the receiver build another bank or a huge picture.
        if (header.bank_seed, header.bank_size) != (config.noise_bank_seed, config.noise_bank_size):
            raise InputError(
                f"the message names noise bank {header.bank_seed} of {header.bank_size} entries, the model's is"
                f" {config.noise_bank_seed} of {config.noise_bank_size}"
            )
        if header.height * header.width > MAX_AREA * config.image_size**2:
            raise InputError(
                f"the message is of a {header.height}x{header.width} picture, more than {MAX_AREA} times the"
                f" model's {config.image_size}x{config.image_size}"
            )
        if usable_precision(self.device, header.precision)[0] != header.precision:
            raise InputError(
                f"the message was made in {header.precision}, which this device lacks; receive it on one that has it"
            )
        check_size(header.height, header.width, self._model(header.precision).downsampling)

    def _model(self, precision):
        if precision not in self._models:
            self._models[precision] = self._make_model(precision)
        return self._models[precision]

    def _build(self, header, rule):
        diffusion = diffusion_from(self.config, timestep_respacing=header.sampler.steps).to(self.device)
        if header.stop_step:
            # The answer is x_0's prediction at that step: every step counts as settled, and none before counts.
            rule = EarlyStop(float("inf"), 1, header.stop_step)
        bank = header.bank_seed, header.bank_size
        if bank not in self._banks:
            self._banks[bank] = NoiseBank(
                (3, header.height, header.width), header.bank_size, header.bank_seed, self.config.noise_bank_cache
            )
        return Chain(
            self._model(header.precision),
            diffusion,
            self._banks[bank],
            header.sampler,
            early_stop=rule,
            selected_steps=header.selected_steps or None,
            device=self.device,
            precision=functools.partial(autocast, self.device, header.precision),
            cache_bytes=int(self.config.label_memory * 2**30),
        )


def _header(config, precision, height, width, fingerprint):
    selecting = config.selection != "initial"
    sampler = SamplerSettings(
        method=config.sampler,
        steps=config.timestep_respacing,
        s=config.s,
        eta=config.eta if config.sampler == "ddim" else 0.0,
        clip_denoised=config.clip_denoised,
        variance="posterior" if selecting and config.sampler == "ddpm" else "model",
        tail_steps=config.tail_steps,
    )
    return Header(
        height=height,
        width=width,
        num_classes=config.num_classes,
        one_hot=config.one_hot_label,
        edge_plane=not config.no_instance,
        label_scale=config.label_scale,
        edge_levels=0 if config.no_instance else config.edge_levels,
        edge_scale=config.edge_scale,
        bank_seed=config.noise_bank_seed,
        bank_size=config.noise_bank_size,
        sampler=sampler,
        start_sent=config.selection != "per_step",
        step_candidates=config.step_candidates if selecting else 0,
        step_atoms=config.step_atoms if selecting else 0,
        precision=precision,
        fingerprint=fingerprint,
    )


def _selected(config, diffusion):
    """How many steps' noise is selected: 0 asks for all that have any."""
    if config.selection == "initial":
        return 0
    available = diffusion.num_timesteps - max(1, config.tail_steps)
    if not max(1, config.selected_steps) <= available:
        raise InputError(
            f"--selected_steps {config.selected_steps}: the chain has {max(0, available)} steps with noise"
            f" (--timestep_respacing, --tail_steps {config.tail_steps})"
        )
    return config.selected_steps or available


# -- noise selection --------------------------------------------------------------------------------------------------


def _distances(config, device):
    """Return a function from a scene to its distance (candidates, image) -> (N,); None where nothing is searched."""
    if config.noise_index != "best" and config.selection == "initial":
        return None
    if config.distance == "segmenter":
        if not config.segmenter:
            raise InputError("--distance segmenter needs --segmenter FILE")
        network = segmenters.load_network(config.segmenter, "segmenter", device)
        return lambda scene: (
            lambda pictures, _: segmenters.disagreement(network, pictures, scene["label"], config.num_classes)
        )
    measure = distance(config.distance, config.lpips_weights, device)
    return lambda scene: measure


def _chooser(config, distances):
    """Return the transmitter's function (chain, y, scene, start) -> `Choice`, or None where nothing is chosen."""
    if distances is None:
        return None
    codebook = StepCodebook(config.step_candidates, config.step_atoms) if config.selection != "initial" else None
    search = {"batch_size": SEARCH_BATCH, "feedback_steps": config.feedback_steps}

    def choose(chain, y, scene, start, on_step=None):
        image, measure, candidates = scene["image"], distances(scene), range(config.candidates)
        if config.noise_index != "best":
            return select_per_step(chain, y, image, start, codebook, measure, on_step)
        if codebook is None:
            return select_initial(chain, y, image, candidates, measure, on_step=on_step, **search)
        return select_both(chain, y, image, candidates, codebook, measure, on_step, **search)

    return choose


# -- measures ---------------------------------------------------------------------------------------------------------


def _measures(config, device):
    names = parts_of(config.metrics)
    features = segmenter = None
    if config.features and {"fid", "kid"} & {*names}:
        features = segmenters.features_of(segmenters.load_network(config.features, "features", device))
    if "miou" in names:
        if not config.segmenter:
            raise InputError("--metrics miou needs --segmenter FILE")
        network = segmenters.load_network(config.segmenter, "segmenter", device)
        segmenter = segmenters.segmenter_of(network, config.num_classes)
    metrics = Metrics(names, config.num_classes, config.lpips_weights, config.fid_weights, features, segmenter, device)
    if segmenter is not None and config.extractor != "gt":
        metrics.notes.append("miou is measured against the extractor's label maps: the pictures' own are not known")
    return Measures(metrics, parts_of(config.baseline), metrics.fresh)
