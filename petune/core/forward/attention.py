"""The model's own attention as a computation that adapters stand around.

Letters of shapes: B batch, H query heads, G key/value heads, Q queries, K keys, D head_dim, V value_dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from petune.core.forward.computation import Computation
from petune.core.forward.forward_pass import ForwardPass
from petune.core.forward.plan import Index
from petune.core.host.attention import Attention, is_flash
from petune.errors import UnsupportedError


class FrozenAttention(Computation):
    """The model's attention for q, k, v and mask; its other arguments follow the keys that an adapter adds.

    q (B, H, Q, D), k (B, G, K, D), v (B, G, K, V); mask None or broadcastable to (B, H, Q, K), flash attention's is
    (B, K). Returns (B, Q, H, V).

    Args:
        base: the attention function; the first of its results is the attention's.
        inputs: q, k, v and mask as the model gives them.
        options: what else the model gives its function.
    """

    def __init__(
        self,
        forward: ForwardPass,
        base: Attention,
        module: nn.Module,
        inputs: tuple[Tensor, Tensor, Tensor, Any],
        options: Mapping[str, Any],
        index: Index | None = None,
    ) -> None:
        super().__init__(forward, inputs, index)
        self.base, self.module, self.options = base, module, dict(options)
        self.keys = inputs[1].shape[2]
        self.masked = inputs[3] is not None

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, mask: Any) -> Tensor:
        more = (
            key.shape[2] - self.keys
        )  # of the adapter, on the left; below 0 if it left some out
        options = self._options(more)
        mask = self._mask(mask, more)
        if mask is None and (self.masked or more < 0):
            options["is_causal"] = False  # the adapter wants no mask at all
        out: Tensor = self.base(self.module, query, key, value, mask, **options)[0]
        return out

    def _options(self, more: int) -> dict[str, Any]:
        options = dict(self.options)
        bias = options.get("position_bias")
        if more and bias is not None:
            # keys on the left have no position, keys of the adapter alone have no bias
            options["position_bias"] = F.pad(bias, (more, 0)) if more > 0 else None
        return options

    def _mask(self, mask: Any, more: int) -> Any:
        """The mask, with the keys that an adapter has put on the left seen by every query."""
        if more <= 0 or mask is None:
            return mask
        if isinstance(mask, BlockMask):
            return _with_keys(mask, more)
        if mask.shape[-1] != self.keys:  # the adapter has made a mask of its own
            return mask
        return F.pad(mask, (more, 0), value=0.0 if mask.is_floating_point() else 1)

    def rows(self, index: Index) -> FrozenAttention:
        query, key, value, mask = self.inputs
        if isinstance(mask, BlockMask):
            raise UnsupportedError(
                "route(): FlexAttention's mask has no rows; use attn_implementation='sdpa'."
            )
        of_batch = partial(_rows_of, index, query.shape[0])
        options = {name: of_batch(option) for name, option in self.options.items()}
        inputs = query[index], key[index], value[index], of_batch(mask)
        return FrozenAttention(
            self.forward, self.base, self.module, inputs, options, index
        )


def _rows_of(index: Index, batch: int, value: Any) -> Any:
    """Rows of a tensor that has one for each of the batch; what is the same for all of them stays."""
    rows = value.shape[:1] if isinstance(value, Tensor) else ()
    return value[index] if batch > 1 and rows == (batch,) else value


def explicit_mask(
    mask: Any, module: nn.Module, query: Tensor, key: Tensor, is_causal: bool | None
) -> Any:
    """The mask, also where it is left out because the kernel knows it from `is_causal`: with more keys on the left
    that fails, since a kernel aligns causality with the first key. So the n-th query sees the first n keys, and
    none of those that a static cache has room for beyond.
    """
    if is_causal is None:
        is_causal = getattr(module, "is_causal", False)
    queries, keys = query.shape[2], key.shape[2]
    hides = is_causal and queries > 1
    if mask is not None or not hides:
        return mask
    if is_flash(module):  # it aligns causality with the last key
        return None
    seen = torch.ones(queries, keys, dtype=torch.bool, device=query.device)
    return seen.tril()[None, None]


def _with_keys(mask: BlockMask, more: int) -> BlockMask:
    """FlexAttention's mask with keys on the left that every query sees."""
    batch, heads, queries, keys = mask.shape

    def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k < more) | mask.mask_mod(b, h, q, (k - more).clamp(min=0))

    device = str(mask.kv_indices.device)
    return create_block_mask(seen, batch, heads, queries, keys + more, device=device)
