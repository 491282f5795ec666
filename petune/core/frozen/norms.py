"""Reading a norm off its values: norm(x) = (c + weight) n(x) + bias, c 0 or (Gemma) 1, n what the norm makes of x."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Call = Callable[[Tensor], Tensor]


@torch.no_grad()
def probe_norm(f: Call, base: Call, module: Any) -> tuple[Tensor, Tensor]:
    """(weight, bias) in float32 with which the norm `base` of `module` computes f, a scale and a shift of it."""
    x = torch.ones(
        1,
        module.weight.shape[0],
        dtype=module.weight.dtype,
        device=module.weight.device,
    )
    x[:, ::2] = -1  # so that no entry of n(x) is zero

    def parts(f: Call) -> tuple[Tensor, Tensor]:  # n(-x) = -n(x)
        up, down = f(x)[0].float(), f(-x)[0].float()
        return (up - down) / 2, (up + down) / 2

    with swapped(module, torch.zeros_like(module.weight)):
        zero, _ = parts(base)
    with swapped(module, torch.ones_like(module.weight)):
        one, _ = parts(base)
    gain, bias = parts(f)
    return (gain - zero) / (one - zero), bias


@contextmanager
def swapped(module: Any, weight: Tensor, bias: Tensor | None = None) -> Iterator[None]:
    """The norm with other parameters for a while."""
    before = module.weight, getattr(module, "bias", None)
    write_norm(module, weight, bias)
    try:
        yield
    finally:
        module.weight = before[0]
        if before[1] is not None:
            module.bias = before[1]


def write_norm(module: Any, weight: Tensor, bias: Tensor | None) -> None:
    """Give the norm these parameters, in its own dtype."""
    dtype = module.weight.dtype
    module.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    if bias is not None and getattr(module, "bias", None) is not None:
        module.bias = nn.Parameter(bias.to(dtype), requires_grad=False)
