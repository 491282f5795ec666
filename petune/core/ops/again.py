"""What is computed again in backward in place of being kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _Recompute(torch.autograd.Function):
    """f(*inputs), which keeps the inputs alone and computes f again in backward."""

    @staticmethod
    def forward(ctx: Any, f: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs)
        device = inputs[0].device.type
        ctx.f, ctx.autocast = (
            f,
            (
                device,
                torch.get_autocast_dtype(device),
                torch.is_autocast_enabled(device),
            ),
        )
        return f(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[1:]
        inputs = [
            t.detach().requires_grad_(w)
            for t, w in zip(ctx.saved_tensors, wanted, strict=True)
        ]
        device, dtype, enabled = ctx.autocast
        with torch.enable_grad(), torch.autocast(device, dtype, enabled):
            out = ctx.f(*inputs)
        found = iter(
            torch.autograd.grad(
                out, [t for t in inputs if t.requires_grad], grad, allow_unused=True
            )
        )
        return None, *(next(found) if w else None for w in wanted)


def recompute(f: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """f(*inputs), of which nothing but the inputs is kept for backward: f runs again there.

    For what is cheap to compute and large to keep. f has to be deterministic; what it reads besides its inputs gets
    no gradient.

    Raises:
        RuntimeError: a second derivative is asked for.
    """
    if torch.compiler.is_compiling():  # the compiler chooses what it keeps
        return f(*inputs)
    out: Tensor = _Recompute.apply(f, *inputs)  # type: ignore[no-untyped-call]
    return out
