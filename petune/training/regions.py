"""Repeated blocks compiled one by one: they share their code, so that one compilation serves all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from petune.core.frozen.blocks import blocks
from petune.errors import PetuneError
from petune.training.swap import forward_as

KEEP_LITTLE = {
    "ban_recompute_used_far_apart": False,
    "ban_recompute_long_fusible_chains": False,
    "ban_recompute_materialized_backward": False,
    "ban_recompute_reductions": False,
}
"""Functorch's rules of thumb against computing norms and activations again in backward, switched off: on the matrix
products that it keeps in any case, what is between them costs little to compute and much to keep."""


@contextmanager
def compiled(model: Any, budget: float | None = None) -> Iterator[None]:
    """Within the context the blocks run compiled while they train, for any batch and length.

    Args:
        budget: functorch's `activation_memory_budget`: the share of what it would keep that it may keep, at the cost
            of computing more of it again.

    Raises:
        PetuneError: the compiler needs one of C++ here, and there is none.
    """
    import torch._dynamo.config
    import torch._functorch.config

    _check_compiler(model)
    options: dict[str, Any] = KEEP_LITTLE | (
        {} if budget is None else {"activation_memory_budget": budget}
    )
    with ExitStack() as stack:
        stack.enter_context(torch._functorch.config.patch(options))
        # one code object serves the blocks of all kinds, each with and without a gradient of its input
        stack.enter_context(torch._dynamo.config.patch(recompile_limit=64))
        stack.callback(
            torch.compiler.reset
        )  # another budget would be given the code of this one
        for _, _, block in blocks(model):
            stack.enter_context(forward_as(block, _Region(block, block.forward)))
        yield


def _check_compiler(model: nn.Module) -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    if next(model.parameters()).device.type == "cpu":
        try:
            get_cpp_compiler()
        except InvalidCxxCompiler:
            raise PetuneError(
                "training.compile: found no C++ compiler; install one or leave it out."
            ) from None


class _Region:
    """A block's forward: compiled in training, plain otherwise, where caches and lengths change at every call."""

    def __init__(self, block: nn.Module, forward: Callable[..., Any]) -> None:
        self.block, self.plain = block, forward
        self.fast = torch.compile(forward, dynamic=True)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return (self.fast if self.block.training else self.plain)(*args, **kwargs)
