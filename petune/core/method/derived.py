"""Tensors that follow from an adapter's parameters alone, made once while those can't change."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any, TypeVar

import torch

Value = TypeVar("Value")
_kept: ContextVar[dict[tuple[int, Callable[..., Any]], Any] | None] = ContextVar(
    "petune_derived", default=None
)


def derived(make: Callable[[Any], Value]) -> Callable[[Any], Value]:
    """Decorates a method of an adapter that takes nothing but `self` and reads nothing but its parameters.

    Within `generate` its result is made once and serves every token; everywhere else it is made at every call, so
    that gradients flow and a step of the optimizer is seen. A rotation made of free parameters, or the rows that a
    prompt's encoder gives, are worth it.
    """

    @wraps(make)
    def once(self: Any) -> Value:
        if torch.compiler.is_compiling() or torch.is_grad_enabled():
            return make(self)
        kept = _kept.get()
        if kept is None:
            return make(self)
        key = id(self), make
        try:
            found: Value = kept[key]
        except KeyError:
            found = kept[key] = make(self)
        return found

    return once


@contextmanager
def parameters_stay() -> Iterator[None]:
    """Within the context no parameter changes, so that derived tensors are made once."""
    token = _kept.set({})
    try:
        yield
    finally:
        _kept.reset(token)
