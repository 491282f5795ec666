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
    there: list[Kept] = []
    new: list[tuple[Source, Tensor]] = []
    cost = source.price
    waiting, seen = list(source.inputs()), {source}
    while waiting:
        one = waiting.pop()
        if one in seen:
            continue
        seen.add(one)
        kept = one.kept()
        tensor = one.available() if kept is None else None
        if kept is not None:
            there.append(kept)
        elif tensor is not None:
            new.append((one, tensor))
            cost += one.size
        elif one.can_compute:
            waiting += one.inputs()
            cost += one.price
        else:
            return None
        if cost >= source.size or len(seen) > LONGEST:
            return None
    return there + [one.keep(tensor) for one, tensor in new]
