"""Attention sites: whatever attention function a model uses, its adapters act around it.

Models ask transformers' `AttentionInterface` for their function on every forward, and hand over their own eager one
as the default. Wrapping what the interface answers leaves the model's configuration as it is, and with it the masks,
the caches and each architecture's own choice of implementation.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from petune.core.forward.attention import FrozenAttention, explicit_mask
from petune.core.forward.chain import chain
from petune.core.forward.routed import run_routed_attention
from petune.core.graft.module import attention_links
from petune.core.host.attention import Attention, wrap_interface


def install() -> None:
    """Make the interface answer with wrapped functions; they pass modules without attention adapters through."""
    wrap_interface("adapters", lambda answer: partial(attend, answer))


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
    acting = attention_links(module)
    if acting is None:
        found: tuple[Tensor, Any] = base(
            module, query, key, value, attention_mask, **options
        )
        return found
    forward, links = acting
    mask = explicit_mask(attention_mask, module, query, key, options.get("is_causal"))
    call = FrozenAttention(forward, base, module, (query, key, value, mask), options)
    if forward.plan is not None:
        return run_routed_attention(forward.plan, links, call), None
    return chain(links, call)(*call.inputs), None
