"""In which dtype an adapter computes: its parameters stay float32, a 16-bit base stays 16-bit."""

from __future__ import annotations

import torch
from torch import Tensor

from petune.core.forward.link import Call

PLAIN = (torch.float32, torch.float64)


def apply(adapter: Call, inner: Call, x: Tensor, *rest: Tensor | None) -> Tensor:
    """`adapter(inner, x, *rest)` in x's dtype.

    In 16 bits the adapter runs under autocast, which casts its small parameters, so that no float32 copy of an
    activation is kept for backward; the base within does not.
    """
    device, dtype = x.device.type, x.dtype
    if dtype in PLAIN or torch.is_autocast_enabled(device):
        return adapter(inner, x, *rest)

    def plain(*inputs: Tensor | None) -> Tensor:
        with torch.autocast(device, enabled=False):
            return inner(*(_cast(value, dtype) for value in inputs))

    with torch.autocast(device, dtype=dtype):
        return adapter(plain, x, *rest).to(dtype)


def _cast(value: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    is_float = value is not None and value.is_floating_point()
    return value.to(dtype) if value is not None and is_float else value
