"""The update of low rank, which keeps its input alone."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from petune.core.ops.casts import as_they_are


class _LowRankUpdate(torch.autograd.Function):
    """y + scale · drop(x) Aᵀ Bᵀ, which keeps x alone: the base layer's input, so that q, k and v share one.

    What was dropped is found again by its seed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        scale: float,
        p: float,
        seed: Any,
    ) -> Tensor:
        ctx.save_for_backward(x, a, b, seed)
        ctx.scale, ctx.p = scale, p
        flat = _drop(x.reshape(-1, x.shape[-1]).to(y.dtype), p, seed)
        low = flat @ a.to(y.dtype).T  # (tokens, rank)
        out = torch.addmm(y.reshape(-1, y.shape[-1]), low, b.to(y.dtype).T, alpha=scale)
        # no view, since models change it in place; host/torch_modules.py has the check
        return torch.ops.aten._unsafe_view(out, y.shape)  # noqa: SLF001

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b, seed = ctx.saved_tensors
        _, wants_x, wants_a, wants_b, *_ = ctx.needs_input_grad
        g = grad.reshape(-1, grad.shape[-1])
        a_, b_ = a.to(g.dtype), b.to(g.dtype)
        grad_x = grad_a = grad_b = None
        if wants_x or wants_a:
            low = g @ b_ * ctx.scale  # (tokens, rank): the gradient of drop(x) Aᵀ
        if wants_x:
            grad_x = _drop(low @ a_, ctx.p, seed, again=True).view(x.shape).to(x.dtype)
        if wants_a or wants_b:
            flat = _drop(
                x.reshape(-1, x.shape[-1]).to(g.dtype), ctx.p, seed, again=True
            )
        if wants_a:
            grad_a = (low.T @ flat).to(a.dtype)
        if wants_b:
            grad_b = (
                ((flat @ a_.T).T @ g).T.mul(ctx.scale).to(b.dtype)
            )  # three times as fast as gᵀ first
        return grad, grad_x, grad_a, grad_b, None, None, None


def lowrank_update(
    y: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float = 1.0,
    *,
    dropout: float = 0.0,
) -> Tensor:
    """Y + scale · drop(x) Aᵀ Bᵀ in y's dtype.

    Args:
        y: (…, out), the base layer's result.
        x: (…, in), its input, the only tensor that is kept for backward, with dropout too.
        a: (rank, in).
        b: (out, rank).
        scale: the factor of the update.
        dropout: the probability with which each element of x is left out of the update; 0 outside training.

    Raises:
        RuntimeError: a second derivative is asked for.
    """
    autocast = torch.is_autocast_enabled(y.device.type)
    if not (autocast or dropout or torch.is_grad_enabled()):
        # by `linear`, which takes any number of dimensions: where a token is decoded at
        # a time, reshaping for `addmm` costs as much as the products
        dtype = y.dtype
        if not (x.dtype is a.dtype is b.dtype is dtype):
            x, a, b = x.to(dtype), a.to(dtype), b.to(dtype)
        low = F.linear(x, a)  # (…, rank)
        return torch.add(y, F.linear(low, b), alpha=scale)
    # drawn by the generator that checkpointing restores
    seed = torch.randint(2**62, ()) if dropout else None
    with as_they_are(y.device.type, autocast):
        out: Tensor = _LowRankUpdate.apply(y, x, a, b, scale, dropout, seed)  # type: ignore[no-untyped-call]
    return out


def _drop(x: Tensor, p: float, seed: Tensor | None, *, again: bool = False) -> Tensor:
    return x if seed is None else _dropped(x, p, seed, again)


@torch.library.custom_op(
    "petune::drop",
    mutates_args=(),
    schema="(Tensor x, float p, Tensor seed, bool again) -> Tensor",
)
def _dropped(x: Tensor, p: float, seed: Tensor, again: bool) -> Tensor:
    """x, each element zero with probability p and otherwise divided by 1 - p; the seed says which.

    The gaps between zeros are geometric, so that p random numbers are drawn for an element instead of one.
    `again` changes nothing but the call, which the compiler would else answer in backward by keeping the first result.
    """
    n = x.numel()
    draws = int(
        n * p + 8 * (n * p) ** 0.5 + 8
    )  # enough to come to the end, but once in 10¹⁴ times
    gaps = torch.empty(draws, dtype=torch.long, device=x.device)
    gaps.geometric_(p, generator=torch.Generator(x.device).manual_seed(int(seed)))
    zeros = gaps.cumsum(0).sub_(1).clamp_(max=n)
    out = x.new_empty(
        n + 1
    )  # the last takes those past the end, without asking the device how many
    torch.mul(x.reshape(-1), 1 / (1 - p), out=out[:n])
    out[zeros] = 0
    return out[:n].view(x.shape)


@_dropped.register_fake
def _(x: Tensor, p: float, seed: Tensor, again: bool) -> Tensor:
    return x.new_empty(x.shape)
