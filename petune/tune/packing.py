"""Batches without padding: rows laid end to end, and only the attention sees them as rows."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface
from transformers.loss.loss_utils import ForCausalLMLoss

from petune.attention import Attention
from petune.discovery import base_class, blocks, calls_attention_interface, walk
from petune.errors import PetuneError
from petune.tune.logits import SKIP, applies


@dataclass
class Rows:
    """Which token stands where. `column` (batch, length) is a token's place in the flat sequence, anything where there
    is none; `real` (batch, length) says where there is one; `place` (tokens,) is where it stands in the batch.
    """

    column: Tensor
    real: Tensor
    place: Tensor

    @classmethod
    def of(cls, mask: Tensor) -> Rows:
        """From a mask of 1 and 0, (batch, length)."""
        real = mask.bool()
        column = (real.flatten().cumsum(0) - 1).clamp(min=0).view(real.shape)
        return cls(column, real, real.flatten().nonzero().squeeze(1))


class _Current:
    """The batch that is being computed. (An attribute, so that compiled code takes it as an input.)"""

    rows: Rows | None = None


def flatten(batch: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Rows]:
    """A padded batch of a causal language model as one row, (1, tokens), whose positions say where rows begin."""
    mask = batch["attention_mask"].bool()
    position = mask.cumsum(1) - 1
    labels = batch["labels"].masked_fill(position <= 0, SKIP)  # nothing comes before a row's first token
    told = {**batch, "labels": labels, "position_ids": position}
    flat = {key: value[mask][None] for key, value in told.items() if key != "attention_mask"}
    return flat, Rows.of(mask)


@contextmanager
def packed(rows: Rows) -> Iterator[None]:
    """Within the context a flat batch's attention takes place among the tokens of a row."""
    ask = AttentionInterface.get_interface

    def get_interface(self: AttentionInterface, name: str, default: Attention) -> Attention:
        return partial(_attend, ask(self, name, default))

    AttentionInterface.get_interface = get_interface  # type: ignore[method-assign, assignment]
    _Current.rows = rows
    try:
        yield
    finally:
        AttentionInterface.get_interface = ask  # type: ignore[method-assign]
        _Current.rows = None


def check(model: Any, tuning: Any) -> None:
    """That the model predicts the next token and its blocks mix tokens by an attention alone that can be told of rows.

    Raises:
        PetuneError: something else does, or the tuning has virtual tokens, which stand at the beginning of rows.
    """
    takes = applies(model) and model.loss_function is ForCausalLMLoss
    takes = takes and "position_ids" in inspect.signature(model.forward).parameters
    mixes = [any(calls_attention_interface(base_class(m)) for _, m in walk(block)) for _, _, block in blocks(model)]
    if not takes or not mixes or not all(mixes):
        raise PetuneError("training.packing: this model does not take rows end to end; leave it out.")
    if getattr(tuning, "prompts", ()):
        raise PetuneError("training.packing: virtual tokens need rows of their own; leave it out.")


def _attend(
    base: Attention, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
) -> tuple[Tensor, Any]:
    """`base` for q (1, heads, tokens, head_dim) and the model's own mask of them, (1, 1, tokens, tokens)."""
    rows = _Current.rows
    if rows is None or mask is None:  # one row alone, or flash attention, which reads the positions
        return base(module, query, key, value, mask, **options)
    batch, length = rows.real.shape
    padded = [
        _Place.apply(t[0].transpose(0, 1), rows.place, batch * length).unflatten(0, (batch, length)).transpose(1, 2)  # type: ignore[no-untyped-call]
        for t in (query, key, value)
    ]  # (batch, heads, length, head_dim)
    out, _ = base(module, *padded, _mask_of(mask[0, 0], rows), **options)
    return _Pick.apply(out.flatten(0, 1), rows.place)[None], None  # type: ignore[no-untyped-call]


def _mask_of(mask: Tensor, rows: Rows) -> Tensor:
    """The mask (tokens, tokens) as (batch, 1, length, length). Queries of padding see everything: their result is
    thrown away, but must be a number.
    """
    of_rows = mask[rows.column[:, :, None], rows.column[:, None, :]]
    seen, hidden = (True, False) if mask.dtype == torch.bool else (0.0, torch.finfo(mask.dtype).min)
    of_rows = of_rows.masked_fill(~rows.real[:, None, :], hidden)
    return of_rows.masked_fill(~rows.real[:, :, None], seen)[:, None]


class _Place(torch.autograd.Function):
    """Rows of x at `place` among `size` rows, zero elsewhere; no two go to one place, so the gradient is picked."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, place: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(place)
        return x.new_zeros(size, *x.shape[1:]).index_copy(0, place, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad.index_select(0, *ctx.saved_tensors), None, None


class _Pick(torch.autograd.Function):
    """The rows of x at `place`, each of which is another."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        ctx.size = len(x)
        return x.index_select(0, place)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (place,) = ctx.saved_tensors
        return grad.new_zeros(ctx.size, *grad.shape[1:]).index_copy(0, place, grad), None
