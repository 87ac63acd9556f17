"""Early stopping of training on a validation score (Diff-GOn, arXiv 2412.06980, section IV)."""

import math


class EarlyStopping:
    """Says when the score has not fallen by more than `min_delta` for `patience` evaluations.

    :param patience: evaluations without improvement; 0 never stops.
    :param min_delta: what counts as improvement, in units of the score.
    """

    def __init__(self, patience, min_delta=0.0):
        self.patience, self.min_delta = patience, min_delta
        self.best, self.best_step, self.waited = math.inf, None, 0

    def update(self, score, step):
        """Note a score; lower is better, and a NaN never improves."""
        if score < self.best - self.min_delta:
            self.best, self.best_step, self.waited = score, step, 0
        else:
            self.waited += 1

    @property
    def exhausted(self):
        """Whether training should stop."""
        return self.patience > 0 and self.waited >= self.patience

    def state_dict(self):
        """Return what resuming needs, in plain numbers."""
        return {"best": self.best, "best_step": self.best_step, "waited": self.waited}

    def load_state_dict(self, state):
        """Take over a state returned by `state_dict`."""
        self.best, self.best_step, self.waited = state["best"], state["best_step"], state["waited"]
