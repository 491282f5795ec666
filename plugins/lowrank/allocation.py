"""How AdaLoRA shares its budget of ranks among the sites."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .adalora import AdaLoRA


@torch.no_grad()
def straighten(adapters: Sequence[AdaLoRA]) -> None:
    """Add the gradient of the mean over all P and Q of |P'P - I| and |QQ' - I|, in Frobenius norm, as the authors'
    code has it; the paper squares it.
    """
    for a in adapters:
        weight = a.orthogonality / len(adapters)
        if a.Q.grad is not None:
            a.Q.grad += _slope(a.Q, weight)
        if a.P.grad is not None:
            a.P.grad += _slope(a.P.T, weight).T


def _slope(rows: Tensor, weight: float) -> Tensor:
    """`weight` times half the gradient of |R R' - I| by the rows R, (rank, width). Half, since a mean over P and Q is
    half their sum.
    """
    one = torch.eye(len(rows), dtype=rows.dtype, device=rows.device)
    off = rows @ rows.T - one
    return off @ rows * (weight / off.norm().clamp(min=1e-12))


@torch.no_grad()
def observe(adapters: Sequence[AdaLoRA]) -> None:
    """Smooth |w dL/dw| of each weight w, and how far it is from its mean."""
    for a in adapters:
        for name, p in a.named_parameters():
            if p.grad is not None:
                mean = a.get_buffer(f"mean_{name}")
                spread = a.get_buffer(f"spread_{name}")
                now = (p * p.grad).abs()
                mean.lerp_(now, 1 - a.betas[0])
                spread.lerp_((now - mean).abs(), 1 - a.betas[1])


@torch.no_grad()
def allocate(adapters: Sequence[AdaLoRA], step: int, begin: int, end: int) -> None:
    """Cut the e of all sites to the budget of this step; after the last cut those that are gone stay gone."""
    between = begin < step < end and step % adapters[0].every == 0
    if between or step == end:
        _choose(adapters, (step - begin) / (end - begin))
    if between or step >= end:
        for a in adapters:
            a.e.mul_(a.keep)


def _choose(adapters: Sequence[AdaLoRA], progress: float) -> None:
    """Keep the most important e of all sites together. How many falls from all to the target, on a cubic schedule.

    Args:
        progress: the share of the schedule that is over, from 0 to 1.
    """
    scores = [_importance(a) for a in adapters]
    everything = torch.cat([score.cpu() for score in scores])
    count, target = len(everything), sum(a.target for a in adapters)
    left = 1 - progress
    kept = int((count - target) * left**3 + target)
    gone = count - kept
    bound = everything.kthvalue(gone).values.item() if gone else float("-inf")
    for a, score in zip(adapters, scores, strict=True):
        a.keep.copy_(score > bound)


def _importance(a: AdaLoRA) -> Tensor:
    """(rank,): the importance of each e, and the mean ones of its column of P and of its row of Q."""
    return _of("e", a) + _of("Q", a).mean(1) + _of("P", a).mean(0)


def _of(name: str, a: AdaLoRA) -> Tensor:
    return a.get_buffer(f"mean_{name}") * a.get_buffer(f"spread_{name}")
