"""Train a small segmenter of street scenes, for --segmenter and --features.

python docs/train_segmenter.py --data_dir DIR --image_size 64 --output segmenter.pt --features features.pt

It learns to label pictures of the training split, with flips, tints and blur so that regenerated (soft, tinted)
pictures are no surprise to it, and is scored on the validation split. Both files are TorchScript: the segmenter gives
(N, K, H, W) scores of pictures (N, 3, H, W) in [-1, 1], H and W divisible by 8; the features are (N, 128) means of its
deepest layer.
"""

import argparse
import os
import warnings

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from guided_diffusion import load_data
from guided_diffusion.evaluation.metrics import accuracy_and_iou, class_counts
from guided_diffusion.evaluation.segmenters import segment
from guided_diffusion.files import atomic_write
from guided_diffusion.random_streams import generator, stream_seed


def block(inputs, outputs, stride=1, dilation=1):
    """3x3 convolution, batch norm, ReLU."""
    convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=dilation, dilation=dilation, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class Encoder(nn.Module):
    """Pictures (N, 3, H, W) -> four maps: 16 channels at full size, then 32, 64, 128 at 1/2, 1/4, 1/8."""

    def __init__(self):
        super().__init__()
        self.at_full = block(3, 16)
        self.at_half = nn.Sequential(block(16, 32, 2), block(32, 32))
        self.at_quarter = nn.Sequential(block(32, 64, 2), block(64, 64))
        # Dilation widens what a pixel sees: the side of the road tells pavement from street.
        self.at_eighth = nn.Sequential(block(64, 128, 2), block(128, 128, dilation=2), block(128, 128, dilation=4))

    def forward(self, x):
        full = self.at_full(x)
        half = self.at_half(full)
        quarter = self.at_quarter(half)
        return full, half, quarter, self.at_eighth(quarter)


class Segmenter(nn.Module):
    """A U-Net of 0.6 M parameters: pictures (N, 3, H, W) in [-1, 1] -> class scores (N, K, H, W)."""

    def __init__(self, num_classes):
        super().__init__()
        self.encoder = Encoder()
        self.up_quarter, self.up_half, self.up_full = block(128 + 64, 64), block(64 + 32, 32), block(32 + 16, 16)
        self.scores = nn.Conv2d(16, num_classes, 1)

    def forward(self, x):
        full, half, quarter, y = self.encoder(x)
        y = self.up_quarter(torch.cat((F.interpolate(y, scale_factor=2.0), quarter), 1))
        y = self.up_half(torch.cat((F.interpolate(y, scale_factor=2.0), half), 1))
        y = self.up_full(torch.cat((F.interpolate(y, scale_factor=2.0), full), 1))
        return self.scores(y)


class Features(nn.Module):
    """The encoder's deepest map, averaged over pixels: (N, 3, H, W) -> (N, 128)."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, x):
        return self.encoder(x)[3].mean((2, 3))


def read_split(options, data_dir, is_train):
    """Read one split whole: pictures (n, 3, H, W) in [-1, 1] and labels (n, 1, H, W)."""
    batches = list(
        load_data(
            dataset_mode="cityscapes",
            data_dir=data_dir,
            batch_size=16,
            image_size=options.image_size,
            is_train=is_train,
            deterministic=True,
            num_classes=options.num_classes,
            leave_out=options.leave_out if is_train else "",
        )
    )
    return torch.cat([batch["image"] for batch in batches]), torch.cat([batch["label"] for batch in batches])


def uniform(size, low, high, stream):
    """Draw one number per picture, shaped to multiply pictures."""
    return low + (high - low) * torch.rand(*size, *[1] * (4 - len(size)), generator=stream)


def augment(images, labels, stream):
    """Flip, tint, change contrast and brightness, soften, and add grain; each picture differently."""
    n = len(images)
    flipped = (torch.rand(n, generator=stream) < 0.5)[:, None, None, None]
    images, labels = torch.where(flipped, images.flip(3), images), torch.where(flipped, labels.flip(3), labels)
    images = images * uniform((n,), 0.7, 1.4, stream) + uniform((n,), -0.25, 0.25, stream)
    images = images + uniform((n, 3), -0.15, 0.15, stream)
    soft = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="reflect"), 3, 1)
    softer = F.avg_pool2d(F.pad(soft, (2, 2, 2, 2), mode="reflect"), 5, 1)
    chosen = torch.rand(n, generator=stream)[:, None, None, None]
    images = torch.where(chosen < 0.4, images, torch.where(chosen < 0.75, soft, softer))
    images = images + uniform((n,), 0, 0.1, stream) * torch.randn(images.shape, generator=stream)
    return images.clamp(-1, 1), labels


def train(model, images, labels, options):
    """Adam with one rising and falling learning rate, cross-entropy over the classes."""
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-3)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.lr, total_steps=options.steps)
    model.train()
    with tqdm(range(options.steps), desc="segmenter", unit="step", dynamic_ncols=True) as bar:
        for step in bar:
            stream = generator(options.seed, "segmenter batch", step)
            rows = torch.randint(len(images), (options.batch_size,), generator=stream)
            pictures, target = augment(images[rows], labels[rows], stream)
            loss = F.cross_entropy(model(pictures), target[:, 0])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rate.step()
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    model.eval()


def scores(model, images, labels, num_classes):
    """Return (pixel accuracy, mIoU over the classes present) of a network on one split."""
    pairs = zip(images.split(16), labels.split(16), strict=True)
    counts = [class_counts(segment(model, pictures, num_classes), target, num_classes) for pictures, target in pairs]
    return accuracy_and_iou(torch.cat(counts).sum(0))


def save(network, path):
    """Write a network as TorchScript, whole or not at all."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's remark that TorchScript is on its way out
        script = torch.jit.script(network).save_to_buffer()
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with atomic_write(path, "wb") as f:
        f.write(script)


def parse():
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data_dir", required=True, help="folder of a Cityscapes-like data set")
    parser.add_argument("--leave_out", default="", help="training scenes to leave out, as --leave_out of the scripts")
    parser.add_argument("--val_dir", default="", help="score on this folder's validation split as well")
    parser.add_argument("--image_size", type=int, default=64, help="short side of the pictures, a multiple of 8")
    parser.add_argument("--num_classes", type=int, default=35)
    parser.add_argument("--output", default="segmenter.pt", help="the segmenter's TorchScript file")
    parser.add_argument("--features", default="", help="also write the feature extractor, for KID and FID")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=6e-3, help="the highest learning rate")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main():
    """Train, score, save."""
    options = parse()
    torch.manual_seed(stream_seed(options.seed, "segmenter start"))
    model = Segmenter(options.num_classes).to(memory_format=torch.channels_last)  # faster on CPUs
    train(model, *read_split(options, options.data_dir, True), options)
    for folder in filter(None, (options.data_dir, options.val_dir)):
        accuracy, iou = scores(model, *read_split(options, folder, False), options.num_classes)
        print(f"{folder}, validation split: pixel accuracy {accuracy:.3f}, mIoU {iou:.3f}")
    save(model, options.output)
    print(f"the segmenter is in {options.output}")
    if options.features:
        save(Features(model.encoder), options.features)
        print(f"the feature extractor is in {options.features}")


if __name__ == "__main__":
    main()
