"""Blocks that compute no padding: each gets a padded batch's tokens end to end, and gives them back in their places.

Where a whole model can't take its rows end to end (an encoder whose head reads each row's first token), its blocks
often can: only their attention needs to see rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from petune.core.attached.tuning import tunings
from petune.core.frozen.blocks import blocks
from petune.core.host.attention import Attention, wrap_interface
from petune.training.packing import Rows, asks_for_attention, pick, place
from petune.training.swap import evaluating, forward_as

WORTH = 0.9
"""A batch of which a larger share are tokens is left padded: moving them would take longer than the padding."""

INSIDE = ("linear", "block", "norm", "embedding")
"""Kinds of sites whose adapters map each token by itself."""


class _Current:
    """The tokens of the block that is being computed."""

    rows: Rows | None = None


@contextmanager
def unpadded(model: nn.Module, mask: Tensor | None) -> Iterator[None]:
    """Within the context a model's blocks compute the tokens of a batch alone.

    Args:
        mask: (batch, length), 1 where there is a token; None where all are.
    """
    if mask is None or mask.dim() != 2 or float(mask.float().mean()) > WORTH:
        yield
        return
    rows = Rows.of(mask)
    with ExitStack() as stack:
        stack.callback(wrap_interface("unpadded", lambda base: partial(_attend, base)))
        for _, _, block in blocks(model):
            forward = partial(_run, block.forward, rows)
            stack.enter_context(forward_as(block, forward))
        yield


def can_be_unpadded(model: Any) -> bool:
    """Whether a model's blocks compute the same without padding, as a trial shows. Adapters that act by position or on
    attention see the batch as it is, so that their models are left alone.
    """
    for tuning in tunings(model).values():
        kinds = {link.site.kind for link in tuning.links}
        if tuning.reads_batch or tuning.shares_notes or not kinds <= {*INSIDE}:
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
    if rows is None or len(query) != 1 or key.shape[2] != len(rows.place):
        return base(module, query, key, value, mask, **options)
    moved = (x[0].transpose(0, 1) for x in (query, key, value))  # (tokens, heads, …)
    padded = (
        place(x, rows).view(*rows.real.shape, *x.shape[1:]).transpose(1, 2)
        for x in moved
    )
    out, _ = base(module, *padded, mask, **options)  # (batch, length, heads, …)
    return pick(out.flatten(0, 1), rows.place)[None], None


@torch.no_grad()
def _is_same(model: Any) -> bool:
    """A batch with padding gives the same padded and not."""
    table = model.get_input_embeddings()
    if model.config.is_encoder_decoder or not isinstance(table, nn.Embedding):
        return False
    ids = torch.arange(5, 17, device=model.device).view(2, 6) % table.num_embeddings
    mask = (torch.arange(6, device=model.device) < torch.tensor([[6], [3]])).long()
    with evaluating(model):
        try:
            padded = model(input_ids=ids, attention_mask=mask)[0]
            with unpadded(model, mask):
                found = model(input_ids=ids, attention_mask=mask)[0]
        except Exception:  # whatever a stranger's model says: it is left as it is
            return False
    if padded.shape[:2] == mask.shape:
        padded, found = padded[mask.bool()], found[mask.bool()]
    rounding = torch.finfo(padded.dtype).eps ** 0.5
    return float((found - padded).abs().max()) <= rounding * float(padded.abs().max())
