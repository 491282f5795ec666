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
        for p, rows in ((a.Q, a.Q), (a.P, a.P.T)):
            if p.grad is not None:
                off = rows @ rows.T - torch.eye(
                    len(rows), dtype=p.dtype, device=p.device
                )
                slope = (
                    off
                    @ rows
                    * (a.orthogonality / len(adapters) / off.norm().clamp(min=1e-12))
                )
                p.grad += slope if rows is p else slope.T


@torch.no_grad()
def observe(adapters: Sequence[AdaLoRA]) -> None:
    """Smooth |w dL/dw| of each weight w, and how far it is from its mean."""
    for a in adapters:
        for name, p in a.named_parameters():
            if p.grad is not None:
                mean, spread = (
                    a.get_buffer(f"mean_{name}"),
                    a.get_buffer(f"spread_{name}"),
                )
                now = (p * p.grad).abs()
                mean.lerp_(now, 1 - a.betas[0])
                spread.lerp_((now - mean).abs(), 1 - a.betas[1])


@torch.no_grad()
def allocate(adapters: Sequence[AdaLoRA], step: int, begin: int, end: int) -> None:
    """Cut the e of all sites to the budget of this step; after the last cut those that are gone stay gone."""
    if step == end or (begin < step < end and step % adapters[0].every == 0):
        scores = [_importance(a) for a in adapters]
        everything = torch.cat([score.cpu() for score in scores])
        target, left = (
            sum(a.target for a in adapters),
            1 - (step - begin) / (end - begin),
        )
        cut = len(everything) - int((len(everything) - target) * left**3 + target)
        bound = everything.kthvalue(cut).values.item() if cut else float("-inf")
        for a, score in zip(adapters, scores, strict=True):
            a.keep.copy_(score > bound)
    elif step < end:
        return
    for a in adapters:
        a.e.mul_(a.keep)


def _importance(a: AdaLoRA) -> Tensor:
    """(rank,): that of each e, and the mean ones of its column of P and its row of Q."""
    e, q, p = (
        a.get_buffer(f"mean_{name}") * a.get_buffer(f"spread_{name}") for name in "eQP"
    )
    return e + q.mean(1) + p.mean(0)
