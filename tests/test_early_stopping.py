"""Early stopping of training on a validation score."""

import math

import pytest

from guided_diffusion.training.early_stopping import EarlyStopping


def stops_after(scores, patience, min_delta=0.0):
    """Number of scores after which training stops, or None."""
    rule = EarlyStopping(patience, min_delta)
    for n, score in enumerate(scores, 1):
        rule.update(score, 10 * n)
        if rule.exhausted:
            return n
    return None


@pytest.mark.parametrize(
    ("scores", "patience", "min_delta", "stop"),
    [
        ([5, 4, 3, 2, 1], 1, 0, None),
        ([5, 4, 4], 1, 0, 3),
        ([5, 4, 6, 5, 4], 3, 0, 5),
        ([5, 6, 4, 6, 3, 6], 2, 0, None),  # an improvement starts the count anew
        ([5, 4.95, 4.9, 4.85], 2, 0.1, 3),
        ([5, 4.94, 4.88, 4.8, 4.79], 2, 0.1, 5),  # measured from the best score, not from the last
        ([5, 4.5], 1, 0.5, 2),  # has to be beaten by more than min_delta
        ([5] * 50, 0, 0, None),  # 0 never stops
        ([math.nan] * 3, 3, 0, 3),
        ([5, math.nan, 4, math.nan, math.nan], 2, 0, 5),
    ],
)
def test_exhausted_after_patience_without_improvement(scores, patience, min_delta, stop):
    assert stops_after(scores, patience, min_delta) == stop
