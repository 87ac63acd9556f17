"""Networks that a user brings as a file: segmenters (picture -> class ids) and feature extractors (picture -> vector).

Two formats are read: TorchScript (torch.jit.save) and exported programs (torch.export.save). Both are programs that run
with your rights: load only files that you trust.
"""

import warnings
import zipfile

import torch

from ..console import InputError
from .metrics import reason


def load_network(path, flag, device="cpu"):
    """Load a TorchScript file or an exported program, which you must trust.

    :param flag: the flag that named the file, for messages.
    :return: function of pictures (N, 3, H, W) in [-1, 1], without gradients; it raises InputError where the network
        fails on pictures of this size.
    :raises InputError: a file that is missing, damaged or of another kind.
    """
    try:
        with warnings.catch_warnings(), zipfile.ZipFile(path) as archive:
            warnings.simplefilter("ignore")  # torch's remark that TorchScript is on its way out
            if any(record.endswith("model.json") for record in archive.namelist()):
                run, batch = _program(path, device)
            else:
                run, batch = torch.jit.load(path, map_location=device).eval(), None
    except Exception as error:  # torch raises many kinds for damaged files
        wanted = "give a file of torch.jit.save or torch.export.save"
        raise InputError(f"--{flag} {path}: cannot be loaded ({reason(error)}); {wanted}") from None

    def network(images):
        size = batch or len(images)
        missing = -len(images) % size  # of the last group
        padded = torch.cat([images, images[:1].expand(missing, -1, -1, -1)]).to(device)
        try:
            with torch.no_grad():
                return torch.cat([run(group) for group in padded.split(size)])[: len(images)]
        except Exception as error:  # whatever a foreign network raises, most often about the size
            found = f"fails on {images.shape[2]}x{images.shape[3]} pictures ({reason(error)})"
            raise InputError(f"--{flag} {path} {found}; give a network of that size") from None

    return network


def _program(path, device):
    """Load an exported program; return it, and the batch size that it was fixed to, or None."""
    program = torch.export.load(path)
    if torch.device(device).type != "cpu":
        from torch.export.passes import move_to_device_pass

        program = move_to_device_pass(program, device)
    inputs = program.graph_signature.user_inputs
    given = next(node for node in program.graph.nodes if node.op == "placeholder" and node.name in inputs)
    batch = given.meta["val"].shape[0]  # a symbol: any batch
    return program.module(), batch if isinstance(batch, int) else None


def segment(network, images, num_classes, flag="segmenter"):
    """Return the class of every pixel, (N, 1, H, W) int64.

    :param network: a callable; gives scores (N, K, H, W), K = num_classes, or ids (N, H, W) or (N, 1, H, W).
    :param images: (N, 3, H, W) in [-1, 1].
    :param flag: the flag that brought the network, for messages.
    :raises InputError: an answer of another shape, or ids outside 0..num_classes-1.
    """
    (n, _, height, width), out = images.shape, network(images)
    shape = tuple(getattr(out, "shape", ()))
    if shape == (n, num_classes, height, width):
        out = out.argmax(1)
    elif shape not in ((n, height, width), (n, 1, height, width)):
        wanted = f"scores (N, K, H, W) of {num_classes} classes (--num_classes), or ids (N, H, W)"
        raise InputError(f"--{flag} gave {shape} for pictures {tuple(images.shape)}; it must give {wanted}")
    ids = out.reshape(n, 1, height, width).long()
    if ids.min() < 0 or ids.max() >= num_classes:
        found = f"class ids {int(ids.min())}..{int(ids.max())}, but --num_classes is {num_classes}"
        raise InputError(f"--{flag} gave {found}; give a segmenter of the same label space")
    return ids


def features_of(network):
    """Return a function from pictures (N, 3, H, W) in [-1, 1] to feature vectors (N, D) float32.

    :param network: a callable; gives (N, D), or maps (N, D, H, W), which are averaged over pixels.
    """

    def features(images):
        out = network(images)
        if getattr(out, "ndim", 0) not in (2, 4):
            raise InputError("--features gave neither (N, D) nor (N, D, H, W); give a network that does")
        return out.float().mean((2, 3)) if out.ndim == 4 else out.float()

    return features


def disagreement(network, images, label, num_classes):
    """Return the share of pixels, (N,) in [0, 1], that a segmenter labels otherwise than the label map.

    It is the goal-driven distance of noise selection: 0 where the receiver's task is served perfectly.

    :param images: (N, 3, H, W) in [-1, 1].
    :param label: ids (N, 1, H, W), or (1, 1, H, W) for all.
    """
    ids = segment(network, images, num_classes)
    return (ids != label.to(ids.device)).float().mean((1, 2, 3))
