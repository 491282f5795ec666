"""Attention sites: whatever attention function a model uses, its adapters act around it.

Models ask transformers' `AttentionInterface` for their function on every forward, and hand over their own eager one
as the default. Wrapping what the interface answers leaves the model's configuration as it is, and with it the masks,
the caches and each architecture's own choice of implementation. (A registered name of ours would change all three.)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import AttentionInterface

from petune.errors import UnsupportedError
from petune.graft import Link, apply, graft_of, serving

if TYPE_CHECKING:
    from petune.routing import Rows

Attention = Callable[..., tuple[Tensor, Any]]


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
    call = Frozen(base, module, query, key, attention_mask, options)
    x = (query, key, value, call.mask)
    if plan := graft_of(module).board.plan:
        return plan.run_attention(links, call, x), None
    return around(links, call)(*x), None


def around(links: list[Link], inner: Callable[..., Tensor], index: Rows | None = None) -> Callable[..., Tensor]:
    """`inner` with the attention adapters of `links` around it, for the rows `index` of the batch."""
    for link in links:
        inner = partial(apply, link.bound(index), inner)
    return inner


class Frozen:
    """The model's own attention for q, k, v and mask; its other arguments follow the keys that an adapter adds.

    q (batch, heads, queries, head_dim), k and v (batch, kv_heads, keys, head_dim), mask None or broadcastable to
    (batch, heads, queries, keys); flash attention's is (batch, keys). Returns (batch, queries, heads, head_dim).
    """

    def __init__(
        self,
        base: Attention,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        mask: Tensor | None,
        options: dict[str, Any],
    ) -> None:
        self.base, self.module, self.options = base, module, options
        self.keys = key.shape[2]
        causal = options.get("is_causal")
        causal = getattr(module, "is_causal", False) if causal is None else causal
        if mask is None and causal and query.shape[2] > 1 and not _is_flash(module):
            # left out because the kernel would have known it from is_causal, which no longer holds with more keys
            ones = torch.ones(query.shape[2], self.keys, dtype=torch.bool, device=query.device)
            mask = ones.tril(self.keys - query.shape[2])[None, None]
        self.mask = mask

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        options = dict(self.options)
        more = key.shape[2] - self.keys
        if isinstance(mask, BlockMask):
            mask = _with_keys(mask, more)
        elif mask is not None and mask.shape[-1] == self.keys and more > 0:
            mask = F.pad(mask, (more, 0), value=0.0 if mask.is_floating_point() else 1)
        if more and (bias := options.get("position_bias")) is not None:
            # keys on the left have no position, keys of the adapter alone have no bias
            options["position_bias"] = F.pad(bias, (more, 0)) if more > 0 else None
        if mask is None and (self.mask is not None or more < 0):
            options["is_causal"] = False  # the adapter wants no mask at all
        out: Tensor = self.base(self.module, query, key, value, mask, **options)[0]
        return out

    def rows(self, index: Rows, batch: int) -> Frozen:
        """The same for some rows of the batch."""
        if isinstance(self.mask, BlockMask):
            raise UnsupportedError("route(): FlexAttention's mask has no rows; use attn_implementation='sdpa'.")
        part = object.__new__(Frozen)
        part.base, part.module, part.keys = self.base, self.module, self.keys
        part.mask = take(self.mask, index, batch)
        part.options = {k: take(v, index, batch) if isinstance(v, Tensor) else v for k, v in self.options.items()}
        return part


def _with_keys(mask: BlockMask, more: int) -> BlockMask:
    """FlexAttention's mask with keys on the left that every query sees."""
    if more <= 0:
        return mask
    batch, heads, queries, keys = mask.shape

    def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k < more) | mask.mask_mod(b, h, q, (k - more).clamp(min=0))

    return create_block_mask(seen, batch, heads, queries, keys + more, device=str(mask.kv_indices.device))


def _is_flash(module: nn.Module) -> bool:
    """Flash attention aligns causality with the last key itself, so that keys on the left need no mask."""
    return "flash" in str(getattr(getattr(module, "config", None), "_attn_implementation", ""))


def take(tensor: Tensor | None, index: Rows, batch: int) -> Tensor | None:
    """Rows of a tensor that has them; one that is the same for all rows stays."""
    return tensor[index] if tensor is not None and tensor.dim() and tensor.shape[0] == batch > 1 else tensor
