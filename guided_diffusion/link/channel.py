"""The analog channel of GESCO (arXiv 2306.04321): Gaussian noise on the semantic planes, then a pooling filter.

Only the planes of classes that are present, and the edge plane, are sent ("fast denoising semantics"). Which classes
those are is side information: one bit per class.
"""

import math

import torch
from torch.nn import functional as F

# GESCO's table, dB -> standard deviation. It is a convention, not a signal-to-noise ratio: 10 dB would be 0.316.
SNR_TABLE = {1: 0.9, 5: 0.6, 10: 0.36, 15: 0.22, 20: 0.13, 25: 0.08, 30: 0.05, 100: 0.0}

# What a training picture meets, drawn uniformly: a third of them arrive clean.
TRAINING_SIGMAS = (0.6, 0.36, 0.22, 0.13, 0.08, 0.05, 0.0, 0.0, 0.0)


def snr_to_sigma(snr_db):
    """Standard deviation of the noise that `--snr` stands for.

    :param snr_db: nominal SNR in dB, at least 1. Between the table's rows log sigma is linear in dB; above 30 dB it
        falls by 20 dB per decade; from 100 dB on there is no noise.
    """
    if snr_db >= 100:
        return 0.0
    if snr_db > 30:
        return SNR_TABLE[30] * 10 ** (-(snr_db - 30) / 20)
    if snr_db in SNR_TABLE:
        return SNR_TABLE[snr_db]
    low, high = max(row for row in SNR_TABLE if row < snr_db), min(row for row in SNR_TABLE if row > snr_db)
    share = (snr_db - low) / (high - low)
    return math.exp((1 - share) * math.log(SNR_TABLE[low]) + share * math.log(SNR_TABLE[high]))


def sent_planes(y, num_classes, one_hot=True):
    """Return a mask (N, C) of the planes that are sent: classes that occur in the picture, and the edge plane."""
    sent = torch.ones(y.shape[:2], dtype=torch.bool, device=y.device)
    if one_hot:
        sent[:, :num_classes] = y[:, :num_classes].flatten(2).amax(2) > 0
    return sent


def transmit(y, sigma, *, generators, num_classes, one_hot=True, pool="None", noise_to="semantics"):
    """Send the conditioning y (N, C, H, W), from `encode_semantics`, over the analog channel.

    :param sigma: (N,) or a float: standard deviation of the noise (see `snr_to_sigma`).
    :param generators: N CPU generators, one per sample.
    :param pool: "None", or of every sent plane "med" (3x3 median), "mean" (3x3 average) or "max" (3x3 maximum of that).
    :param noise_to: "semantics" (every sent plane) or "label" (the edge plane is spared the noise).
    :return: (N, C, H, W) as received; planes that were not sent are zero.
    """
    sigmas = torch.as_tensor(sigma, dtype=torch.float64, device="cpu").expand(len(y)).tolist()
    sent = sent_planes(y, num_classes, one_hot)
    noisy, received = sent.clone(), y.clone()
    if noise_to == "label":
        noisy[:, num_classes if one_hot else 1 :] = False
    for planes, picture, level, stream in zip(noisy, received, sigmas, generators, strict=True):
        if level:
            rows = planes.nonzero().flatten()
            picture[rows] += level * torch.randn(len(rows), *y.shape[2:], generator=stream).to(y)
    return apply_pool(received, pool) * sent[:, :, None, None]


def apply_pool(y, pool):
    """Filter every plane of y (N, C, H, W) with one of the pools of `transmit` (GESCO's denoising of semantics).

    The median pads by reflection, which needs sides of at least 2; averages pad with zeros and divide by 9.
    """
    if pool == "None":
        return y
    if pool == "med":
        padded = F.pad(y, (1, 1, 1, 1), mode="reflect")
        return padded.unfold(2, 3, 1).unfold(3, 3, 1).flatten(4).median(-1).values  # of (N, C, H, W, 9)
    mean = F.avg_pool2d(y, 3, stride=1, padding=1)
    return F.max_pool2d(mean, 3, stride=1, padding=1) if pool == "max" else mean
