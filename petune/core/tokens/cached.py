"""Which virtual tokens a cache of keys and values holds: noted on the cache, since nothing else tells."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from petune.core.tokens.layout import Layout, Span
from petune.errors import UnsupportedError

NOTE = "petune_layout"


def note_virtual_tokens(cache: Any, layout: Layout, spans: list[Span]) -> None:
    """Note on a cache which virtual tokens went into it; a state that is a plain list has no place for it."""
    if hasattr(cache, "__dict__"):
        setattr(cache, NOTE, (layout, spans))


def noted_layout(cache: Any, spans: list[Span]) -> Layout:
    """The layout with which virtual tokens went into a cache.

    Raises:
        UnsupportedError: none went into it, or others than those that act now.
    """
    found = getattr(cache, NOTE, None)
    if found is None:
        raise UnsupportedError(
            "this cache was filled without the virtual tokens that act now; begin with an empty one."
        )
    layout, noted = found
    if noted != spans:
        raise UnsupportedError(
            "this cache holds the virtual tokens of another tuning or row; begin with an empty one."
        )
    filled: Layout = layout
    return filled


def mask_beyond(layout: Layout, mask: Tensor | None, columns: int) -> Tensor | None:
    """The mask of a decoding that goes on from a cache, for all its columns.

    Args:
        mask: the user's, which may leave the virtual tokens out; (batch, tokens so far).
        columns: how many columns there are now, those in the cache included.
    """
    if mask is None:
        if not layout.uneven:
            return None
        mask = layout.source.new_ones(layout.rows, columns - layout.added)
    is_whole = mask.dim() != 2 or mask.shape[1] >= columns
    if is_whole:
        return mask
    first, later = mask[:, : layout.tokens], mask[:, layout.tokens :]
    laid_out = layout.mask(first)
    assert laid_out is not None
    return torch.cat([laid_out, later], 1)
