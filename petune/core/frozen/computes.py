"""What a class computes, read off the names in its code."""

from __future__ import annotations

import dis
import inspect
from collections.abc import Iterator
from functools import cache
from itertools import chain
from types import FunctionType
from typing import Any

from torch import nn

from petune.core.host.attention import asks_interface

PRODUCTS = {"matmul", "bmm", "baddbmm", "@"}
SOFTMAX = {"softmax", "Softmax"}
WHOLE = "scaled_dot_product_attention"
"""torch's function for all of it."""


@cache
def calls_attention_interface(cls: Any) -> bool:
    """The class asks transformers for its attention function, so that it can be wrapped there."""
    return asks_interface(cls)


@cache
def computes_attention(cls: type) -> bool:
    """The class calls a softmax and products of matrices itself, or torch's function for both."""
    used = set(chain.from_iterable(map(_names_used, _functions(cls))))
    if WHOLE in used:
        return True
    steps = used & PRODUCTS, used & SOFTMAX
    return all(steps)


def _functions(cls: type) -> Iterator[FunctionType]:
    """The functions of a class and its parents, without what decorators have put around them."""
    parents = [parent for parent in cls.__mro__ if parent is not nn.Module]
    members = chain.from_iterable(vars(parent).values() for parent in parents)
    for member in members:
        if isinstance(member, FunctionType):
            yield inspect.unwrap(member)


def _names_used(function: FunctionType) -> Iterator[Any]:
    """The names and operators in a function's code."""
    for step in dis.get_instructions(function):
        yield step.argrepr if step.opname == "BINARY_OP" else step.argval
