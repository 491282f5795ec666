"""Repeated blocks compiled one by one: they share their code, so that one compilation serves all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from petune.core.frozen.blocks import blocks
from petune.errors import PetuneError
from petune.training.host_torch import has_cpp_compiler, keeping_little, recompiling
from petune.training.swap import forward_as

COMPILATIONS = 64
"""How often one piece of code may be compiled: it serves blocks of all kinds, with and without a gradient of their
input."""


@contextmanager
def compiled(model: Any, budget: float | None = None) -> Iterator[None]:
    """Within the context the blocks run compiled while they train, for any batch and length.

    Args:
        budget: functorch's `activation_memory_budget`: the share of what it would keep that it may keep, at the cost
            of computing more of it again.

    Raises:
        PetuneError: the compiler needs one of C++ here, and there is none.
    """
    on_cpu = next(model.parameters()).device.type == "cpu"
    if on_cpu and not has_cpp_compiler():
        raise PetuneError(
            "training.compile: found no C++ compiler; install one or leave it out."
        )
    with ExitStack() as stack:
        stack.enter_context(keeping_little(budget))
        stack.enter_context(recompiling(COMPILATIONS))
        # without it another budget would be given the code of this one
        stack.callback(torch.compiler.reset)
        for _, _, block in blocks(model):
            stack.enter_context(forward_as(block, _Region(block, block.forward)))
        yield


class _Region:
    """A block's forward: compiled in training, plain otherwise, where caches and lengths change at every call."""

    def __init__(self, block: nn.Module, forward: Callable[..., Any]) -> None:
        self.block = block
        self.plain = forward
        self.fast = torch.compile(forward, dynamic=True)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        forward = self.fast if self.block.training else self.plain
        return forward(*args, **kwargs)
