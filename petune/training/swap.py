"""A module that computes something else for a while, or in another mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from petune.core.frozen.modules import hooked_forward, set_hooked_forward
from petune.core.graft.board import board_of


@contextmanager
def forward_as(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Within the context `forward` runs in place of the module's forward and of the adapters around it."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


@contextmanager
def base_forward_as(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Within the context `forward` runs in place of the module's frozen forward; its adapters act around it."""
    if board_of(module) is None:  # no adapter stands on the module
        with forward_as(module, forward):
            yield
        return
    before = hooked_forward(module)
    set_hooked_forward(module, forward)
    try:
        yield
    finally:
        set_hooked_forward(module, before)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Within the context the module is not in training, so that it draws nothing at random."""
    modes = {inner: inner.training for inner in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for inner, mode in modes.items():
            inner.training = mode
