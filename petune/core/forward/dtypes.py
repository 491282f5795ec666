"""In which dtype an adapter computes: its parameters stay float32, a 16-bit base stays 16-bit."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from petune.core.forward.link import Call

PLAIN = (torch.float32, torch.float64)


def apply(adapter: Call, inner: Call, x: Tensor, *rest: Tensor | None) -> Tensor:
    """`adapter(inner, x, *rest)` in x's dtype.

    In 16 bits the adapter runs under autocast, which casts its small parameters, so that no float32 copy of an
    activation is kept for backward; the base within does not.
    """
    dtype = x.dtype
    if dtype in PLAIN or torch.is_autocast_enabled(x.device.type):
        return adapter(inner, x, *rest)
    device = x.device.type
    with torch.autocast(device, dtype=dtype):
        out = adapter(partial(_without_autocast, inner, device, dtype), x, *rest)
    return out.to(dtype)


def _without_autocast(
    inner: Call,
    device: str,
    dtype: torch.dtype,
    *inputs: Tensor | None,
) -> Tensor:
    """The frozen computation as it is without an adapter: all that goes in is in its own dtype."""
    cast = [_as_dtype(value, dtype) for value in inputs]
    with torch.autocast(device, enabled=False):
        out: Tensor = inner(*cast)
    return out


def _as_dtype(value: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if value is None or not value.is_floating_point():
        return value
    return value.to(dtype)
