"""How transformers runs a block again in backward: gradient checkpointing."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from petune.core.host.seam import Seams

SEAMS = Seams()
FUNCTION = "_gradient_checkpointing_func"
"""The attribute of a module that holds what it checkpoints with: (function, *inputs) -> the function's result."""


@SEAMS.lean(
    "transformers",
    f"PreTrainedModel._set_gradient_checkpointing and the attribute {FUNCTION} of blocks",
    since="4.35",
    why="run a block again in backward as it ran in forward",
)
def _blocks_hold_the_function() -> bool:
    from transformers import modeling_layers

    sets = inspect.getsource(PreTrainedModel._set_gradient_checkpointing)
    return FUNCTION in sets and f"self.{FUNCTION}(" in inspect.getsource(
        modeling_layers
    )


def checkpointed(model: nn.Module) -> Iterator[tuple[nn.Module, Callable[..., Any]]]:
    """The modules of a model that hold a function to checkpoint with, and that function."""
    for module in list(model.modules()):
        if FUNCTION in vars(module):
            yield module, vars(module)[FUNCTION]


def checkpoint_with(module: nn.Module, function: Callable[..., Any]) -> None:
    """Give a module another function to checkpoint with."""
    vars(module)[FUNCTION] = function


def is_reentrant(function: Any) -> bool:
    """Whether a function to checkpoint with is torch's, of the reentrant kind."""
    torchs = getattr(
        function, "checkpoint", function
    )  # what petune has put around it aside
    options: dict[str, Any] = getattr(torchs, "keywords", {})
    return bool(options.get("use_reentrant"))


class Checkpointing:
    """A mixin of a model class, which hears when gradient checkpointing is turned on or off."""

    def checkpointing_was_set(self) -> None:
        """Called after the blocks have got their function to checkpoint with."""

    def _set_gradient_checkpointing(self, *args: Any, **kwargs: Any) -> None:
        super()._set_gradient_checkpointing(*args, **kwargs)  # type: ignore[misc]
        self.checkpointing_was_set()
