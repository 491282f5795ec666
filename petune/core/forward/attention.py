"""Attention sites: whatever attention function a model uses, its adapters act around it.

Models ask transformers' `AttentionInterface` for their function on every forward, and hand over their own eager one
as the default. Wrapping what the interface answers leaves the model's configuration as it is, and with it the masks,
the caches and each architecture's own choice of implementation. (A registered name of ours would change all three.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from petune.core.forward.chain import apply
from petune.core.forward.link import Link
from petune.errors import UnsupportedError

if TYPE_CHECKING:
    from petune.core.forward.plan import Rows


Attention = Callable[..., tuple[Tensor, Any]]


def around(
    links: list[Link], inner: Callable[..., Tensor], index: Rows | None = None
) -> Callable[..., Tensor]:
    """`inner` with the attention adapters of `links` around it, for the rows `index` of the batch."""
    for link in links:
        inner = partial(apply, link.bound(index), inner)
    return inner


@dataclass(eq=False)
class Frozen:
    """The model's own attention for q, k, v and mask; its other arguments follow the keys that an adapter adds.

    q (batch, heads, queries, head_dim), k and v (batch, kv_heads, keys, head_dim), mask None or broadcastable to
    (batch, heads, queries, keys); flash attention's is (batch, keys). Returns (batch, queries, heads, head_dim).
    """

    base: Attention
    module: nn.Module
    keys: int
    """How many keys the model's own are."""
    mask: Tensor | None
    options: dict[str, Any]

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
            raise UnsupportedError(
                "route(): FlexAttention's mask has no rows; use attn_implementation='sdpa'."
            )
        options = {name: take(value, index, batch) for name, value in self.options.items()}
        return Frozen(self.base, self.module, self.keys, take(self.mask, index, batch), options)


def _explicit(
    mask: Tensor | None, module: nn.Module, query: Tensor, key: Tensor, is_causal: bool | None
) -> Tensor | None:
    """The mask, also where it is left out since the kernel knows it from `is_causal`: that fails with more keys."""
    queries, keys = query.shape[2], key.shape[2]
    causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
    if mask is not None or not causal or queries == 1 or _is_flash(module):
        return mask
    return torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)[
        None, None
    ]


def _with_keys(mask: BlockMask, more: int) -> BlockMask:
    """FlexAttention's mask with keys on the left that every query sees."""
    if more <= 0:
        return mask
    batch, heads, queries, keys = mask.shape

    def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k < more) | mask.mask_mod(b, h, q, (k - more).clamp(min=0))

    return create_block_mask(
        seen, batch, heads, queries, keys + more, device=str(mask.kv_indices.device)
    )


def _is_flash(module: nn.Module) -> bool:
    """Flash attention aligns causality with the last key itself, so that keys on the left need no mask."""
    return "flash" in str(getattr(getattr(module, "config", None), "_attn_implementation", ""))


def take(value: Any, index: Rows, batch: int) -> Any:
    """Rows of a tensor that has them; what is the same for all rows stays."""
    return (
        value[index]
        if isinstance(value, Tensor) and value.dim() and value.shape[0] == batch > 1
        else value
    )
