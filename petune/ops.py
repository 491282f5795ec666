"""Operations that methods share, written so that they keep no more for backward than they must."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _LowRankUpdate(torch.autograd.Function):
    """y + scale · x Aᵀ Bᵀ, which keeps x alone: the base layer's input, so that q, k and v share one."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(x, a, b)
        ctx.scale = scale
        flat = x.reshape(-1, x.shape[-1]).to(y.dtype)
        low = flat @ a.to(y.dtype).T  # (tokens, rank)
        out = torch.addmm(y.reshape(-1, y.shape[-1]), low, b.to(y.dtype).T, alpha=scale)
        return torch.ops.aten._unsafe_view(out, y.shape)  # no view: models change it in place

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b = ctx.saved_tensors
        g = grad.reshape(-1, grad.shape[-1])
        flat, a_, b_ = x.reshape(-1, x.shape[-1]).to(g.dtype), a.to(g.dtype), b.to(g.dtype)
        low = g @ b_ * ctx.scale  # (tokens, rank): the gradient of x Aᵀ
        grad_x = grad_a = grad_b = None
        if ctx.needs_input_grad[1]:
            grad_x = (low @ a_).view(x.shape).to(x.dtype)
        if ctx.needs_input_grad[2]:
            grad_a = (low.T @ flat).to(a.dtype)
        if ctx.needs_input_grad[3]:
            grad_b = ((flat @ a_.T).T @ g).T.mul(ctx.scale).to(b.dtype)  # three times as fast as gᵀ first
        return grad, grad_x, grad_a, grad_b, None


def lowrank_update(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
    """Y + scale · x Aᵀ Bᵀ in y's dtype.

    Args:
        y: (…, out), the base layer's result.
        x: (…, in), its input, the only tensor that is kept for backward.
        a: (rank, in).
        b: (out, rank).

    Raises:
        RuntimeError: a second derivative is asked for.
    """
    with torch.autocast(y.device.type, enabled=False):
        out: Tensor = _LowRankUpdate.apply(y, x, a, b, scale)  # type: ignore[no-untyped-call]
    return out
