"""The order in which training rows are visited: a function of the seed and the epoch alone, so runs can resume."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

_POOL = 50  # batches among which rows are exchanged for the sake of like lengths


class EpochSampler(Sampler[int]):
    """A shuffle that, if `grouped`, puts rows of like length side by side, in batches whose order is random.

    `epoch` is set from outside; the same seed and epoch give the same order.
    """

    def __init__(
        self, lengths: Sequence[int], batch_size: int, seed: int, grouped: bool
    ) -> None:
        self.lengths, self.batch_size, self.seed, self.grouped = (
            lengths,
            batch_size,
            seed,
            grouped,
        )
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + 1_000_003 * self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        if not self.grouped:
            return iter(order)
        size, pool = self.batch_size, self.batch_size * _POOL
        order = [
            row
            for start in range(0, len(order), pool)
            for row in sorted(order[start : start + pool], key=self.lengths.__getitem__)
        ]
        whole = len(order) // size
        batches = [
            order[i * size : (i + 1) * size]
            for i in torch.randperm(whole, generator=generator).tolist()
        ]
        return iter(
            [row for batch in batches for row in batch] + order[whole * size :]
        )  # the rest can't be inside
