"""Pictures received in any order, against a receiver that receives all of them in theirs."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest

from guided_diffusion.link.message import Reception
from guided_diffusion.link.recollection import Recollection


class Notes:
    """A receiver that tells what it would use: its own header and label map, or the last good ones."""

    header = label = None

    def accept(self, reception):
        self.header = self.header if reception.header is None else reception.header
        self.label = self.label if reception.label is None else reception.label
        return self.header, self.label

    def recall(self, message, label=True):
        self.header = message.header
        self.label = message.label if label else self.label


def message(k):
    return SimpleNamespace(header=f"header {k}", label=f"label {k}")


def reception(k, lost):
    sent, label = message(k), "labels" not in lost and "header" not in lost
    return Reception(None if "header" in lost else sent.header, sent.label if label else None, problems=lost)


def recollection(lost, crossed):
    """Return a `Recollection` over pictures that lose `lost[k]`; it notes in `crossed` which it lets cross again."""

    def cross(k, sent, receiver):
        assert sent == message(k)
        crossed.append(k)
        receiver.accept(reception(k, lost[k]))

    return Recollection(Notes(), message, cross)


def in_order(lost):
    receiver = Notes()
    return [receiver.accept(reception(k, parts)) for k, parts in enumerate(lost)]


LOSSES = [(), ("edges",), ("labels",), ("labels", "indices"), ("header",)]


def test_any_pictures_in_any_order_are_received_as_in_theirs():
    draw = np.random.default_rng(0)
    for _ in range(300):
        lost = [LOSSES[k] for k in draw.choice(5, size=9, p=[0.2, 0.1, 0.2, 0.1, 0.4])]
        expected, crossed = in_order(lost), []
        late = recollection(lost, crossed)
        known = draw.permutation(9)[: draw.integers(9)]
        late.lost.update({int(k): lost[k] for k in known})
        order = np.sort(draw.permutation(9)[:5]) if draw.random() < 0.5 else draw.permutation(9)
        for k in map(int, order):
            assert late.awaiting(k).accept(reception(k, lost[k])) == expected[k]
        assert len(crossed) == len({*crossed}) and not {*crossed} & {*known.tolist()}  # none twice


def test_every_pattern_of_three_shares():
    for lost in itertools.product([(), ("labels",), ("header",)], repeat=5):
        expected = in_order(lost)
        for share in range(3):
            late = recollection(lost, [])
            for k in range(share, 5, 3):
                assert late.awaiting(k).accept(reception(k, lost[k])) == expected[k]


@pytest.mark.parametrize(
    "lost, again",
    [
        ([(), (), (), (), ()], []),  # nothing lacks, nothing is looked up
        ([(), (), (), (), ("labels",)], [3]),
        ([(), (), (), (), ("header",)], [3]),
        ([(), (), ("labels",), ("header",), ("header",)], [3, 2, 1]),
        ([(), ("edges",), ("header",), ("edges",), ("labels",)], [3]),
    ],
)
def test_it_goes_back_only_as_far_as_needed(lost, again):
    crossed = []
    recollection(lost, crossed).awaiting(4).accept(reception(4, lost[4]))
    assert crossed == again


def test_it_goes_back_no_further_than_it_has_followed():
    lost, crossed = [("header",)] * 6, []
    late = recollection(lost, crossed)
    for k in (0, 1, 4, 5):
        assert late.awaiting(k).accept(reception(k, lost[k])) == (None, None)
    assert crossed == [3, 2]
