"""Blocks that compute no padding: each gets a padded batch's tokens end to end, and gives them back in their places.

Where a whole model can't take its rows end to end (an encoder whose head reads each row's first token), its blocks
often can: only their attention needs to see rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from petune.core.attached.tuning import tunings
from petune.core.frozen.blocks import blocks
from petune.core.host.attention import Attention, wrap_interface
from petune.training.packing import (
    Rows,
    asks_for_attention,
    by_row,
    ends_in_padding,
    has_labels_in_padding,
    pick,
    place,
    remembered,
)
from petune.training.swap import evaluating, forward_as

WORTH = 0.9
"""A batch of which a larger share are tokens is left padded: moving them would take longer than the padding."""

AMONG_TOKENS = {"prompt", "attention"}
"""Kinds of sites whose adapters do more than map each token by itself."""


class _Current:
    """The tokens of the block that is being computed."""

    rows: Rows | None = None


@contextmanager
def unpadded(
    model: nn.Module, mask: Tensor | None, decoder_mask: Tensor | None = None
) -> Iterator[None]:
    """Within the context a model's blocks compute the tokens of a batch alone.

    Args:
        mask: (batch, length), 1 where there is a token; None where all are.
        decoder_mask: (batch, length) of an encoder-decoder's decoder; None where its blocks are left as they are.
    """
    rows_of: dict[nn.Module, Rows] = {}
    for blocks_of, of_them in _stacks(model, mask, decoder_mask):
        if of_them.dim() == 2 and float(of_them.float().mean()) <= WORTH:
            rows_of |= dict.fromkeys(blocks_of, Rows.of(of_them))
    if not rows_of:
        yield
        return

    def within(module: nn.Module) -> AbstractContextManager[None]:
        rows = rows_of.get(module)
        return nullcontext() if rows is None else _again(module, rows)

    with _moved(rows_of), remembered(model, within):
        yield


@contextmanager
def _moved(rows_of: Mapping[nn.Module, Rows]) -> Iterator[None]:
    """Within the context blocks compute the tokens of their rows."""
    with ExitStack() as stack:
        for block, rows in rows_of.items():
            forward = partial(_run, block.forward, rows)
            stack.enter_context(forward_as(block, forward))
        wrap = wrap_interface("unpadded", lambda base: partial(_attend, base))
        stack.callback(wrap)
        yield


@contextmanager
def _again(block: nn.Module, rows: Rows) -> Iterator[None]:
    """Within the context a checkpointed block runs again, be it given the padded batch or its tokens alone."""
    if _Current.rows is rows:  # it runs for the first time
        yield
        return
    before, _Current.rows = _Current.rows, rows
    try:
        with _moved({block: rows}):
            yield
    finally:
        _Current.rows = before


def reads_no_padding(mask: Tensor | None, labels: Tensor, decoded: bool) -> bool:
    """Whether a loss stays what it is when padding holds something else.

    Args:
        mask: (batch, length), 1 where there is a token.
        labels: one for each token, (batch, length), or some for each row.
        decoded: the labels are for an encoder-decoder's tokens, to which the padding of the encoder is masked.
    """
    if mask is None or mask.dim() != 2:
        return decoded
    if not ends_in_padding(mask):
        return False
    if decoded:
        return True
    if labels.shape == mask.shape:
        return not has_labels_in_padding(labels, mask)
    return bool(mask[:, 0].all())


def _stacks(
    model: Any, mask: Tensor | None, decoder_mask: Tensor | None
) -> Iterator[tuple[list[nn.Module], Tensor]]:
    """The blocks of each stack that computes padding, and its mask."""
    found = [block for _, _, block in blocks(model)]
    decoding: set[nn.Module] = set()
    if model.config.is_encoder_decoder:
        decoding = set(model.get_decoder().modules())
    if mask is not None:
        yield [block for block in found if block not in decoding], mask
    if decoder_mask is not None:
        yield [block for block in found if block in decoding], decoder_mask


def can_be_unpadded(model: Any) -> bool:
    """Whether a model's blocks compute the same without padding, as a trial shows. Adapters that act by position or on
    attention see the batch as it is, so that their models are left alone, and so are experts who take so many tokens of
    each row and no more.
    """
    if getattr(model.config, "expert_capacity", None) is not None:
        return False
    for tuning in tunings(model).values():
        kinds = {link.site.kind for link in tuning.links}
        if tuning.reads_batch or tuning.shares_notes or kinds & AMONG_TOKENS:
            return False
    return asks_for_attention(model) and _is_same(model)


def _run(
    forward: Callable[..., Any], rows: Rows, hidden: Any, *args: Any, **kwargs: Any
) -> Any:
    """A block's forward; hidden is (batch, length, width) if it is the batch that `rows` are of."""
    shape = rows.real.shape
    if not isinstance(hidden, Tensor) or hidden.shape[:2] != shape:
        return forward(hidden, *args, **kwargs)
    flat = pick(hidden.flatten(0, 1), rows.place)[None]  # (1, tokens, width)
    before, _Current.rows = _Current.rows, rows
    try:
        out = forward(flat, *args, **kwargs)
    finally:
        _Current.rows = before
    if isinstance(out, Tensor):
        return _padded(out, rows)
    return type(out)([_padded(out[0], rows), *out[1:]])


def _padded(flat: Tensor, rows: Rows) -> Tensor:
    """(1, tokens, width) -> (batch, length, width)."""
    return place(flat[0], rows).view(*rows.real.shape, -1)


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
        query: (1, heads, tokens, head_dim) within a block of `_run`; key and value the same with kv_heads.
        mask: the model's own of the padded batch.

    Returns:
        (1, tokens, heads, head_dim), and no attention weights.
    """
    rows = _Current.rows
    tokens = 0 if rows is None else len(rows.place)
    if rows is None or len(query) != 1 or query.shape[2] != tokens:
        return base(module, query, key, value, mask, **options)
    among_itself = key.shape[2] == tokens and len(key) == 1
    query = by_row(query, rows)
    if among_itself:  # else they are the encoder's, padded
        key, value = by_row(key, rows), by_row(value, rows)
    bias = options.get("position_bias")
    if bias is not None:
        options["position_bias"] = _bias_by_row(bias, rows, among_itself)
    out, _ = base(module, query, key, value, mask, **options)
    return pick(out.flatten(0, 1), rows.place)[None], None


def _bias_by_row(bias: Tensor, rows: Rows, among_itself: bool) -> Tensor:
    """A bias (1, heads, tokens, keys) as (batch, heads, length, length or keys). Tokens of a row lie as far apart end
    to end as they do in the row.
    """
    of_queries = bias[0][:, rows.column]  # (heads, batch, length, keys)
    if not among_itself:
        return of_queries.transpose(0, 1)
    keys = rows.column[None, :, None, :].expand(*of_queries.shape[:3], -1)
    return of_queries.gather(-1, keys).transpose(0, 1)


@torch.no_grad()
def _is_same(model: Any) -> bool:
    """A batch with padding gives the same padded and not."""
    table = model.get_input_embeddings()
    if not isinstance(table, nn.Embedding):
        return False
    ids = torch.arange(5, 17, device=model.device).view(2, 6) % table.num_embeddings
    mask = _mask([6, 3], 6, ids)
    call = {"input_ids": ids, "attention_mask": mask}
    decoder_mask = None
    if model.config.is_encoder_decoder:
        decoder_mask = _mask([2, 5], 5, ids)
        call["decoder_input_ids"] = ids[:, :5]
    with evaluating(model):
        try:
            padded = model(**call)[0]
            with unpadded(model, mask, decoder_mask):
                found = model(**call)[0]
        except Exception:  # whatever a stranger's model says: it is left as it is
            return False
    real = mask if decoder_mask is None else decoder_mask
    if padded.dim() == 3 and padded.shape[:2] == real.shape:
        padded, found = padded[real.bool()], found[real.bool()]
    rounding = torch.finfo(padded.dtype).eps ** 0.5
    return float((found - padded).abs().max()) <= rounding * float(padded.abs().max())


def _mask(lengths: list[int], length: int, like: Tensor) -> Tensor:
    """(rows, length) of rows so long."""
    places = torch.arange(length, device=like.device)
    return (places < torch.tensor(lengths, device=like.device)[:, None]).long()
