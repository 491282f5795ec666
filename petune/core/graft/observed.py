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
from petune.core.graft.module import attention_links
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
    """What a tensor of attention scores was made of.

    Args:
        query: (…, queries, head_dim).
        key: (…, head_dim, keys).
        scale: what their product has been multiplied by.
        logits: what went into the softmax, once it has run.
        dropout: the rate of dropout that the weights have passed.
    """

    query: Tensor
    key: Tensor
    scale: float
    logits: Tensor | None = None
    dropout: float = 0.0

    def after(self, call: TorchCall) -> Scores:
        """What the result of a call with these scores in it was made of."""
        if call.name == "softmax":
            return replace(self, logits=call.tensors[0])
        if call.name == "dropout":
            return replace(self, dropout=_rate(*call.args[1:], **call.kwargs))
        return replace(self, scale=self.scale * _factor(call))


@dataclass(frozen=True)
class TorchCall:
    """A call of one of torch's functions."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def name(self) -> str:
        return self.function.__name__

    @property
    def tensors(self) -> list[Tensor]:
        return [
            value
            for value in (*self.args, *self.kwargs.values())
            if isinstance(value, Tensor)
        ]

    def run(self) -> Any:
        return self.function(*self.args, **self.kwargs)


class Observed(TorchFunctionMode):
    """Watches one forward of an attention module, whose batch has `rows` rows."""

    def __init__(self, module: nn.Module, rows: int) -> None:
        super().__init__()
        self.module, self.rows, self.met = module, rows, False
        acting = attention_links(module)
        assert acting is not None, "an attention without adapters runs its own forward"
        _, links = acting
        self.head_dim = links[
            0
        ].site.head_dim  # LiLT has a second attention beside, over the layout
        # with the tensor itself, so that its id stays its own
        self.known: dict[int, tuple[Tensor, Scores]] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        call = TorchCall(func, args, kwargs or {})
        if call.name == "scaled_dot_product_attention":
            return self._fused(func, *args, **call.kwargs)
        scores = self._scores_in(call)
        is_product = call.name in PRODUCTS
        if scores is not None and is_product and self._are_weights(scores):
            return self._weighted(scores, *call.tensors[-2:])
        out = call.run()
        if scores is not None:
            self._note(out, scores.after(call))
        elif is_product:
            query, key = call.tensors[-2:]
            self._note(out, Scores(query, key, float(call.kwargs.get("alpha", 1))))
        return out

    def _scores_in(self, call: TorchCall) -> Scores | None:
        """The scores that go into a call, if any do."""
        for tensor in call.tensors:
            if id(tensor) in self.known:
                return self.known[id(tensor)][1]
        return None

    def _are_weights(self, scores: Scores) -> bool:
        """Whether they have passed the softmax, of the attention that has the adapters."""
        return scores.logits is not None and scores.query.shape[-1] == self.head_dim

    def _note(self, out: Any, scores: Scores) -> None:
        """Remember what a tensor was made of, if it still has a column for each key."""
        if isinstance(out, Tensor) and out.shape[-1:] == scores.key.shape[-1:]:
            self.known[id(out)] = out, scores

    def _weighted(self, scores: Scores, weights: Tensor, value: Tensor) -> Tensor:
        """The product of the weights and the values, with adapters around it."""
        query, key, logits = scores.query, scores.key.transpose(-1, -2), scores.logits
        assert logits is not None
        size = query.shape[-1]
        query = self._by_head(query) * (
            scores.scale * size**0.5
        )  # as if the scale were the usual one
        options = {
            "scores": self._by_head(logits),
            "dropout": scores.dropout,
            "is_causal": False,
        }
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

    def _by_head(self, tensor: Tensor) -> Tensor:
        """(batch · heads, length, width) or (batch, heads, length, width) -> the latter."""
        if tensor.shape[0] % self.rows:
            raise UnsupportedError(
                f"{type(self.module).__name__}: the first dimension of its attention is no batch."
            )
        return tensor.reshape(self.rows, -1, *tensor.shape[-2:])

    def _fused(
        self,
        func: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Any = None,
        **options: Any,
    ) -> Tensor:
        """Torch's own function for the whole attention, with adapters around it."""

        def base(
            module: nn.Module,
            q: Tensor,
            k: Tensor,
            v: Tensor,
            mask: Any,
            **options: Any,
        ) -> tuple[Tensor, None]:
            options["is_causal"] = options.get("is_causal", False) and mask is None
            return func(q, k, v, attn_mask=mask, **options).transpose(1, 2), None

        self.met = True
        options.setdefault("is_causal", False)
        return attend(base, self.module, query, key, value, attn_mask, **options)[
            0
        ].transpose(1, 2)


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
    together = torch.cat([added.to(scores.dtype), scores], -1)
    weights = F.softmax(together, -1, dtype=torch.float32).to(value.dtype)
    return (F.dropout(weights, dropout) @ value).transpose(1, 2), None


def _factor(call: TorchCall) -> float:
    """What a call has multiplied the scores by; 1 for a call that does something else."""
    numbers = [value for value in call.args[:2] if _is_number(value)]
    if len(numbers) != 1:
        return 1.0
    if call.name in TIMES:
        return float(numbers[0])
    return 1 / float(numbers[0]) if call.name in DIVIDED else 1.0


def _is_number(value: Any) -> bool:
    return (
        value.numel() == 1
        if isinstance(value, Tensor)
        else isinstance(value, int | float)
    )


def _rate(p: float = 0.5, training: bool = True, *_: Any, **__: Any) -> float:
    return p if training else 0.0
