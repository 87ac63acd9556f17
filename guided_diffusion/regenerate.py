"""A sampling run: pictures in, regenerated pictures, a table and a panel out. Run again, it goes on where it stopped."""

import csv
import dataclasses
import hashlib
import json
import os
import sys
import time
from collections import Counter
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from .data.semantics import encode_semantics
from .diffusion.sampling import EarlyStop, sample
from .errors import InputError
from .files import whole_file
from .link.channel import snr_to_sigma, transmit
from .metrics import colour_error, psnr
from .panels import palette, picture_grid, save_picture, show_semantics, to_uint8
from .random_streams import generator, integer, stream_seed, text_number
from .training.distributed import autocast

COLUMNS = ("path", "name", "bank_index", "steps", "snr_db", "seconds", "psnr_db", "colour_error")

# Flags that may change between two runs into the same folder.
_FREE = {"results_path", "num_samples", "batch_size", "num_workers", "device", "dry_run", "preset", "panel_items",
         "use_fp16", "noise_bank_cache", "dropout", "use_checkpoint", "use_kl", "rescale_learned_sigmas", "add_noise",
         "noise_to"}  # fmt: skip


def unique_names(paths):
    """Return a file stem for each path: its own stem, or with as many of its folders as tell equal stems apart."""
    parts = [PurePosixPath(str(path).replace("\\", "/")).with_suffix("").parts for path in paths]
    names = [part[-1] for part in parts]
    for depth in range(2, max(map(len, parts), default=1) + 1):
        counts = Counter(names)
        if max(counts.values(), default=1) == 1:
            break
        names = ["__".join(part[-depth:]).replace("/", "") if counts[name] > 1 else name
                 for name, part in zip(names, parts, strict=True)]  # fmt: skip
    counts = Counter(names)
    return [f"{name}__{k}" if counts[name] > 1 else name for k, name in enumerate(names)]


class Regeneration:
    """Sends the pictures of a split over the channel and regenerates them.

    :param config: a `SampleConfig`.
    :param weights: path of the weights file.
    :param parts: what `build.sampling_parts` returns.
    """

    def __init__(self, config, weights, parts):
        self.config, self.weights, self.parts = config, weights, parts
        self.folder = Path(config.results_path)
        self.dataset, self.bank = parts["dataset"], parts["bank"]
        self.count = min(config.num_samples, len(self.dataset))
        paths = [str(pair.image or pair.label) for pair in self.dataset.pairs]
        self.paths, self.names = paths, unique_names(paths)
        self.sigma = snr_to_sigma(config.snr)
        # What is drawn for a picture follows from its name, so that further files in the split change nothing.
        self.numbers = [text_number(pair.stem) for pair in self.dataset.pairs]
        self.stop = EarlyStop(config.stop_tol, config.stop_patience, config.stop_min_steps) if config.stop_tol else None

    # -- the run ------------------------------------------------------------------------------------------------------

    def run(self):
        """Regenerate what is not done yet; return the rows of the whole table."""
        self._claim_folder()
        rows = self._finished_rows()
        todo = [k for k in range(self.count) if k not in rows]
        if len(todo) < self.count:
            print(f"{self.count - len(todo)} of {self.count} pictures are done already", file=sys.stderr)
        size = self.config.batch_size
        steps = self.parts["diffusion"].num_timesteps
        batches = [todo[i : i + size] for i in range(0, len(todo), size)]
        with tqdm(total=len(batches) * steps, unit="step", file=sys.stderr, dynamic_ncols=True) as bar:
            for number, batch in enumerate(batches, 1):
                bar.set_description(f"pictures {batch[0] + 1}-{batch[-1] + 1} of {self.count}")
                for k, row in zip(batch, self._regenerate(batch, bar), strict=True):
                    rows[k] = row
                bar.update(number * steps - bar.n)  # early stops leave steps out
                self._write_table(rows)
        self._write_panel(sorted(rows)[: self.config.panel_items])
        return [rows[k] for k in sorted(rows)]

    def _regenerate(self, numbers, bar):
        """Regenerate one batch of pictures, write their files, and return their rows."""
        started = time.monotonic()
        config = self.config
        batch = self.dataset.batch(numbers)
        sent = self._encode(batch)
        streams = [generator(config.seed, "channel", self.numbers[k]) for k in numbers]
        received = transmit(sent, self.sigma, generators=streams, num_classes=config.num_classes,
                            one_hot=config.one_hot_label, pool=config.pool)  # fmt: skip
        indices = [self._index(k) for k in numbers]
        result = self._sample(received, *self._start(numbers, indices, sent.shape[2:]), bar)
        images = result.images.float().cpu()
        seconds = (time.monotonic() - started) / len(numbers)
        self._write_pictures(numbers, batch, received, images)
        rows = [
            {"path": self.paths[k], "name": self.names[k], "bank_index": index, "steps": int(steps),
             "snr_db": f"{config.snr:g}", "seconds": f"{seconds:.3f}"}
            for k, index, steps in zip(numbers, indices, result.steps, strict=True)
        ]  # fmt: skip
        if "image" in batch:
            measures = zip(rows, psnr(images, batch["image"]), colour_error(images, batch["image"]), strict=True)
            for row, psnr_db, error in measures:
                row |= {"psnr_db": f"{float(psnr_db):.3f}", "colour_error": f"{float(error.mean()):.4f}"}
        return rows

    def _sample(self, received, noise, seeds, bar):
        config, device = self.config, self.parts["device"]
        with autocast(device, self.parts["precision"]):
            return sample(
                self.parts["model"], self.parts["diffusion"], received.to(device), noise.to(device),
                method="ddim" if config.use_ddim else "ddpm", s=config.s, eta=config.eta if config.use_ddim else 0.0,
                seeds=seeds, early_stop=self.stop, clip_denoised=config.clip_denoised, on_step=lambda *_: bar.update(),
            )  # fmt: skip

    def _encode(self, batch):
        return encode_semantics(batch["label"], batch.get("instance"), batch.get("image_edge"), self.config.num_classes,
                                self.config.one_hot_label, not self.config.no_instance)  # fmt: skip

    def _index(self, k):
        if self.bank is None:
            return ""
        asked = self.config.noise_index
        return integer(self.config.seed, "picture index", len(self.bank), self.numbers[k]) if asked == "random" else int(asked)

    def _start(self, numbers, indices, size):
        """Return x_T (N, 3, H, W) and the seeds of all later noise: from the bank, or fresh per picture without one."""
        if self.bank is not None:
            return self.bank.sized(3, *size).entries(indices), [self.bank.chain_seed(i) for i in indices]
        seed, named = self.config.seed, [self.numbers[k] for k in numbers]
        fresh = [torch.randn(3, *size, generator=generator(seed, "picture noise", number)) for number in named]
        return torch.stack(fresh), [stream_seed(seed, "picture chain", number) for number in named]

    def summary(self, rows):
        """Return lines that say what a run's rows amount to, and where its output is."""
        lines = [f"{len(rows)} pictures; results.csv, panel.png and pictures are in {self.folder}"]
        measured = [row for row in rows if row.get("psnr_db")]
        if measured:
            means = {c: float(np.mean([float(row[c]) for row in measured])) for c in ("psnr_db", "colour_error")}
            lines.insert(0, f"mean PSNR {means['psnr_db']:.2f} dB, mean colour error {means['colour_error']:.3f} of the range")
        return lines

    # -- files --------------------------------------------------------------------------------------------------------

    def _claim_folder(self):
        """Note the settings in the results folder, or check that those noted there are the same."""
        settings = {k: v for k, v in dataclasses.asdict(self.config).items() if k not in _FREE}
        for name, where in (("model_path", self.weights), ("data_dir", self.config.data_dir)):
            settings[name] = where if "://" in where else os.path.abspath(where)
        settings["weights_sha256"] = _digest(self.weights)
        path = self.folder / "settings.json"
        if path.exists():
            try:
                earlier = json.loads(path.read_text())
            except ValueError as error:
                raise InputError(f"{path}: no valid JSON ({error}); choose another --results_path") from None
            if not isinstance(earlier, dict):
                raise InputError(f"{path}: expected a JSON object; choose another --results_path")
            changed = [k for k in settings if earlier.get(k) != settings[k] and k != "model_path"]
            if changed:
                k = changed[0]
                raise InputError(f"--results_path {self.folder} holds results with {k} {earlier.get(k)!r}, now {settings[k]!r};"
                                 " choose another folder for other settings")  # fmt: skip
            return
        for name in ("results.csv", "config.json"):
            if (self.folder / name).exists():
                raise InputError(f"--results_path {self.folder} holds a {name} that is not of sampling; choose another folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as f:
            f.write(json.dumps(settings, indent=1) + "\n")

    def _file(self, kind, k):
        return self.folder / kind / f"{self.names[k]}.png"

    def _finished_rows(self):
        """Return the rows, by picture number, of pictures that an earlier run completed."""
        path = self.folder / "results.csv"
        if not path.exists():
            return {}
        numbers = {p: k for k, p in enumerate(self.paths)}
        with open(path, newline="") as f:
            rows = {numbers[row["path"]]: row for row in csv.DictReader(f) if row.get("path") in numbers}
        return {k: row for k, row in rows.items() if self._file("samples", k).exists()}

    def _write_table(self, rows):
        path = self.folder / "results.csv"
        with whole_file(path) as f:
            writer = csv.DictWriter(f, COLUMNS)
            writer.writeheader()
            writer.writerows(rows[k] for k in sorted(rows))

    def _write_pictures(self, numbers, batch, received, images):
        config = self.config
        kinds = {"received": show_semantics(received, config.num_classes, config.one_hot_label), "samples": to_uint8(images)}
        if "image" in batch:
            kinds["images"] = to_uint8(batch["image"])
        for j, k in enumerate(numbers):
            ids = batch["label"][j, 0].numpy().astype(np.uint8)
            save_picture(ids, self._file("labels", k), palette(config.num_classes))
            for kind, pictures in kinds.items():
                save_picture(pictures[j], self._file(kind, k))

    def _write_panel(self, numbers):
        if not numbers:
            return
        rows = []
        for k in numbers:
            files = [self._file(kind, k) for kind in ("images", "received", "samples")]
            original, received, regenerated = (_read(file) for file in files)
            sent = show_semantics(self._encode(self.dataset.batch([k])), self.config.num_classes, self.config.one_hot_label)[0]
            rows.append([original, sent, received, regenerated])
        captions = ["original", "sent semantics", f"received, {self.config.snr:g} dB, pool {self.config.pool}", "regenerated"]
        save_picture(picture_grid(rows, captions), self.folder / "panel.png")


def _read(path):
    return np.asarray(Image.open(path).convert("RGB")) if path.exists() else None


def _digest(path):
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while chunk := f.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()
