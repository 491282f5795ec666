"""A module that computes something else for a while, or in another mode."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import update_wrapper
from types import MethodType
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
def wearing(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Within the context `forward` runs in place of the module's forward, for as long as a user's loop takes.

    It has the signature of the module's own, which trainers read; a copy of the module computes what the module did
    before; and what others have put around it meanwhile, as accelerate does, stays.
    """
    inner, before = module.forward, vars(module).get("forward")

    def called(me: nn.Module, *args: Any, **kwargs: Any) -> Any:
        run = forward if me is module else _rebound(inner, me)
        return run(*args, **kwargs)

    update_wrapper(called, inner)
    called.__name__ = "forward"  # by which a module is pickled
    vars(called)["__signature__"] = _with_self(inspect.signature(inner))
    worn = module.forward = MethodType(called, module)
    try:
        yield
    finally:
        if vars(module).get("forward") is worn:
            del module.forward
            if before is not None:
                module.forward = before


def _rebound(method: Callable[..., Any], me: nn.Module) -> Callable[..., Any]:
    """A module's method as another module's, whatever it is if it is no method."""
    function = getattr(method, "__func__", None)
    return method if function is None else MethodType(function, me)


def _with_self(signature: inspect.Signature) -> inspect.Signature:
    me = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    return signature.replace(parameters=[me, *signature.parameters.values()])


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
