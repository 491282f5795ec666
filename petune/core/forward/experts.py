"""A projection of a mixture's experts as a computation that adapters stand around.

Letters of shapes: R rows (tokens, each as often as experts are picked for it), E experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from petune.core.forward.computation import Computation
from petune.core.forward.forward_pass import ForwardPass
from petune.core.forward.link import Link
from petune.core.host.experts import Stack
from petune.core.method.batch import Batch
from petune.errors import UnsupportedError


class FrozenProjection(Computation):
    """y = W_e x + b_e for rows x (R, in), sorted by their expert e; the result is (R, out).

    Args:
        counts: how many rows each of the E experts has.
    """

    def __init__(
        self, forward: ForwardPass, stack: Stack, x: Tensor, counts: Sequence[int]
    ) -> None:
        super().__init__(forward, (x,))
        self.stack, self._counts = stack, list(counts)

    @property
    def counts(self) -> list[int]:
        return self._counts

    def __call__(self, x: Tensor, *_: object) -> Tensor:
        stack = self.stack
        weight = stack.weight.mT if stack.transposed else stack.weight
        results = [
            F.linear(rows, weight[e], None if stack.bias is None else stack.bias[e])
            for e, rows in enumerate(torch.split(x, self.counts))
            if len(rows)
        ]
        return torch.cat(results) if results else x.new_empty(0, weight.shape[1])

    def batch(self, link: Link) -> Batch:
        raise UnsupportedError(
            f"{link.tuning.method!r} acts by position, and {link.site.name} gets its rows sorted by expert."
        )
