"""Steps of several contenders in turns, so that whatever disturbs the machine disturbs them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from petune_bench.performance.contenders import Batch

WARM_UP = 2
"""Steps that are not timed: caches fill, compilers compile."""


@dataclass
class Times:
    """What a contender's steps took, in seconds, and their losses."""

    warm_up: float = 0.0
    steps: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.steps)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, as a share of the median."""
        low, _, high = statistics.quantiles(self.steps, n=4)
        return (high - low) / 2 / self.median


class Steps(Protocol):
    """Who can take part."""

    name: str

    def step(self, batch: Batch) -> tuple[float, float]:
        """(seconds, loss) of one training step."""


def race(contenders: Sequence[Steps], batches: Iterable[Batch]) -> dict[str, Times]:
    """Every contender on every batch, in turns. Losses count from the first step on, times after the warm-up."""
    times = {c.name: Times() for c in contenders}
    for i, batch in enumerate(batches):
        for contender in contenders:
            seconds, loss = contender.step(batch)
            mine = times[contender.name]
            mine.losses.append(loss)
            if i < WARM_UP:
                mine.warm_up += seconds
            else:
                mine.steps.append(seconds)
    return times


def ratios(times: Times, peer: Times) -> float:
    """The median over the steps of the time that each took, as a share of the peer's on the same batch."""
    return statistics.median(
        mine / other for mine, other in zip(times.steps, peer.steps, strict=True)
    )


def apart(times: Times, peer: Times) -> float:
    """The largest difference between the losses of two on the same batch, as a share of the peer's."""
    return max(
        abs(mine - other) / abs(other)
        for mine, other in zip(times.losses, peer.losses, strict=True)
    )


def sgemm_rate(
    tokens: int = 1024, width: int = 576, wide: int = 1536, seconds: float = 1.0
) -> float:
    """Floating-point operations a second of this machine's float32 matrix product, at its best."""
    x, w = torch.randn(tokens, width), torch.randn(wide, width)
    best, until = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < until:
        began = time.perf_counter()
        torch.nn.functional.linear(x, w)
        best = max(best, 2 * tokens * width * wide / (time.perf_counter() - began))
    return best
