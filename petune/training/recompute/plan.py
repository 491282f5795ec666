"""What has to be kept so that a tensor can be computed again."""

from __future__ import annotations

from torch import Tensor

from petune.training.recompute.sources import Kept, Source

LONGEST = 64
"""So many operations are computed again for one tensor at most."""


def kept_instead(source: Source) -> list[Kept] | None:
    """What is kept in place of a source's tensor, so that it can be computed again.

    Returns:
        None where that takes as many bytes as the tensor itself, or what it was computed from has gone.
    """
    if not source.can_compute:
        return None
    for nearest in (False, True):
        plan = Plan(source, nearest)
        if plan.succeeds():
            return plan.carried_out()
    return None


class Plan:
    """A way to compute a source's tensor again, from the source down to what is there.

    Args:
        nearest: whether it begins at the nearest tensors that are there, which may be many or large, or goes down to
            those that can't be computed, which may have gone.

    Attributes:
        waiting: the sources of which it is not yet clear how they are had.
    """

    def __init__(self, source: Source, nearest: bool) -> None:
        self.source, self.nearest = source, nearest
        self.cost = source.price
        self.waiting = list(source.inputs())
        self.seen = {source}
        self.there: list[Kept] = []
        self.new: list[tuple[Source, Tensor]] = []

    def succeeds(self) -> bool:
        """Find out how all of them are had; False if they can't be, or cost too much."""
        while self.waiting:
            if not self.take(self.waiting.pop()) or self.costs_too_much():
                return False
        return True

    def take(self, one: Source) -> bool:
        """Find out how a source's tensor is had; False if it can't be."""
        if one in self.seen:
            return True
        self.seen.add(one)
        kept = one.kept()
        if kept is not None:
            self.there.append(kept)
            return True
        tensor = one.available() if self.nearest or not one.can_compute else None
        if tensor is not None:
            self.new.append((one, tensor))
            self.cost += one.size
            return True
        self.waiting += one.inputs()
        self.cost += one.price
        return one.can_compute

    def costs_too_much(self) -> bool:
        """Whether the tensor itself is cheaper to keep."""
        return self.cost >= self.source.size or len(self.seen) > LONGEST

    def carried_out(self) -> list[Kept]:
        """All that is kept, what was not kept before included."""
        return self.there + [one.keep(tensor) for one, tensor in self.new]
