"""Batches without padding: rows laid end to end, and only the attention sees them as rows."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from petune.core.attached.tuning import tunings
from petune.core.frozen.blocks import blocks
from petune.core.frozen.computes import calls_attention_interface
from petune.core.frozen.modules import base_class, walk
from petune.core.host.attention import Attention, wrap_interface
from petune.core.host.checkpointing import checkpoint_with, checkpointed
from petune.core.method.batch import SKIP
from petune.errors import PetuneError
from petune.training.host_model import predicts_next_token
from petune.training.logits import applies
from petune.training.swap import evaluating


@dataclass
class Rows:
    """Which token of a flat sequence stands where in the padded batch that it was made from.

    For the rows `a b` and `c`, padded to length 3: column = [[0, 1, 1], [2, 2, 2]], place = [0, 1, 3].

    Args:
        column: (batch, length), each token's place in the flat sequence; in padding that of the last token before it.
        real: (batch, length), where there is a token and no padding.
        place: (tokens,), each token's place in the padded batch, its rows counted one after the other.
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
    """The batch has padding at its rows' ends, without labels there, and nothing but tensors with an entry for each
    token.
    """
    mask = batch.get("attention_mask")
    if mask is None or "labels" not in batch or "position_ids" in batch:
        return False
    if any(tensor.shape != mask.shape for tensor in batch.values()):
        return False
    if bool(mask.all()) or not ends_in_padding(mask):
        return False
    return not has_labels_in_padding(batch["labels"], mask)


def ends_in_padding(mask: Tensor) -> bool:
    """Whether all padding stands behind the tokens of its row, so that a token's place is its column."""
    real = mask.bool()
    return not bool((real[:, 1:] > real[:, :-1]).any())


def has_labels_in_padding(labels: Tensor, mask: Tensor) -> bool:
    """Whether a loss counts padding, which it does where somebody takes the ids as labels as they are."""
    return bool((labels[mask == 0] != SKIP).any())


def flatten(batch: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Rows]:
    """A padded batch of a causal language model as one row, (1, tokens), whose positions say where rows begin."""
    mask = batch["attention_mask"].bool()
    position = mask.cumsum(1) - 1
    is_first = position <= 0
    # nothing stands before a row's first token that could tell it
    labels = batch["labels"].masked_fill(is_first, SKIP)
    told = {**batch, "labels": labels, "position_ids": position}
    del told["attention_mask"]
    flat = {key: value[mask][None] for key, value in told.items()}
    return flat, Rows.of(mask)


@contextmanager
def packed(rows: Rows, model: nn.Module | None = None) -> Iterator[None]:
    """Within the context a flat batch's attention takes place among the tokens of a row.

    Args:
        model: whose checkpointed blocks know the rows when backward runs them again.
    """
    take_back = wrap_interface("packing", lambda base: partial(_attend, base))
    before, _Current.rows = _Current.rows, rows
    try:
        again = (
            nullcontext()
            if model is None
            else remembered(model, lambda _: packed(rows))
        )
        with again:
            yield
    finally:
        take_back()
        _Current.rows = before


@contextmanager
def remembered(
    model: nn.Module, within: Callable[[nn.Module], AbstractContextManager[None]]
) -> Iterator[None]:
    """Within the context backward runs checkpointed blocks again within something.

    Args:
        within: gives the context of a block.
    """
    functions = list(checkpointed(model))
    for module, checkpoint in functions:
        checkpoint_with(
            module, partial(_checkpoint, checkpoint, partial(within, module))
        )
    try:
        yield
    finally:
        for module, checkpoint in functions:
            checkpoint_with(module, checkpoint)


def _checkpoint(
    checkpoint: Callable[..., Any],
    within: Callable[[], AbstractContextManager[None]],
    run: Callable[..., Any],
    *inputs: Any,
) -> Any:
    def again(*given: Any) -> Any:
        with within():
            return run(*given)

    return checkpoint(again, *inputs)


def refusal(model: Any) -> str:
    """Why rows can't stand end to end here, "" if they can: the model predicts the next token, an attention that can be
    told of rows is all that mixes tokens, as a trial shows, and no virtual tokens stand at the beginning of rows.
    """
    if any(tuning.prompts for tuning in tunings(model).values()):
        return "virtual tokens need rows of their own"
    if _takes_positions(model) and asks_for_attention(model) and _is_same(model):
        return ""
    return "this model does not take rows end to end"


def check_packing(model: Any, wanted: bool | None) -> bool:
    """Whether padded batches of a model are laid end to end.

    Args:
        wanted: whether they are to be; None where the model can.

    Raises:
        PetuneError: they are to be, and this model or method can't.
    """
    if wanted is False:
        return False
    reason = refusal(model)
    if wanted and reason:
        raise PetuneError(f"training.packing: {reason}; leave it out.")
    return not reason


def _takes_positions(model: Any) -> bool:
    """The model predicts the next token, and can be told where each token stands in its row."""
    if not applies(model) or not predicts_next_token(model):
        return False
    return "position_ids" in inspect.signature(model.forward).parameters


def asks_for_attention(model: Any) -> bool:
    """Every block has an attention that is asked for at transformers' interface."""
    found = False
    for _, _, block in blocks(model):
        classes = (base_class(module) for _, module in walk(block))
        if not any(calls_attention_interface(cls) for cls in classes):
            return False
        found = True
    return found


@torch.no_grad()
def _is_same(model: Any) -> bool:
    """Two rows of unlike length have the same logits padded and end to end."""
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = torch.arange(1, 13, device=model.device).view(2, 6) % vocabulary
    lengths = torch.tensor([[6], [4]], device=model.device)
    mask = (torch.arange(6, device=model.device) < lengths).long()  # (2, 6)
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
    """`base` among the tokens of each row.

    Args:
        query: (1, heads, tokens, head_dim); key and value the same with kv_heads.
        mask: the model's own of a flat sequence, (1, 1, tokens, tokens).

    Returns:
        (1, tokens, heads, head_dim), and no attention weights.
    """
    rows = _Current.rows
    if rows is None or mask is None:
        # one row alone, or flash attention, which reads the positions
        return base(module, query, key, value, mask, **options)
    padded = (by_row(tensor, rows) for tensor in (query, key, value))
    out, _ = base(module, *padded, _mask_of(mask[0, 0], rows), **options)
    return pick(out.flatten(0, 1), rows.place)[None], None


def by_row(x: Tensor, rows: Rows) -> Tensor:
    """(1, heads, tokens, head_dim) -> (batch, heads, length, head_dim)."""
    by_token = x[0].transpose(0, 1)  # (tokens, heads, head_dim)
    placed = place(by_token, rows)
    return placed.view(*rows.real.shape, *placed.shape[1:]).transpose(1, 2)


def _mask_of(mask: Tensor, rows: Rows) -> Tensor:
    """The mask (tokens, tokens) as (batch, 1, length, length). Queries of padding see everything: their result is
    thrown away, but must be a number.
    """
    of_rows = mask[rows.column[:, :, None], rows.column[:, None, :]]
    is_boolean = mask.dtype == torch.bool
    seen, hidden = (True, False) if is_boolean else (0.0, torch.finfo(mask.dtype).min)
    of_rows = of_rows.masked_fill(~rows.real[:, None, :], hidden)
    return of_rows.masked_fill(~rows.real[:, :, None], seen)[:, None]


def place(x: Tensor, rows: Rows) -> Tensor:
    """Tokens (tokens, …) in their places in the batch, (batch · length, …); padding holds another token's values."""
    placed: Tensor = _Place.apply(x, rows.column.flatten(), rows.place)  # type: ignore[no-untyped-call]
    return placed


def pick(x: Tensor, index: Tensor) -> Tensor:
    """The rows of x at `index`, in which no row stands twice."""
    picked: Tensor = _Pick.apply(x, index)  # type: ignore[no-untyped-call]
    return picked


class _Place(torch.autograd.Function):
    """Tokens (tokens, …) in their places in the batch, (batch · length, …). Padding gets the values of another token,
    which nothing reads, so that no gradient comes from there.
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
    """The rows of x at `place`, in which no row stands twice."""

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
