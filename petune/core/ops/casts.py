"""What operations with casts of their own do about autocast."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def as_they_are(device: str, autocast: bool) -> AbstractContextManager[object]:
    """Without autocast, which would cast more than is cast here by hand."""
    return torch.autocast(device, enabled=False) if autocast else nullcontext()
