"""Label maps by a small integer network that was fitted to training maps: what a receiver knows of streets is not sent.

As in `entropy_coding`, each pixel is asked for in raster order: is it that of the left, upper, upper right or upper
left pixel, else which class, bit by bit. The probability of each answer comes from a window of coded pixels and the
place in the picture, by a network of one hidden layer (PixelRNN, arXiv 1601.06759, in small), and is counted on where a
window comes again. Weights are integers, and so is all arithmetic: both ends agree on any machine.
"""

import functools
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from ..console import InputError
from ..data.semantics import LABEL_SCALES
from .entropy_coding import MAX_PIXELS, ONE, coder

HIDDEN = 32
_WINDOW = ((3, -2, 4), (2, -3, 5), (1, -4, 7), (0, -5, 0))  # rows above, first column, one behind the last
_PLACES = sum(end - start for _, start, end in _WINDOW)  # 30 pixels of the window
_NEAR = (29, 18, 19, 17)  # left, upper, upper right and upper left of them
_BANDS = 16  # parts of height and width
_UNIT, _RANGE = 256, 11 * 256  # weights and logits are in 1/256; logits up to 11
_TRUST = 64  # twice the count that the network's probability stands for
_BATCH, _STEPS, _PASSES, _FLAT = 2048, (100, 3500), 3, 16  # of fitting; of flat windows, one in 16 is looked at


@dataclass(frozen=True, eq=False)
class LabelPrior:
    """What label maps look like.

    :param weights: (rows, 32) of whole numbers, of `shape`: a row per input, then one per binary decision.
    :param classes: ids lie below it.
    """

    weights: np.ndarray
    classes: int

    @staticmethod
    def shape(classes):
        """(rows, 32) of the weights for so many classes, 1...256."""
        return _inputs_in_all(classes) + 3 + (1 << _depth(classes)), HIDDEN

    @classmethod
    def fit(cls, maps, classes):
        """Fit a prior to an iterable of label maps (H, W) uint8, at all scales that are sent."""
        small = (each[s // 2 :: s, s // 2 :: s] for each in maps for s in LABEL_SCALES if min(each.shape) > s // 2)
        samples = (_samples(each, _outside(classes)) for each in small)
        keys, symbols, counts = (np.concatenate(part) for part in zip(*samples, strict=True))
        draws, split = torch.Generator().manual_seed(0), _inputs_in_all(classes)
        weights = [0.1 * torch.randn(split, HIDDEN, generator=draws)]
        weights.append(torch.zeros(cls.shape(classes)[0] - split, HIDDEN))
        optimizer = torch.optim.Adam([each.requires_grad_() for each in weights], lr=0.01)
        steps = int(np.clip(_PASSES * len(keys) // _BATCH, *_STEPS))
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, steps)
        for _ in range(steps):
            chosen = torch.randint(len(keys), (_BATCH,), generator=draws).numpy()
            rows = torch.from_numpy(_inputs(keys[chosen], classes))
            logits = F.relu(F.embedding_bag(rows, weights[0], mode="sum")) @ weights[1].T
            asked, answers = map(torch.from_numpy, _decisions(keys[chosen], symbols[chosen], classes))
            losses = F.binary_cross_entropy_with_logits(logits, answers, reduction="none") * asked
            optimizer.zero_grad()
            (losses.sum(1) @ torch.from_numpy(counts[chosen])).div(_BATCH).backward()
            optimizer.step()
            schedule.step()
        table = (torch.cat(weights).detach() * _UNIT).round()
        return cls(table.clamp(-(2**15), 2**15).numpy(), classes)

    @classmethod
    def of(cls, model, classes):
        """Return the prior that a network carries in its weights, as a buffer; None without a colour layer."""
        return cls(model.label_prior.cpu().numpy(), classes) if model.layer_channels else None

    def encode(self, ids):
        """Code a map (h, w) uint8 losslessly: bytes, or None where it is too large or irregular."""
        code, finish = coder()
        return finish() if ids.size <= MAX_PIXELS and self._walk(self._padded(ids), code) else None

    def decode(self, data, height, width):
        """Undo `encode`: return (height, width) uint8. Raises InputError for all but what `encode` makes of a map."""
        if height * width > MAX_PIXELS:
            raise InputError(f"label map of {width}x{height} pixels: beyond the coder's limits")
        code, finish = coder(data)
        rows = self._padded(np.zeros((height, width), np.uint8))
        if not self._walk(rows, code) or finish() != data:
            raise InputError("the label map is damaged, or made with another prior; send it again")
        return np.array([np.frombuffer(row, np.uint8) for row in rows])[3:, 5:-6]

    def _padded(self, ids):
        """Return the rows of a map, three rows and eleven columns of the outside around, as bytearrays."""
        return [bytearray(row) for row in np.pad(ids, ((3, 0), (5, 6)), constant_values=_outside(self.classes))]

    def _walk(self, rows, code):
        """Code the padded map, or fill it in with a decoder's `code`.

        Return False where new windows and spelt-out symbols, which take the time, exceed one per two pixels and 4,096
        more, or no encoder would spell a symbol.
        """
        height, width, bits = len(rows) - 3, len(rows[0]) - 11, _depth(self.classes)
        known, budget, nodes = {}, height * width // 2 + 4096, self._nodes()
        columns = [bytes([x * _BANDS // width]) for x in range(width)]
        for y in range(height):
            up3, up2, up, row = rows[y : y + 4]
            band = bytes([y * _BANDS // height])
            for x in range(5, width + 5):
                key = bytes(up3[x - 2 : x + 4] + up2[x - 3 : x + 5] + up[x - 4 : x + 7] + row[x - 5 : x])
                key += band + columns[x - 5]
                state = known.get(key)
                if state is None:
                    if (budget := budget - 1) < 0:
                        return False
                    state = known[key] = nodes(key)
                guesses, tree = state
                symbol = row[x]
                for guess, node in guesses:
                    if code(node, symbol == guess):
                        row[x] = guess
                        break
                else:
                    budget, prefix = budget - 1, 1
                    for k in reversed(range(bits)):
                        prefix = prefix * 2 + code(tree(prefix), symbol >> k & 1)
                    row[x] = symbol = prefix - (1 << bits)
                    if budget < 0 or symbol >= self.classes or any(symbol == guess for guess, _ in guesses):
                        return False
        return True

    def _nodes(self):
        """Return a function from a window to [(guess, node)] of its neighbours, and one from a prefix to its node."""
        # Whole numbers below 2^53: sums are exact in any order.
        inputs, decisions = np.split(self.weights.astype(np.float64), [_inputs_in_all(self.classes)])
        firsts, outside, chances = _firsts(self.classes), _outside(self.classes), _chances()

        def nodes(key):
            near, alike = [key[place] for place in _NEAR], bytearray(b"\4" * 256)
            guesses = {}
            for k in (3, 2, 1, 0):
                alike[near[k]] = k
            rows = np.frombuffer(key[:_PLACES].translate(alike) + key, np.uint8) + firsts  # as `_inputs` of many
            hidden = np.maximum(inputs.take(rows, 0).sum(0), 0)  # (32,)

            def node(logit):
                return [chances[min(max(int(logit // _UNIT), -_RANGE), _RANGE) + _RANGE], _TRUST, None]

            for guess, logit in zip(near, (decisions[:4] @ hidden).tolist(), strict=True):
                if guess != outside and guess not in guesses:
                    guesses[guess] = node(logit)
            return list(guesses.items()), lambda prefix: node(decisions[3 + prefix] @ hidden)

        return nodes


@functools.cache
def _chances():
    """Return the probabilities (in 1/65536) of all logits."""
    logits = np.arange(-_RANGE, _RANGE + 1) / _UNIT
    return np.round(ONE / (1 + np.exp(-logits))).astype(int).clip(32, ONE - 32).tolist()


def _depth(classes):
    return max(1, (classes - 1).bit_length())


def _outside(classes):
    """What stands for pixels outside the map."""
    return min(classes, 255)


def _inputs_in_all(classes):
    return _PLACES * (5 + _outside(classes) + 1) + 2 * _BANDS


@functools.cache
def _firsts(classes):
    """Return the first row of each input, (62,): which near pixel a window's pixels equal, their classes, the bands."""
    sizes = np.repeat([5, _outside(classes) + 1, _BANDS], [_PLACES, _PLACES, 2])
    return np.cumsum(sizes) - sizes


def _inputs(keys, classes):
    """Return the rows of the inputs that are on, (n, 62), of windows (n, 32)."""
    window = keys[:, :_PLACES]
    same = np.ones((*window.shape, 5), bool)
    same[..., :4] = window[..., None] == window[:, None, _NEAR]
    # Which near pixel comes first that is equal, 4: none
    return np.concatenate([same.argmax(-1), keys], 1) + _firsts(classes)


def _samples(ids, outside):
    """Return the windows of a map with their bands (n, 32), symbols (n,), and how many each stands for (n,) float32."""
    height, width = ids.shape
    padded = np.pad(ids, ((3, 0), (5, 6)), constant_values=outside)
    shifts = [(3 - up, 5 + column) for up, start, end in _WINDOW for column in range(start, end)]
    keys = [padded[y : y + height, x : x + width] for y, x in shifts]
    rows, columns = (np.arange(side, dtype=np.int64) * _BANDS // side for side in ids.shape)
    keys += [np.broadcast_to(rows[:, None], ids.shape), np.broadcast_to(columns, ids.shape)]
    keys, symbols = np.stack(keys, -1).reshape(-1, _PLACES + 2).astype(np.uint8), ids.ravel()
    flat = (keys[:, :_PLACES] == symbols[:, None]).all(1)
    kept = ~flat | (np.arange(len(flat)) % _FLAT == 0)
    return keys[kept], symbols[kept], np.where(flat, _FLAT, 1).astype(np.float32)[kept]


def _decisions(keys, symbols, classes):
    """Return which decisions are asked for each symbol, and their answers: (n, decisions) float32 each."""
    near, bits = keys[:, _NEAR], _depth(classes)
    asked = np.zeros((len(keys), 3 + (1 << bits)), np.float32)
    answers, left = asked.copy(), np.ones(len(keys), bool)
    for k in range(4):
        new = left & (near[:, k] != _outside(classes)) & (near[:, :k] != near[:, k : k + 1]).all(1)
        asked[:, k], answers[:, k] = new, near[:, k] == symbols
        left &= ~(new & (near[:, k] == symbols))
    prefixes = symbols.astype(np.int64)[:, None] + (1 << bits) >> np.arange(bits, -1, -1)  # (n, bits + 1)
    rows = np.flatnonzero(left)[:, None]
    asked[rows, 3 + prefixes[left, :-1]] = 1
    answers[rows, 3 + prefixes[left, :-1]] = prefixes[left, 1:] & 1
    return asked, answers
