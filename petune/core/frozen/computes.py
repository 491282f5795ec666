"""Finding the hook points of a model from its structure: no table of architectures."""

from __future__ import annotations

import dis
import inspect
from functools import cache
from types import FunctionType
from typing import Any

from torch import nn


@cache
def calls_attention_interface(cls: Any) -> bool:
    """The class asks transformers for its attention function, so that it can be wrapped there."""
    forward: Any = getattr(cls, "forward", None)  # a scripted module has none
    code = getattr(inspect.unwrap(forward), "__code__", None)
    return code is not None and {"ALL_ATTENTION_FUNCTIONS", "get_interface"} <= set(code.co_names)


@cache
def computes_attention(cls: type) -> bool:
    """The class calls a softmax and products of matrices itself, or torch's function for both."""
    functions = [
        inspect.unwrap(f)
        for c in cls.__mro__
        if c is not nn.Module
        for f in vars(c).values()
        if isinstance(f, FunctionType)
    ]
    steps = [step for f in functions for step in dis.get_instructions(f)]
    used = {step.argrepr if step.opname == "BINARY_OP" else step.argval for step in steps}
    product = {"matmul", "bmm", "baddbmm", "@"} & used
    return "scaled_dot_product_attention" in used or bool(product and {"softmax", "Softmax"} & used)
