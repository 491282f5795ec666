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

from petune.core.frozen.blocks import blocks
from petune.core.frozen.computes import calls_attention_interface
from petune.core.frozen.modules import base_class, walk
from petune.core.host.attention import Attention
from petune.training.logits import SKIP, applies
from petune.training.swap import evaluating


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


def is_padded(batch: Mapping[str, Tensor]) -> bool:
    """The batch has padding, labels, and nothing but tensors with an entry for each token."""
    mask = batch.get("attention_mask")
    if (
        mask is None
        or "labels" not in batch
        or any(t.shape != mask.shape for t in batch.values())
    ):
        return False
    return not bool(mask.all())


def flatten(batch: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Rows]:
    """A padded batch of a causal language model as one row, (1, tokens), whose positions say where rows begin."""
    mask = batch["attention_mask"].bool()
    position = mask.cumsum(1) - 1
    labels = batch["labels"].masked_fill(
        position <= 0, SKIP
    )  # nothing comes before a row's first token
    told = {**batch, "labels": labels, "position_ids": position}
    flat = {
        key: value[mask][None] for key, value in told.items() if key != "attention_mask"
    }
    return flat, Rows.of(mask)


@contextmanager
def packed(rows: Rows) -> Iterator[None]:
    """Within the context a flat batch's attention takes place among the tokens of a row."""
    ask = AttentionInterface.get_interface

    def get_interface(
        self: AttentionInterface, name: str, default: Attention
    ) -> Attention:
        return partial(_attend, ask(self, name, default))

    AttentionInterface.get_interface = get_interface  # type: ignore[method-assign, assignment]
    _Current.rows = rows
    try:
        yield
    finally:
        AttentionInterface.get_interface = ask  # type: ignore[method-assign]
        _Current.rows = None


def refusal(model: Any, tuning: Any) -> str:
    """Why rows can't stand end to end here, "" if they can: the model predicts the next token, an attention that can be
    told of rows is all that mixes tokens, as a trial shows, and no virtual tokens stand at the beginning of rows.
    """
    if getattr(tuning, "prompts", ()):
        return "virtual tokens need rows of their own"
    takes = applies(model) and model.loss_function is ForCausalLMLoss
    takes = takes and "position_ids" in inspect.signature(model.forward).parameters
    mixes = [
        any(calls_attention_interface(base_class(m)) for _, m in walk(block))
        for _, _, block in blocks(model)
    ]
    return (
        ""
        if takes and mixes and all(mixes) and _is_same(model)
        else "this model does not take rows end to end"
    )


@torch.no_grad()
def _is_same(model: Any) -> bool:
    """Two rows of unlike length have the same logits padded and end to end."""
    ids = (
        torch.arange(1, 13, device=model.device).view(2, 6)
        % model.get_input_embeddings().num_embeddings
    )
    mask = (
        torch.arange(6, device=model.device)
        < torch.tensor([[6], [4]], device=model.device)
    ).long()
    flat, rows = flatten({"input_ids": ids, "attention_mask": mask, "labels": ids})
    del flat["labels"]
    with evaluating(model):
        try:
            padded = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[
                mask.bool()
            ]
            with packed(rows):
                found = model(**flat, use_cache=False).logits[0]
        except Exception:  # whatever a stranger's model says: it is left as it is
            return False
    rounding = torch.finfo(padded.dtype).eps ** 0.5
    return float((found - padded).abs().max()) <= rounding * float(padded.abs().max())


def _attend(
    base: Attention,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Any]:
    """`base` for q (1, heads, tokens, head_dim) and the model's own mask of them, (1, 1, tokens, tokens)."""
    rows = _Current.rows
    if (
        rows is None or mask is None
    ):  # one row alone, or flash attention, which reads the positions
        return base(module, query, key, value, mask, **options)
    batch, length = rows.real.shape
    column = rows.column.flatten()
    padded = [
        _Place.apply(t[0].transpose(0, 1), column, rows.place)
        .unflatten(0, (batch, length))
        .transpose(1, 2)  # type: ignore[no-untyped-call]
        for t in (query, key, value)
    ]  # (batch, heads, length, head_dim)
    out, _ = base(module, *padded, _mask_of(mask[0, 0], rows), **options)
    return _Pick.apply(out.flatten(0, 1), rows.place)[None], None  # type: ignore[no-untyped-call]


def _mask_of(mask: Tensor, rows: Rows) -> Tensor:
    """The mask (tokens, tokens) as (batch, 1, length, length). Queries of padding see everything: their result is
    thrown away, but must be a number.
    """
    of_rows = mask[rows.column[:, :, None], rows.column[:, None, :]]
    seen, hidden = (
        (True, False)
        if mask.dtype == torch.bool
        else (0.0, torch.finfo(mask.dtype).min)
    )
    of_rows = of_rows.masked_fill(~rows.real[:, None, :], hidden)
    return of_rows.masked_fill(~rows.real[:, :, None], seen)[:, None]


class _Place(torch.autograd.Function):
    """The tokens x in their places in the batch, flat; where there is none stands another, which nothing reads, so
    that no gradient comes from there.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, column: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        return x.index_select(0, column)

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
        return grad.new_zeros(ctx.size, *grad.shape[1:]).index_copy_(
            0, place, grad
        ), None
