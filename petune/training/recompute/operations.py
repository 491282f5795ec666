"""Which operations are cheap to compute again, told from what torch says of them."""

from __future__ import annotations

from enum import Enum, auto
from functools import cache
from typing import Any

import torch
from torch import Tensor

from petune.training.host_operations import is_view, is_writing, plain_name


class Kind(Enum):
    """What recomputing does with an operation's result."""

    CHEAP = auto()
    """It can be computed again."""
    PRODUCT = auto()
    """It can be computed again if its inner dimension is short."""
    BLANK = auto()
    """It holds nothing yet."""
    DRAWING = auto()
    """It draws zeros and ones into its first input."""
    WRITING = auto()
    """It changes an input element by element."""
    CHANGING = auto()
    """It changes an input otherwise."""
    VIEW = auto()
    """It shares memory with its input."""
    OTHER = auto()
    """It is kept where backward needs it."""


NORMS = ("native_layer_norm", "_fused_rms_norm", "native_group_norm")
SOFTMAXES = ("_softmax", "_safe_softmax", "_log_softmax")
COPIES = ("_to_copy", "_unsafe_view", "cat", "clone", "constant_pad_nd", "repeat")
REDUCTIONS = (
    "amax",
    "amin",
    "linalg_vector_norm",
    "logsumexp",
    "mean",
    "sum",
    "var",
    "var_mean",
)
CHEAP = frozenset([*NORMS, *SOFTMAXES, *COPIES, *REDUCTIONS, "native_dropout"])
"""What is not pointwise and yet reads each element a few times at most."""

PRODUCTS = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}
"""Matrix products, and which of their inputs comes first in the product."""

SHORT = 128
"""A product over so many elements costs no more than some passes over its result. Attention scores are products over
the width of a head, a low-rank update's are over its rank; a frozen layer's are longer."""


@cache
def kind_of(operation: Any) -> Kind:
    """What an operation is, whatever it is called with."""
    name, tags = plain_name(operation), operation.tags
    if operation.namespace != "aten":
        return Kind.CHANGING if is_writing(operation) else Kind.OTHER
    if is_view(operation):
        return Kind.VIEW
    if is_writing(operation):
        return _kind_of_change(name, tags)
    if name.startswith("empty"):
        return Kind.BLANK
    if name in PRODUCTS:
        return Kind.PRODUCT
    return Kind.CHEAP if _is_cheap(name, tags) else Kind.OTHER


def _is_cheap(name: str, tags: Any) -> bool:
    if name in CHEAP:
        return True
    drawn = torch.Tag.nondeterministic_seeded in tags
    return torch.Tag.pointwise in tags and not drawn


def _kind_of_change(name: str, tags: Any) -> Kind:
    in_place = torch.Tag.inplace in tags
    if in_place and name == "bernoulli_":
        return Kind.DRAWING
    plain = torch.Tag.nondeterministic_seeded not in tags
    pointwise = in_place and plain and torch.Tag.pointwise in tags
    return Kind.WRITING if pointwise else Kind.CHANGING


def is_short(operation: Any, args: tuple[Any, ...]) -> bool:
    """Whether the inner dimension of a matrix product is short."""
    first: Tensor = args[PRODUCTS[plain_name(operation)]]
    return first.shape[-1] <= SHORT


@cache
def draws(operation: Any) -> bool:
    """Whether an operation depends on the state of a random generator."""
    return torch.Tag.nondeterministic_seeded in operation.tags
