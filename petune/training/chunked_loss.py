"""The loss of many labelled tokens, of whose logits only a few rows exist at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

Head = Callable[[Tensor], Tensor]
"""(n, hidden) -> (n, vocabulary)."""


def token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), targets, reduction="sum")


def chunks(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, start + size)


class ChunkedLoss(torch.autograd.Function):
    """The summed loss of all rows. The gradient of a sum is known up to a factor when the sum is, so that every chunk
    computes its own in forward and its logits are gone before the next.
    """

    @staticmethod
    def forward(
        ctx: Any,
        head: Head,
        rows: int,
        targets: Tensor,
        hidden: Tensor,
        *params: Tensor,
    ) -> Tensor:
        ctx.wanted = [t.requires_grad for t in (hidden, *params)]
        sums = {
            id(t): torch.zeros_like(t) for t in (hidden, *params) if t.requires_grad
        }
        total = hidden.new_zeros((), dtype=torch.float32)
        for here in chunks(len(targets), rows):
            chunk = hidden[here].detach().requires_grad_(hidden.requires_grad)
            with torch.enable_grad():
                loss = token_loss(head(chunk), targets[here])
            total += loss.detach()
            grads = _gradients(loss, [t for t in (chunk, *params) if t.requires_grad])
            if chunk in grads:
                sums[id(hidden)][here].add_(grads.pop(chunk))
            for param, grad in grads.items():
                sums[id(param)].add_(grad)
        ctx.save_for_backward(*sums.values())
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        sums = iter(ctx.saved_tensors)
        scaled = (next(sums) * grad if wanted else None for wanted in ctx.wanted)
        return None, None, None, *scaled


def _gradients(loss: Tensor, inputs: list[Tensor]) -> dict[Tensor, Tensor]:
    """The gradients of those inputs that the loss depends on."""
    if not inputs:
        return {}
    found = torch.autograd.grad(loss, inputs, allow_unused=True)
    pairs = zip(inputs, found, strict=True)
    return {tensor: gradient for tensor, gradient in pairs if gradient is not None}
