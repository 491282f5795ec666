"""Random numbers that are drawn once more."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor


def random_state(device: torch.device) -> Tensor:
    """The state of a device's random generator."""
    if device.type == "cuda":
        return torch.cuda.get_rng_state(device)
    return torch.get_rng_state()


def drawing_from(state: Tensor | None, like: Tensor) -> AbstractContextManager[None]:
    """Within the context random numbers are drawn from a state on the device of a tensor; None changes nothing."""
    return nullcontext() if state is None else _drawing_from(state, like.device)


@contextmanager
def _drawing_from(state: Tensor, device: torch.device) -> Iterator[None]:
    before = random_state(device)
    _set_random_state(state, device)
    try:
        yield
    finally:
        _set_random_state(before, device)


def _set_random_state(state: Tensor, device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)
