"""The order in which training rows are visited: a function of the seed and the epoch alone, so runs can resume."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

_POOL = 50  # batches among which rows are exchanged for the sake of like lengths
_EPOCH = (
    1_000_003  # what an epoch adds to the seed: more than the seeds of runs differ by
)


class EpochSampler(Sampler[int]):
    """A shuffle that, if `grouped`, puts rows of like length side by side, in batches whose order is random.

    `epoch` is set from outside; the same seed and epoch give the same order.
    """

    def __init__(
        self, lengths: Sequence[int], batch_size: int, seed: int, grouped: bool
    ) -> None:
        self.lengths = lengths
        self.batch_size = batch_size
        self.seed = seed
        self.grouped = grouped
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + _EPOCH * self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        return iter(self._by_length(order, generator) if self.grouped else order)

    def _by_length(self, order: list[int], generator: torch.Generator) -> list[int]:
        """Rows of a random order in batches of like length, which come in a random order too."""
        pool, size = self.batch_size * _POOL, self.batch_size
        alike: list[int] = []
        for start in range(0, len(order), pool):
            alike += sorted(order[start : start + pool], key=self.lengths.__getitem__)
        whole = len(order) // size
        mixed: list[int] = []
        for batch in torch.randperm(whole, generator=generator).tolist():
            mixed += alike[batch * size : (batch + 1) * size]
        rest = alike[whole * size :]  # fills no batch, so it can only come last
        return mixed + rest
