"""Attention that a model computes in its own code, softmax(q kᵀ · scale + …) v, seen through its calls to torch.

The calls tell what no attribute does: which tensors are q, k and v, and the scores with whatever the model adds to them
(masks, ALiBi, relative positions). Where the weights meet the values, the module's attention adapters act.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from petune.core.frozen.modules import base_class
from petune.core.graft.attend import attend
from petune.core.graft.module import serving
from petune.errors import UnsupportedError

PRODUCTS = {"matmul", "bmm", "baddbmm", "__matmul__"}


TIMES = {"mul", "mul_", "__mul__", "__rmul__", "__imul__"}


DIVIDED = {"div", "div_", "true_divide", "__truediv__", "__itruediv__", "__idiv__"}


@torch.compiler.disable(reason="petune watches its calls")  # type: ignore[no-untyped-call, untyped-decorator]
def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """In place of an attention's own forward: the same, with its adapters."""
    own = base_class(self).forward
    rows = next(t.shape[0] for t in (*args, *kwargs.values()) if isinstance(t, Tensor))
    with Observed(self, rows) as seen:
        out = own(self, *args, **kwargs)
    if not seen.met:
        raise UnsupportedError(
            f"{type(self).__name__} computes its attention in a way that petune can't stand around."
        )
    return out


@dataclass(frozen=True)
class Scores:
    """What a tensor of attention scores was made of: q (…, queries, head_dim), kᵀ (…, head_dim, keys) and scale."""

    query: Tensor
    key: Tensor
    scale: float
    logits: Tensor | None = None
    """What went into the softmax, once it has run."""
    dropout: float = 0.0


class Observed(TorchFunctionMode):
    """Watches one forward of an attention module, whose batch has `rows` rows."""

    def __init__(self, module: nn.Module, rows: int) -> None:
        super().__init__()
        self.module, self.rows, self.met = module, rows, False
        self.head_dim = serving(module)[
            0
        ].site.head_dim  # LiLT has a second attention beside, over the layout
        self.known: dict[
            int, tuple[Tensor, Scores]
        ] = {}  # with the tensor itself, so that its id stays its own

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs, name = kwargs or {}, func.__name__
        if name == "scaled_dot_product_attention":
            return self._fused(func, *args, **kwargs)
        tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
        scores = next((self.known[id(t)][1] for t in tensors if id(t) in self.known), None)
        ready = (
            scores is not None
            and scores.logits is not None
            and scores.query.shape[-1] == self.head_dim
        )
        if scores is not None and ready and name in PRODUCTS:
            return self._weighted(scores, *tensors[-2:])
        out = func(*args, **kwargs)
        if scores is None and name in PRODUCTS:
            scores = Scores(tensors[-2], tensors[-1], float(kwargs.get("alpha", 1)))
        elif scores is not None and name == "softmax":
            scores = replace(scores, logits=tensors[0])
        elif scores is not None and name == "dropout":
            scores = replace(scores, dropout=_rate(*args[1:], **kwargs))
        elif scores is not None:
            scores = replace(scores, scale=scores.scale * _factor(name, args))
        if (
            scores is not None
            and isinstance(out, Tensor)
            and out.shape[-1:] == scores.key.shape[-1:]
        ):
            self.known[id(out)] = out, scores
        return out

    def _weighted(self, scores: Scores, weights: Tensor, value: Tensor) -> Tensor:
        """The product of the weights and the values."""
        query, key, logits = scores.query, scores.key.transpose(-1, -2), scores.logits
        assert logits is not None
        size = query.shape[-1]
        query = self._by_head(query) * (
            scores.scale * size**0.5
        )  # as if the scale were the usual one
        options = {"scores": self._by_head(logits), "dropout": scores.dropout, "is_causal": False}
        self.met = True
        out, _ = attend(
            _attention,
            self.module,
            query,
            self._by_head(key),
            self._by_head(value),
            None,
            **options,
        )
        return out.transpose(1, 2).reshape(*weights.shape[:-1], value.shape[-1])

    def _by_head(self, t: Tensor) -> Tensor:
        if t.shape[0] % self.rows:
            raise UnsupportedError(
                f"{type(self.module).__name__}: the first dimension of its attention is no batch."
            )
        return t.reshape(self.rows, -1, *t.shape[-2:])  # (batch, heads, length, width)

    def _fused(
        self,
        func: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Any = None,
        **options: Any,
    ) -> Tensor:
        def base(
            module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, **options: Any
        ) -> tuple[Tensor, None]:
            options["is_causal"] = options.get("is_causal", False) and mask is None
            return func(q, k, v, attn_mask=mask, **options).transpose(1, 2), None

        self.met = True
        options.setdefault("is_causal", False)
        return attend(base, self.module, query, key, value, attn_mask, **options)[0].transpose(1, 2)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: None,
    *,
    scores: Tensor,
    dropout: float,
    **_: Any,
) -> tuple[Tensor, None]:
    """The model's scores, with those of the keys that an adapter has put on the left."""
    more = key.shape[2] - scores.shape[-1]
    if more < 0:
        raise UnsupportedError(
            f"{type(module).__name__}: an adapter can add keys to its attention, not take them away."
        )
    added = query @ key[:, :, :more].transpose(-1, -2) / query.shape[-1] ** 0.5
    weights = F.softmax(
        torch.cat([added.to(scores.dtype), scores], -1), -1, dtype=torch.float32
    ).to(value.dtype)
    return (F.dropout(weights, dropout) @ value).transpose(1, 2), None


def _factor(name: str, args: tuple[Any, ...]) -> float:
    numbers = [
        a
        for a in args[:2]
        if isinstance(a, int | float) or (isinstance(a, Tensor) and a.numel() == 1)
    ]
    if len(numbers) != 1 or name not in TIMES | DIVIDED:
        return 1.0
    return float(numbers[0]) if name in TIMES else 1 / float(numbers[0])


def _rate(p: float = 0.5, training: bool = True, *_: Any, **__: Any) -> float:
    return p if training else 0.0
