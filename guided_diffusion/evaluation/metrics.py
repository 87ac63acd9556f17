"""Measures on pictures (N, 3, H, W) in [-1, 1]: per picture, and over a set of pictures.

torchmetrics, which has most of them, is imported when it is needed: it takes seconds.
"""

import functools
import re
from collections import defaultdict

import numpy as np
import torch

from ..console import InputError
from ..flags import METRICS
from ..link.color_layer import YCBCR
from ..link.selection import mse
from .sliced_wasserstein import PATCH, descriptors, sliced_wasserstein

OVER_THE_SET = {"fid", "kid", "miou", "swd", "color_std"}  # of METRICS; the others are per picture
SWD_RESAMPLES = 50  # of 200: they take a second each hundred pictures


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
    from torchmetrics.functional.image import structural_similarity_index_measure as measure

    return measure(_unit(regenerated), _unit(original), data_range=1.0, reduction="none").reshape(-1)


def ms_ssim_scales(height, width):
    """Return how many of MS-SSIM's five scales torchmetrics takes at a size."""
    return sum(min(height, width) >= short for short in (11, 22, 44, 99, 176))


def ms_ssim(regenerated, original):
    """Multi-scale structural similarity, (N,), in [0, 1] (Wang et al. 2003).

    A picture whose short side is below 176 pixels is measured at the scales it has room for (99: 4, 44: 3, 22: 2,
    11: 1), with their weights scaled to sum to 1: such values compare only with each other.
    """
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure as measure

    weights = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)[: ms_ssim_scales(*original.shape[2:])]  # from the finest scale
    weights = tuple(weight / sum(weights) for weight in weights)
    return measure(_unit(regenerated), _unit(original), data_range=1.0, betas=weights, reduction="none").reshape(-1)


def lpips(network, regenerated, original):
    """Learned perceptual distance, (N,), 0 for equal pictures (Zhang et al. 2018); `network` is `lpips_network`'s."""
    pair = (images.float().clamp(-1, 1).to(next(network.parameters()).device) for images in (regenerated, original))
    with torch.no_grad():
        return network(*pair).reshape(-1)


def _unit(images):
    """Shift pictures from [-1, 1] to [0, 1], where SSIM's luminance term is meant to be taken."""
    return ((images.float() + 1) / 2).clamp(0, 1)


def distance(name, lpips_weights="", device="cpu"):
    """Return a distance for searches: function of candidates (N, 3, H, W) and original (1, 3, H, W) that gives (N,).

    Smaller is better: "mse" on the [-1, 1] range, "ssim" (1 - SSIM), "lpips".
    """
    if name == "mse":
        return mse
    if name == "ssim":
        return lambda candidates, original: 1 - ssim(candidates, original.expand_as(candidates))
    network = lpips_network(lpips_weights, device)
    return lambda candidates, original: lpips(network, candidates, original.expand_as(candidates))


def bootstrap_interval(values, seed=0):
    """Return (low, high): the 95 % percentile bootstrap interval of the mean of `values` (n,), one per picture."""
    values = np.asarray(values, dtype=np.float64)
    rows = np.random.default_rng(seed).integers(len(values), size=(1000, len(values)))
    return tuple(np.quantile(values[rows].mean(1), [0.025, 0.975]).tolist())


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


def kernel_distance(first, second, subset_size):
    """Kernel distance of feature sets (N, D), (M, D): (mean, standard deviation) over 100 random subsets.

    The unbiased squared MMD with the kernel (x.y / D + 1)^3 (KID, Binkowski et al. 2018); may be a little below 0.
    """
    from torchmetrics.image.kid import poly_mmd

    draw, values = np.random.default_rng(0), []
    for _ in range(100):
        subsets = [features[draw.permutation(len(features))[:subset_size]].double() for features in (first, second)]
        values.append(float(poly_mmd(*subsets)))
    return float(np.mean(values)), float(np.std(values))


def resamples(n, count=200):
    """Return how often each of n pictures is drawn in `count` seeded bootstrap resamples: (count, n) float64."""
    return torch.from_numpy(np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), count)).double()


def interval(values):
    """Return [low, high]: the 95 % percentile interval of a measure's values (R,) on resampled pictures."""
    return np.nanquantile(np.asarray(values), [0.025, 0.975]).tolist()


def kernel_distances(first, second, weights):
    """Return the kernel distance of paired feature sets (n, D) for each row of `weights` (R, n): (R,).

    With weights of 1 it is what the subsets of `kernel_distance` estimate: the unbiased MMD of the whole sets. A
    picture that a resample holds w times is never compared with its own copies, which would be a bias; it counts w
    times beside its counterpart. NaN where a resample holds a single picture.
    """
    a, b, total = first.double(), second.double(), 0
    for x, y in ((a, a), (b, b), (a, b), (b, a)):
        kernel = (x @ y.T / x.shape[1] + 1) ** 3  # (n, n)
        apart = ((weights @ kernel) * weights).sum(1) - weights.square() @ kernel.diag()
        pairs = weights.sum(1).square() - weights.square().sum(1)
        if x is y:
            total = total + apart / pairs
        else:
            total = total - (apart + weights @ kernel.diag()) / (pairs + weights.sum(1))
    return total


def class_counts(predicted, label, num_classes):
    """Count pixels of each picture by class: (N, 3, K) int64 of those rightly predicted, there, and predicted.

    :param predicted, label: ids (N, 1, H, W) in 0..K-1, K = num_classes.
    """
    triples = [(y[p == y], y, p) for p, y in zip(predicted.long(), label.long(), strict=True)]
    counts = [[torch.bincount(ids.flatten(), minlength=num_classes) for ids in triple] for triple in triples]
    return torch.stack([torch.stack(each) for each in counts])


def accuracy_and_iou(counts):
    """Return (pixel accuracy, mean intersection over union), each (...), of summed `class_counts` (..., 3, K).

    The mean is over the classes that the ground truth has: a class seen nowhere says nothing.
    """
    hits, true, predicted = counts.double().unbind(-2)
    present = true > 0
    iou = (hits / (true + predicted - hits)).where(present, 0).sum(-1) / present.sum(-1)
    return hits.sum(-1) / true.sum(-1), iou


def color_deviation(images):
    """Return the standard deviation of Cb and of Cr over each picture: (N, 2), in 8-bit steps (BT.601, as in JPEG)."""
    planes = torch.einsum("ck,nkhw->nchw", torch.from_numpy(YCBCR[1:]).float(), images.float())
    return 127.5 * planes.std((2, 3), correction=0)


class Metrics:
    """The measures that a run was asked for, with their networks; `notes` are for the run to print.

    :param names, num_classes: of `METRICS`; of the label maps, for miou.
    :param lpips_weights, fid_weights: files of the networks; "": from TORCH_HOME, or downloaded.
    :param features: function from pictures to (N, D) for fid and kid, in place of Inception; what it measures is called
        fid_features and kid_features.
    :param segmenter: function from pictures to ids (N, 1, H, W), for miou.
    :raises InputError: a network is missing.
    """

    def __init__(
        self, names, num_classes=35, lpips_weights="", fid_weights="", features=None, segmenter=None, device="cpu"
    ):
        self.names = [name for name in METRICS if name in names]
        self.num_classes, self.segmenter, self.device, self.notes = num_classes, segmenter, device, set()
        self._lpips = lpips_network(lpips_weights, device) if "lpips" in names else None
        self._features, self._suffix = features, "_features" if features else ""
        if features is None and {"fid", "kid"} & {*names}:
            self._features = inception_features(fid_weights, device)

    def per_picture(self, regenerated, original):
        """Measure pictures (N, 3, H, W) in [-1, 1]: dict from name to (N,), for psnr, ssim, ms_ssim and lpips."""
        functions = {"psnr": psnr, "lpips": functools.partial(lpips, self._lpips)}
        scales = ms_ssim_scales(*original.shape[2:])
        if scales:
            functions |= {"ssim": ssim, "ms_ssim": ms_ssim}
        elif {"ssim", "ms_ssim"} & {*self.names}:
            self.notes.add("pictures are smaller than the 11-pixel window of ssim and ms_ssim: left out")
        if 0 < scales < 5 and "ms_ssim" in self.names:
            self.notes.add(f"ms_ssim has room for {scales} of 5 scales; compare with pictures of equal size only")
        return {name: functions[name](regenerated, original).cpu() for name in self.names if name in functions}

    def over_the_set(self, batches):
        """Measure a set of pictures: (values, 95 % intervals), dicts that are empty where nothing such was asked for.

        fid, kid and kid_std (over subsets of 50 pictures, at most half of all), from 2 pictures on; miou and
        pixel_accuracy of the regenerated pictures against the label maps, and with _real of the originals: the ceiling;
        swd_128, swd_64, ... by the band's short side (see `sliced_wasserstein`); cb_std and cr_std, the mean over
        pictures of `color_deviation`, and with _real of the originals. Intervals are of bootstrapped pictures; fid,
        whose bias depends on their number, has none.

        :param batches: iterable of regenerated, original (N, 3, H, W) in [-1, 1] and label maps (N, 1, H, W).
        """
        sets, n = (defaultdict(list), defaultdict(list)), 0
        for *pair, label in batches if OVER_THE_SET & {*self.names} else ():
            for facts, images in zip(sets, pair, strict=True):
                for name, values in self._facts(images.float().clamp(-1, 1), label, n).items():
                    facts[name].append(values)
            n += len(pair[0])
        if not n:
            return {}, {}
        (made, real), weights = ({k: torch.cat(v) for k, v in facts.items()} for facts in sets), resamples(n)
        found = self._set_distances(made, real, weights)
        for suffix, facts in (("", made), ("_real", real)):
            found |= {name + suffix: pair for name, pair in _of_one_set(facts, weights).items()}
        values = {name: float(value) for name, (value, _) in found.items()}
        return values, {name: interval(drawn) for name, (_, drawn) in found.items() if drawn is not None}

    def _facts(self, images, label, first):
        """Return what the set's measures need to know of a batch of pictures: name -> (N, ...)."""
        facts = {}
        if {"fid", "kid"} & {*self.names}:
            facts["features"] = self._features(images.to(self.device)).float().cpu()
        if "miou" in self.names:
            ids = self.segmenter(images.to(self.device)).cpu()
            facts["classes"] = class_counts(ids, label.cpu(), self.num_classes)
        if "color_std" in self.names:
            facts["color"] = color_deviation(images).double().cpu()
        if "swd" in self.names and min(images.shape[2:]) >= PATCH:
            facts |= {f"swd_{short}": found for short, found in descriptors(images.cpu(), first).items()}
        elif "swd" in self.names:
            self.notes.add(f"pictures are smaller than the {PATCH}-pixel patches of swd: left out")
        return facts

    def _set_distances(self, made, real, weights):
        """Compare the facts of two sets: dict from measure to (value, values (R,) on resampled pictures or None)."""
        n, fid, kid, found = weights.shape[1], f"fid{self._suffix}", f"kid{self._suffix}", {}
        features = made.get("features"), real.get("features")
        if features[0] is not None and n < 2:
            self.notes.add(f"fid and kid are left out: they need 2 pictures, and there is {n}")
        elif features[0] is not None:
            if "fid" in self.names:
                found[fid] = frechet_distance(*features), None
                if n <= (dimension := features[0].shape[1]):
                    self.notes.add(f"{fid} is unreliable: {n} pictures for {dimension} features; {kid} copes with few")
            if "kid" in self.names:
                subset = max(2, min(50, n // 2))  # half of the pictures at most: subsets of all would not differ
                mean, deviation = kernel_distance(*features, subset)
                found |= {kid: (mean, kernel_distances(*features, weights)), f"{kid}_std": (deviation, None)}
        for name in [name for name, facts in made.items() if name.startswith("swd_") and len(facts) == n]:
            rows = torch.cat([torch.ones(1, n), weights[:SWD_RESAMPLES].float()])
            value, *drawn = sliced_wasserstein(made[name], real[name], rows)
            # Copies in a resample make sets look farther apart (26 to 37 for two sets of originals): centred again.
            found[name] = value, torch.stack(drawn) - torch.stack(drawn).mean() + value
        return found


def _of_one_set(facts, weights):
    """Measure one set of pictures by its facts: dict from measure to (value, values (R,) on resampled pictures)."""
    found = {}
    if "classes" in facts:
        counts = weights @ facts["classes"].flatten(1).double()  # (R, 3 K)
        resampled = accuracy_and_iou(counts.unflatten(1, (3, -1)))
        pairs = zip(accuracy_and_iou(facts["classes"].sum(0)), resampled, strict=True)
        found |= zip(("pixel_accuracy", "miou"), pairs, strict=True)
    if "color" in facts:
        means = (weights @ facts["color"] / weights.shape[1]).T  # (2, R)
        found |= zip(("cb_std", "cr_std"), zip(facts["color"].mean(0), means, strict=True), strict=True)
    return found


def lpips_network(path="", device="cpu"):
    """Return torchmetrics' LPIPS network: its own linear weights over torchvision's AlexNet.

    :param path: AlexNet's weights; "": from TORCH_HOME, or downloaded.
    :raises InputError: a file that is missing, damaged or of another network.
    """
    from torchmetrics.functional.image.lpips import _NoTrainLpips

    try:
        with torch.random.fork_rng(devices=[]):  # initial weights would shift torch's global stream
            network = _NoTrainLpips(net="alex", pnet_rand=bool(path))
        if path:
            weights = torch.load(path, map_location="cpu", weights_only=True)
            # torchmetrics cuts the backbone into slices, whose layers keep their number: slice2.3 is features.3
            names = {key: re.sub(r"^slice\d+", "features", key) for key in network.net.state_dict()}
            network.net.load_state_dict({key: weights[name] for key, name in names.items()})
    except Exception as error:  # torch raises many kinds for damaged and for refused files
        found = f"--lpips_weights {path or 'not given'}: no AlexNet ({reason(error)})"
        raise InputError(f"{found}; give torchvision's alexnet-owt-7be5be79.pth, or leave lpips out") from None
    return network.to(device)


def inception_features(path="", device="cpu"):
    """Return a function from pictures (N, 3, H, W) in [-1, 1] to the (N, 2048) features of FID's Inception.

    :param path: pt_inception-2015-12-05-6726825d.pth; "": from TORCH_HOME, or downloaded.
    :raises InputError: torch-fidelity, which has the network, is missing, or the file is not right.
    """
    from torchmetrics.image.fid import NoTrainInceptionV3

    try:
        with torch.random.fork_rng(devices=[]):
            network = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(path) if path else None).to(device)
    except Exception as error:  # torch-fidelity is missing, or whatever it raises for other files
        hint = "pip install torch-fidelity, give pt_inception-2015-12-05-6726825d.pth as --fid_weights, or --features"
        raise InputError(f"--metrics fid and kid: no Inception ({reason(error)}); {hint}") from None
    return torch.no_grad()(lambda images: network((_unit(images) * 255).round().to(torch.uint8)))


def reason(error):
    """Return what an exception of another library says, on one line."""
    return (" ".join(str(error).split()) or type(error).__name__)[:160]
