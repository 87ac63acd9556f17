"""Measures on pictures (N, 3, H, W) in [-1, 1]: per picture, and over a set of pictures.

SSIM, MS-SSIM, LPIPS, Inception features and the confusion matrix come from torchmetrics, which is imported when it is
needed: it takes seconds.
"""

import copy
import functools
import os
import re
import socket

import numpy as np
import torch

from ..config import METRICS
from ..console import InputError
from ..link.selection import mse

# MS-SSIM (Wang et al. 2003): weights from the finest scale to the coarsest.
_SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
_WINDOW = 11  # pixels: the Gaussian window of SSIM
_RELEASES = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0"
_INCEPTION = f"{_RELEASES}/weights-inception-2015-12-05-6726825d.pth"
# LPIPS's networks, by a weight that only they have: torchmetrics' name, torchvision's names.
_BACKBONES = {
    "features.0.weight (64, 3, 11, 11)": ("alex", "AlexNet"),
    "features.28.weight (512, 512, 3, 3)": ("vgg", "VGG16"),
    "features.3.squeeze.weight (16, 64, 1, 1)": ("squeeze", "SqueezeNet1_1"),
}


# -- per picture ------------------------------------------------------------------------------------------------------


def psnr(regenerated, original):
    """Peak signal-to-noise ratio in dB, (N,), from the mean square error over pixels and channels; peak-to-peak 2."""
    return 10 * torch.log10(4 / mse(regenerated, original))


def colour_error(regenerated, original):
    """How far the mean of each channel is off, (N, 3), in units of the [0, 1] range: the tints of a short training."""
    return (regenerated.float().mean((2, 3)) - original.float().mean((2, 3))).abs() / 2


def ssim(regenerated, original):
    """Structural similarity, (N,), at most 1 (Wang et al. 2004).

    Gaussian window of 11 pixels, on the [0, 1] range; averaged over all pixels, mirrored at the borders.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    pair = _unit(regenerated), _unit(original)
    return structural_similarity_index_measure(*pair, data_range=1.0, reduction="none").reshape(-1)


def ms_ssim_scales(height, width):
    """Return how many of MS-SSIM's five scales fit: the window must fit the smallest (torchmetrics asks for more)."""
    short = min(height, width)
    fitting = [n for n in range(1, 6) if short >> (n - 1) >= _WINDOW and short // (n - 1 or 1) ** 2 >= _WINDOW]
    return max(fitting, default=0)


def ms_ssim(regenerated, original):
    """Multi-scale structural similarity, (N,), in [0, 1] (Wang et al. 2003).

    The five scales halve the picture four times, which needs a short side of 176 pixels. A smaller picture is measured
    at the scales it has room for (99: 4, 44: 3, 22: 2, 11: 1), with their weights scaled to sum to 1: such values
    compare only with each other.
    """
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure as measure

    weights = _SCALE_WEIGHTS[: ms_ssim_scales(*original.shape[2:])]
    weights = tuple(weight / sum(weights) for weight in weights)
    pair = _unit(regenerated), _unit(original)
    return measure(*pair, data_range=1.0, betas=weights, reduction="none").reshape(-1)


def lpips(network, regenerated, original):
    """Learned perceptual distance, (N,), 0 for equal pictures (Zhang et al. 2018); `network` is `lpips_network`'s."""
    with torch.no_grad():
        return network(regenerated.float().clamp(-1, 1), original.float().clamp(-1, 1)).reshape(-1)


def _unit(images):
    """Shift pictures from [-1, 1] to [0, 1], where SSIM's luminance term is meant to be taken."""
    return ((images.float() + 1) / 2).clamp(0, 1)


def distance(name, lpips_weights="", device="cpu"):
    """Return a distance for searches: function of candidates (N, 3, H, W) and original (1, 3, H, W) that gives (N,).

    Smaller is better: "mse" on the [-1, 1] range, "ssim" (1 - SSIM), "lpips".

    :raises InputError: no weights for LPIPS.
    """
    if name == "mse":
        return mse
    if name == "ssim":
        return lambda candidates, original: 1 - ssim(candidates, original.expand_as(candidates))
    network = lpips_network(lpips_weights, device)
    return lambda candidates, original: lpips(network, candidates, original.expand_as(candidates))


def bootstrap_interval(values, seed=0, draws=1000, level=0.95):
    """Return (low, high): the percentile bootstrap interval of the mean of `values` (n,), one per picture."""
    values = np.asarray(values, dtype=np.float64)
    rows = np.random.default_rng(seed).integers(len(values), size=(draws, len(values)))
    low, high = np.quantile(values[rows].mean(1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


# -- over a set of pictures -------------------------------------------------------------------------------------------


def frechet_distance(first, second):
    """Frechet distance of two Gaussians with the moments of feature sets (N, D), (M, D) (FID, Heusel et al. 2017).

    |mu1 - mu2|^2 + Tr(C1 + C2 - 2 sqrt(C1 C2)). With centred features A, C = A'A / (N - 1), the last trace is the sum
    of the singular values of A1 A2', so no D x D root is needed.
    """
    means, roots = [], []
    for features in (first.double(), second.double()):
        means.append(features.mean(0))
        centred = (features - means[-1]) / (len(features) - 1) ** 0.5
        roots.append(torch.linalg.qr(centred, mode="r").R if len(features) > features.shape[1] else centred)
    spread = sum(root.square().sum() for root in roots) - 2 * torch.linalg.svdvals(roots[0] @ roots[1].T).sum()
    return float((means[0] - means[1]).square().sum() + spread)


def kernel_distance(first, second, subset_size, seed=0, subsets=100):
    """Kernel distance of feature sets (N, D), (M, D): (mean, standard deviation) over random subsets.

    The unbiased squared MMD with the kernel (x.y / D + 1)^3 (KID, Binkowski et al. 2018); may be a little below 0.
    """
    from torchmetrics.image.kid import poly_mmd

    draw, values = np.random.default_rng(seed), []
    for _ in range(subsets):
        rows = [draw.permutation(len(features))[:subset_size] for features in (first, second)]
        values.append(float(poly_mmd(first[rows[0]].double(), second[rows[1]].double())))
    return float(np.mean(values)), float(np.std(values))


def confusion_matrix(predicted, label, num_classes):
    """Count pixels by (true class, predicted class): (K, K) int64; ids (N, 1, H, W) are in 0..K-1, K = num_classes."""
    from torchmetrics.functional.classification import multiclass_confusion_matrix

    return multiclass_confusion_matrix(predicted, label, num_classes, validate_args=False)


def accuracy_and_iou(confusion):
    """Return (pixel accuracy, mean intersection over union) of a confusion matrix.

    The mean is over the classes that the ground truth has: a class seen nowhere says nothing.
    """
    confusion = confusion.double()
    hits, true, predicted = confusion.diag(), confusion.sum(1), confusion.sum(0)
    present = true > 0
    iou = hits[present] / (true + predicted - hits)[present]
    return float(hits.sum() / true.sum()), float(iou.mean())


class Metrics:
    """The measures that a run was asked for. Everything they need is checked, and loaded, here.

    `notes` are lines for the run to print. `over_the_set` says whether `update` and `compute` measure anything.

    :param names: of `METRICS`.
    :param num_classes: of the label maps, for miou.
    :param lpips_weights, fid_weights: files of the networks; "": from TORCH_HOME, or downloaded.
    :param features: function from pictures to (N, D) for fid and kid, in place of Inception (unless fid_weights is
        given too); what it measures is called fid_features and kid_features.
    :param segmenter: function from pictures to ids (N, 1, H, W), for miou.
    :raises InputError: a network is missing.
    """

    def __init__(
        self, names, num_classes=35, lpips_weights="", fid_weights="", features=None, segmenter=None, device="cpu"
    ):
        self.names = [name for name in METRICS if name in names]
        self.num_classes, self.segmenter, self.device, self.notes = num_classes, segmenter, device, []
        self._lpips = lpips_network(lpips_weights, device) if "lpips" in names else None
        self._extractors = {}  # by the suffix of the result's name
        if {"fid", "kid"} & {*names}:
            if features is not None:
                self._extractors["_features"] = features
            if features is None or fid_weights:
                self._extractors[""] = inception_features(fid_weights, device)
        self.over_the_set = bool({"fid", "kid", "miou"} & {*names})
        self._forget()

    def _forget(self):
        self._kept = {suffix: ([], []) for suffix in self._extractors}
        self._confusions = [torch.zeros(self.num_classes, self.num_classes, dtype=torch.int64) for _ in range(2)]

    def fresh(self):
        """Return the same measures, with the same networks and notes, for another set of pictures."""
        other = copy.copy(self)
        other._forget()
        return other

    def _note(self, line):
        if line not in self.notes:
            self.notes.append(line)

    def per_picture(self, regenerated, original):
        """Measure pictures (N, 3, H, W) in [-1, 1]: dict from name to (N,), for psnr, ssim, ms_ssim and lpips."""
        height, width = original.shape[2:]
        scales = ms_ssim_scales(height, width)
        if 0 < scales < 5 and "ms_ssim" in self.names:
            self._note(f"ms_ssim at {height}x{width} has room for {scales} of 5 scales; compare with equal sizes only")
        functions = {"psnr": psnr, "ssim": ssim, "ms_ssim": ms_ssim, "lpips": functools.partial(lpips, self._lpips)}
        values = {}
        for name in self.names:
            if name in ("ssim", "ms_ssim") and not scales:
                self._note(f"{name} is left out: {height}x{width} pictures are smaller than its {_WINDOW}-pixel window")
            elif name in functions:
                where = self.device if name == "lpips" else original.device
                values[name] = functions[name](regenerated.to(where), original.to(where)).cpu()
        return values

    def update(self, regenerated, original, label):
        """Take pictures (N, 3, H, W) in [-1, 1] and label maps (N, 1, H, W) into the set's measures."""
        pair = regenerated.float().clamp(-1, 1).to(self.device), original.float().to(self.device)
        for suffix, extractor in self._extractors.items():
            for kept, images in zip(self._kept[suffix], pair, strict=True):
                kept.append(extractor(images).float().cpu())
        if "miou" in self.names:
            for confusion, images in zip(self._confusions, pair, strict=True):
                confusion += confusion_matrix(self.segmenter(images).cpu(), label.cpu(), self.num_classes)

    def compute(self):
        """Return the set's measures as a dict of floats.

        fid, kid and kid_std (over subsets); miou and pixel_accuracy of the regenerated pictures against the label maps,
        and miou_real and pixel_accuracy_real of the originals: the ceiling.
        """
        values = {}
        for suffix, kept in self._kept.items():
            values |= self._set_distances(suffix, *(torch.cat([torch.zeros(0), *batches]) for batches in kept))
        if self._confusions[0].sum():
            for suffix, confusion in zip(("", "_real"), self._confusions, strict=True):
                values[f"pixel_accuracy{suffix}"], values[f"miou{suffix}"] = accuracy_and_iou(confusion)
        return values

    def _set_distances(self, suffix, regenerated, original):
        n, values = len(original), {}
        if n < 2:
            self._note(f"fid{suffix} and kid{suffix} are left out: they need 2 pictures, and there is {n}")
            return {}
        if "fid" in self.names:
            values[f"fid{suffix}"] = frechet_distance(regenerated, original)
            if n <= original.shape[1]:
                found = f"{n} pictures for {original.shape[1]} features"
                self._note(f"fid{suffix} is unreliable: {found}; kid{suffix} copes with few")
        if "kid" in self.names:
            subset = max(2, min(50, n // 2))  # half of the pictures at most: subsets of all would not differ
            values[f"kid{suffix}"], values[f"kid{suffix}_std"] = kernel_distance(regenerated, original, subset)
            self._note(
                f"kid{suffix} is the mean over 100 subsets of {subset} of {n} pictures, kid{suffix}_std its spread"
            )
        return values


# -- networks ---------------------------------------------------------------------------------------------------------


def lpips_network(path="", device="cpu"):
    """Return torchmetrics' LPIPS network: its own linear weights over a backbone from a file.

    :param path: torchvision's AlexNet, VGG16 or SqueezeNet1.1; "": AlexNet from TORCH_HOME, or downloaded.
    :raises InputError: a file that is missing, damaged or of another network.
    """
    from torchmetrics.functional.image.lpips import _NoTrainLpips
    from torchvision.models import AlexNet_Weights

    path = path or _hub_file(AlexNet_Weights.DEFAULT.url, "lpips", "AlexNet's weights")
    weights = _load_tensors(path, "lpips_weights")
    found = {f"{key} {tuple(value.shape)}" for key, value in weights.items() if torch.is_tensor(value)}
    kind, name = next((kind for mark, kind in _BACKBONES.items() if mark in found), (None, None))
    if kind is None:
        raise InputError(
            f"--lpips_weights {path}: not torchvision's AlexNet, VGG16 or SqueezeNet1.1; give one of these"
        )
    with torch.random.fork_rng(devices=[]):  # initial weights would shift torch's global stream
        network = _NoTrainLpips(net=kind, pnet_rand=True)
    # torchmetrics cuts the backbone into slices, whose layers keep their number: slice2.3.weight is features.3.weight
    renamed = {key: "features." + re.sub(r"^slice(s\.)?\d+\.", "", key) for key in network.net.state_dict()}
    try:
        network.net.load_state_dict({key: weights[theirs] for key, theirs in renamed.items()})
    except (KeyError, RuntimeError) as error:
        raise InputError(f"--lpips_weights {path}: no whole {name} ({_reason(error)}); get the file again") from None
    return network.to(device)


def inception_features(path="", device="cpu"):
    """Return a function from pictures (N, 3, H, W) in [-1, 1] to the (N, 2048) features of FID's Inception.

    :param path: pt_inception-2015-12-05-6726825d.pth; "": from TORCH_HOME, or downloaded.
    :raises InputError: torch-fidelity, which has the network, is missing; or the file is missing, damaged or another.
    """
    try:
        import torch_fidelity  # noqa: F401
        from torchmetrics.image.fid import NoTrainInceptionV3
    except ImportError:
        hint = "pip install torch-fidelity, give --features FILE instead, or leave them out of --metrics"
        raise InputError(f"--metrics fid and kid need Inception from torch-fidelity: {hint}") from None
    path = path or _hub_file(_INCEPTION, "fid", "the Inception weights")
    _load_tensors(path, "fid_weights")  # torch-fidelity itself would unpickle anything
    try:
        with torch.random.fork_rng(devices=[]):
            network = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(path)).to(device)
    except (RuntimeError, AttributeError, TypeError) as error:
        wanted = "give pt_inception-2015-12-05-6726825d.pth"
        raise InputError(f"--fid_weights {path}: not the Inception of FID ({_reason(error)}); {wanted}") from None

    def features(images):
        with torch.no_grad():
            return network((_unit(images) * 255).round().to(torch.uint8))

    return features


def _load_tensors(path, flag):
    try:
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except OSError as error:
        raise InputError(f"--{flag} {path}: cannot be read ({error.strerror}); give a file of weights") from None
    except Exception:  # torch raises many kinds for damaged and for refused files
        raise InputError(f"--{flag} {path}: damaged, or no state dict of tensors alone; get the file again") from None


def _reason(error):
    return (" ".join(str(error).split()) or type(error).__name__)[:160]


def _hub_file(url, metric, what):
    """Return where TORCH_HOME keeps a file, after downloading it if it is not there."""
    name = url.rsplit("/", 1)[1]
    path = os.path.join(torch.hub.get_dir(), "checkpoints", name)
    for known in (path, path.replace("weights-inception", "pt_inception")):  # pytorch-fid's name for the same file
        if os.path.exists(known):
            return known
    timeout = socket.getdefaulttimeout()
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        socket.setdefaulttimeout(10)  # seconds of silence: some compute nodes have no way out
        torch.hub.download_url_to_file(url, path, hash_prefix=name.rsplit("-", 1)[1].split(".")[0])
    except (OSError, RuntimeError) as error:
        found = f"{what} are not at {path} and cannot be downloaded ({_reason(error)})"
        hint = f"give --{metric}_weights FILE ({url}), or leave {metric} out"
        raise InputError(f"--metrics {metric}: {found}; {hint}") from None
    finally:
        socket.setdefaulttimeout(timeout)
    return path
