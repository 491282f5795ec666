"""Attention sites: whatever attention function a model uses, its adapters act around it.

Models ask transformers' `AttentionInterface` for their function on every forward, and hand over their own eager one
as the default. Wrapping what the interface answers leaves the model's configuration as it is, and with it the masks,
the caches and each architecture's own choice of implementation. (A registered name of ours would change all three.)
"""

from __future__ import annotations

from functools import partial, wraps
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface

from petune.core.forward.attention import Attention, Frozen, _explicit, around
from petune.core.graft.module import graft_of, serving


def install() -> None:
    """Make the interface answer with wrapped functions; they pass modules without attention adapters through."""
    ask = AttentionInterface.get_interface
    if hasattr(ask, "petune"):
        return

    @wraps(ask)
    def get_interface(self: AttentionInterface, name: str, default: Attention) -> Attention:
        return partial(attend, ask(self, name, default))

    get_interface.petune = True  # type: ignore[attr-defined]
    AttentionInterface.get_interface = get_interface  # type: ignore[method-assign, assignment]


def attend(
    base: Attention,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Any]:
    """`base(module, query, key, value, attention_mask, **options)`, with the module's attention adapters around it.

    Args:
        base: The model's own attention; the first of its results is (batch, queries, heads, value_dim).
        query: (batch, heads, queries, head_dim); key and value the same with kv_heads and keys.
        attention_mask: None, or broadcastable to (batch, heads, queries, keys).
        options: What else `base` takes. A `position_bias` is extended with zeros for keys that an adapter adds.
    """
    links = serving(module)
    if not links:
        return base(module, query, key, value, attention_mask, **options)
    mask = _explicit(attention_mask, module, query, key, options.get("is_causal"))
    call = Frozen(base, module, key.shape[2], mask, options)
    x = (query, key, value, mask)
    if plan := graft_of(module).board.plan:
        return plan.run_attention(links, call, x), None
    return around(links, call)(*x), None
