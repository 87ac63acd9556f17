"""Receiving some of the pictures as if all had been received in their order: what is lost is replaced by what came before."""


class Recollection:
    """Stands in for a `Receiver` of pictures 0, 1, 2, ... where only some of them cross here: the other shares', and those of
    an earlier run, are missing.

    A picture that arrives with header and label map needs nothing of those before. For another, it is found out what those
    before had: as far back as the receiver itself has followed, or to one that arrived with both.

    :param receiver: a `Receiver`.
    :param message: function picture number -> its `Message`.
    :param cross: function (picture number, `Message`, receiver) that lets the message cross exactly as its picture's does.
    """

    def __init__(self, receiver, message, cross):
        self.receiver, self.message, self.cross = receiver, message, cross
        self.lost = {}  # parts lost, by picture number, as far as that is known
        self.number, self.last = 0, -1  # the picture that is crossing, and the one whose arrival the receiver knows

    def awaiting(self, number):
        """Return itself, as the receiver of one picture."""
        self.number = number
        return self

    def accept(self, reception):
        """Make an `Arrival` of the picture's `Reception`, as `Receiver.accept` does."""
        if reception.header is None or reception.label is None:
            self._catch_up()
        self.last, self.lost[self.number] = self.number, reception.problems
        return self.receiver.accept(reception)

    def _catch_up(self):
        """Give the receiver the header and label map that it would have before this picture."""
        if self.last >= self.number:
            self.receiver.header = self.receiver.label = None
            self.last = -1
        arrived = []  # with a header, the newest first
        for k in range(self.number - 1, self.last, -1):
            lost = self._lost(k)
            if "header" not in lost:
                arrived.append(k)
                if "labels" not in lost:
                    break
        for k in sorted({*arrived[:1], *arrived[-1:]}):
            self.receiver.recall(self.message(k), label="labels" not in self.lost[k])

    def _lost(self, k):
        if k not in self.lost:
            listener = _Listener()
            self.cross(k, self.message(k), listener)
            self.lost[k] = listener.lost
        return self.lost[k]


class _Listener:
    """A receiver that only notes what was lost."""

    lost = ()

    def accept(self, reception):
        self.lost = reception.problems
