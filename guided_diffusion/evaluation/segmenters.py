"""Networks that a user brings as a file: segmenters (picture -> class ids) and feature extractors (picture -> vector).

Two formats are read: TorchScript (torch.jit.save) and exported programs (torch.export.save). Both are programs that run
with your rights: load only files that you trust.
"""

import os
import warnings
import zipfile

import torch

from ..console import InputError


class Network:
    """A network from a file: call it on pictures (N, 3, H, W) in [-1, 1]; gradients are off.

    `batch` is the batch size that an exported program was fixed to, or None: it is then fed in such groups.

    :raises InputError: where the network fails on pictures of this size.
    """

    def __init__(self, run, name, batch=None, device="cpu"):
        self.run, self.name, self.batch, self.device = run, name, batch, device

    def __call__(self, images):
        size = self.batch or len(images)
        missing = -len(images) % size  # of the last group
        padded = torch.cat([images, images[:1].expand(missing, -1, -1, -1)]).to(self.device)
        try:
            with torch.no_grad():
                return torch.cat([self.run(group) for group in padded.split(size)])[: len(images)]
        except Exception as error:  # whatever a foreign network raises, most often about the size
            found = f"fails on {images.shape[2]}x{images.shape[3]} pictures ({_reason(error)})"
            raise InputError(f"{self.name} {found}; give a network of that size") from None


def load_network(path, flag, device="cpu"):
    """Load a TorchScript file or an exported program, which you must trust, as a `Network`.

    :param flag: the flag that named the file, for messages.
    :raises InputError: a file that is missing, damaged or of another kind.
    """
    name, formats = f"--{flag} {path}", "TorchScript (torch.jit.save) nor an exported program (torch.export.save)"
    if not os.path.isfile(path):
        raise InputError(f"{name}: no such file; give a TorchScript file or exported program")
    parts = set()
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            parts = {part for record in archive.namelist() for part in record.split("/")}
    if not {"model.json", "code"} & parts:
        raise InputError(f"{name}: neither {formats}, or cut short; write it again")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's remark that TorchScript is on its way out
            if "code" in parts:
                return Network(torch.jit.load(path, map_location=device).eval(), name, None, device)
            return _program(path, name, device)
    except Exception as error:  # torch raises many kinds for damaged files
        raise InputError(f"{name}: damaged ({_reason(error)}); write it again") from None


def _reason(error):
    return (str(error).strip().split("\n")[0] or type(error).__name__)[:160]


def _program(path, name, device):
    program = torch.export.load(path)
    if torch.device(device).type != "cpu":
        from torch.export.passes import move_to_device_pass

        program = move_to_device_pass(program, device)
    inputs = program.graph_signature.user_inputs
    given = next(node for node in program.graph.nodes if node.op == "placeholder" and node.name in inputs)
    batch = given.meta["val"].shape[0]  # a symbol: any batch
    return Network(program.module(), name, batch if isinstance(batch, int) else None, device)


# -- uses -------------------------------------------------------------------------------------------------------------


def segment(network, images, num_classes, flag="segmenter"):
    """Return the class of every pixel, (N, 1, H, W) int64.

    :param network: a callable; gives scores (N, K, H, W), K = num_classes, or ids (N, H, W) or (N, 1, H, W).
    :param images: (N, 3, H, W) in [-1, 1].
    :param flag: the flag that brought the network, for messages.
    :raises InputError: an answer of another shape, or ids outside 0..num_classes-1.
    """
    (n, _, height, width), out = images.shape, network(images)
    shape = tuple(out.shape) if torch.is_tensor(out) else type(out).__name__
    if shape == (n, height, width):
        ids = out[:, None].long()
    elif shape == (n, 1, height, width):
        ids = out.long()
    elif shape == (n, num_classes, height, width):
        ids = out.argmax(1, keepdim=True)
    else:
        wanted = f"scores (N, K, H, W) of {num_classes} classes (--num_classes), or ids (N, H, W)"
        raise InputError(f"--{flag} gave {shape} for pictures {tuple(images.shape)}; it must give {wanted}")
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
        if not torch.is_tensor(out) or out.dim() not in (2, 4):
            found = tuple(out.shape) if torch.is_tensor(out) else type(out).__name__
            raise InputError(f"--features gave {found} for {len(images)} pictures; it must give (N, D) or (N, D, H, W)")
        return out.float().mean((2, 3)) if out.dim() == 4 else out.float()

    return features


def disagreement(network, images, label, num_classes):
    """Return the share of pixels, (N,) in [0, 1], that a segmenter labels otherwise than the label map.

    It is the goal-driven distance of noise selection: 0 where the receiver's task is served perfectly.

    :param images: (N, 3, H, W) in [-1, 1].
    :param label: ids (N, 1, H, W), or (1, 1, H, W) for all.
    """
    ids = segment(network, images, num_classes)
    return (ids != label.to(ids.device)).float().mean((1, 2, 3))
