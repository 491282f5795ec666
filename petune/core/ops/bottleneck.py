"""The update of a bottleneck beside a layer, which keeps its input alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from petune.core.ops.casts import as_they_are

Activation = Callable[[Tensor], Tensor]


class Affine(Protocol):
    """A map x Wᵀ + b, as `nn.Linear` is one."""

    @property
    def weight(self) -> Tensor:
        """W, (out, in)."""

    @property
    def bias(self) -> Tensor:
        """b, (out,)."""


class _BottleneckUpdate(torch.autograd.Function):
    """y + scale · (f(x Dᵀ + d) Uᵀ + u), which keeps x alone and computes f's input, a few elements wide, again."""

    @staticmethod
    def forward(
        ctx: Any,
        f: Activation,
        scale: float,
        y: Tensor,
        x: Tensor,
        *weights: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x, *weights)
        ctx.f, ctx.scale = f, scale
        return _plain(f, scale, y, x, *weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        _, _, wants_y, wants_x, *wants_weights = ctx.needs_input_grad
        g = grad.reshape(-1, grad.shape[-1])  # (tokens, out)
        flat = x.reshape(-1, x.shape[-1]).to(g.dtype)  # (tokens, in)
        down, shift, up, _ = (w.to(g.dtype) for w in weights)
        with torch.enable_grad():
            low = F.linear(flat, down, shift).requires_grad_()  # (tokens, width)
            active: Tensor = ctx.f(low)
        g_up = g if ctx.scale == 1 else g * ctx.scale
        (g_low,) = torch.autograd.grad(active, low, g_up @ up)
        grad_x = (g_low @ down).view(x.shape).to(x.dtype) if wants_x else None
        found = [g_low.T @ flat, g_low.sum(0), g_up.T @ active.detach(), g_up.sum(0)]
        grads = [
            one.to(weight.dtype) if wanted else None
            for one, weight, wanted in zip(found, weights, wants_weights, strict=True)
        ]
        return None, None, grad if wants_y else None, grad_x, *grads


def _plain(
    f: Activation, scale: float, y: Tensor, x: Tensor, *weights: Tensor
) -> Tensor:
    down, shift, up, shift_up = (w.to(y.dtype) for w in weights)
    low = F.linear(x.to(y.dtype), down, shift)  # (…, width)
    return torch.add(y, F.linear(f(low), up, shift_up), alpha=scale)


def bottleneck_update(
    y: Tensor,
    x: Tensor,
    down: Affine,
    f: Activation,
    up: Affine,
    scale: float = 1.0,
) -> Tensor:
    """Y + scale · up(f(down(x))) in y's dtype.

    Args:
        y: (…, out), what is updated.
        x: (…, in), the only tensor that is kept for backward.
        down: the map to the bottleneck, with weight (width, in) and bias (width,).
        f: the activation, element by element.
        up: the map from it, with weight (out, width) and bias (out,).
        scale: the factor of the update.

    Raises:
        RuntimeError: a second derivative is asked for.
    """
    given = (y, x, down.weight, down.bias, up.weight, up.bias)
    if torch.compiler.is_compiling():  # the compiler chooses what it keeps
        return _plain(f, scale, *given)
    device = y.device.type
    with as_they_are(device, torch.is_autocast_enabled(device)):
        if not torch.is_grad_enabled():
            return _plain(f, scale, *given)
        out: Tensor = _BottleneckUpdate.apply(f, scale, *given)  # type: ignore[no-untyped-call]
    return out
