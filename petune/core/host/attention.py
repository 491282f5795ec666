"""How a model asks transformers for its attention function."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import nn
from transformers import AttentionInterface, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention

from petune.core.host.seam import Seams

SEAMS = Seams()
Attention = Callable[..., Any]
Wrap = Callable[[Attention], Attention]
"""Makes of the attention function that a model would have got the one that it gets."""


@SEAMS.lean(
    "transformers",
    "AttentionInterface.get_interface(attn_implementation, default)",
    since="4.56",
    why="put adapters around a model's attention, whichever implementation it uses",
)
def _interface_answers() -> bool:
    parameters = list(inspect.signature(AttentionInterface.get_interface).parameters)
    return parameters == ["self", "attn_implementation", "default"] and asks_interface(
        LlamaAttention
    )


def asks_interface(cls: Any) -> bool:
    """Whether the forward of a class names the interface and asks it for an attention function."""
    forward: Any = getattr(cls, "forward", None)  # a scripted module has none
    code = getattr(inspect.unwrap(forward), "__code__", None)
    return code is not None and {"ALL_ATTENTION_FUNCTIONS", "get_interface"} <= set(
        code.co_names
    )


def wrap_interface(name: str, wrap: Wrap) -> Callable[[], None]:
    """Make the interface answer with what `wrap` makes of its answer; a `name` wraps once.

    A function registered under a name of ours (`AttentionInterface.register`) would have to stand in the model's
    configuration, where masks, caches and some twenty comparisons with "eager" and "sdpa" read it.

    Returns:
        What takes the wrapping back.
    """
    ask: Any = AttentionInterface.get_interface
    if name in getattr(ask, "petune", ()):
        return lambda: None

    @wraps(ask)
    def get_interface(
        self: AttentionInterface, attn_implementation: str, default: Attention
    ) -> Attention:
        return wrap(ask(self, attn_implementation, default))

    get_interface.petune = (*getattr(ask, "petune", ()), name)  # type: ignore[attr-defined]
    AttentionInterface.get_interface = get_interface  # type: ignore[method-assign]

    def take_back() -> None:
        AttentionInterface.get_interface = ask  # type: ignore[method-assign]

    return take_back


@SEAMS.lean(
    "transformers",
    "PreTrainedConfig._attn_implementation",
    since="4.36",
    why="tell flash attention, which needs no mask for keys on the left",
)
def _configuration_names_the_implementation() -> bool:
    made: Any = LlamaConfig
    return hasattr(made(attn_implementation="eager"), "_attn_implementation")


def is_flash(module: nn.Module) -> bool:
    """Whether the module's attention is flash attention, which aligns causality with the last key itself."""
    config = getattr(module, "config", None)
    return "flash" in str(getattr(config, "_attn_implementation", ""))
