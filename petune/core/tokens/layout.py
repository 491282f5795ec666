"""Where a batch's tokens go when virtual tokens come in: a table of columns that everything token-wise follows.

Virtual tokens are ids past the vocabulary, which the embedding answers with learned rows. Positions, masks, caches
and `generate` see ordinary tokens, so they need no code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Span:
    """The virtual tokens of one row: `count` rows of the table of all prompts, from `start` on."""

    start: int
    count: int


@dataclass(frozen=True, eq=False)
class Layout:
    """The columns of a batch once its virtual tokens are in it. Each row's stand before its own first token, behind
    the padding on its left: before the padding a sliding window would not see them.

    B is the batch, T the tokens of the user's columns, L the columns that there are now.

    Args:
        tokens: T.
        same: every row gets as many virtual tokens, in the same columns at the very beginning.
        uneven: rows get different numbers of virtual tokens, so that some are padded.
        at: (B, 1), the user's column before which they stand.
        start: (B, 1), the first of a row's virtual tokens in the table of all prompts.
        count: (B, 1), how many a row gets.
        source: (B, L), the user's column that stands there, -1 if none.
        virtual: (B, L), the row of the table that stands there, -1 if none. Where both are -1 there is padding.
        columns: (B, T), where the user's columns went.
    """

    tokens: int
    same: bool
    uneven: bool
    at: Tensor
    start: Tensor
    count: Tensor
    source: Tensor
    virtual: Tensor
    columns: Tensor

    @classmethod
    def of(
        cls,
        spans: Sequence[Span],
        tokens: int,
        device: torch.device,
        *,
        at: Tensor | int = 0,
        left: bool = False,
    ) -> Layout:
        """The layout of rows with these virtual tokens.

        Args:
            at: the user's column before which they stand, or (B, 1), one for each row.
            left: pad shorter rows on the left, as `generate` needs; else on the right, where positions stay what
                they are without the other rows.
        """
        counts = [span.count for span in spans]
        start = torch.tensor([span.start for span in spans], device=device)[:, None]
        count = torch.tensor(counts, device=device)[:, None]
        least, most = min(counts), max(counts)
        in_front = isinstance(at, int) and at == 0
        begin = torch.as_tensor(at, device=device).expand(len(spans), 1)
        shift = most - count if left else torch.zeros_like(count)
        column = torch.arange(most + tokens, device=device)[None] - shift
        is_virtual = (column >= begin) & (column < begin + count)
        source = torch.where(column < begin, column, column - count)
        outside = is_virtual | (column < 0) | (source >= tokens)
        token = torch.arange(tokens, device=device)[None]
        return cls(
            tokens=tokens,
            same=in_front and least == most,
            uneven=least < most,
            at=begin,
            start=start,
            count=count,
            source=torch.where(outside, -1, source),
            virtual=torch.where(is_virtual, start + column - begin, -1),
            columns=token + torch.where(token < begin, 0, count) + shift,
        )

    @property
    def rows(self) -> int:
        """B."""
        return int(self.source.shape[0])

    @property
    def length(self) -> int:
        """L, how many columns there are now."""
        return int(self.source.shape[1])

    @property
    def added(self) -> int:
        """How many columns have come in."""
        return self.length - self.tokens

    def spread(self, tensor: Tensor, virtual: Tensor | float, padding: float) -> Tensor:
        """(B, T, …) -> (B, L, …), with these values in the columns of virtual tokens and of padding."""
        shape = (*self.source.shape, *(1,) * (tensor.dim() - 2))
        rows = torch.arange(tensor.shape[0], device=tensor.device)[:, None]
        out = tensor[rows, self.source.clamp(min=0)]
        fill = torch.as_tensor(virtual, device=tensor.device, dtype=tensor.dtype)
        out = torch.where((self.virtual >= 0).view(shape), fill, out)
        empty = torch.as_tensor(padding, device=tensor.device, dtype=tensor.dtype)
        is_padding = (self.virtual < 0) & (self.source < 0)
        return torch.where(is_padding.view(shape), empty, out)

    def gather(self, tensor: Tensor) -> Tensor:
        """(B, L, …) -> (B, T, …): what stands at the user's columns."""
        if self.same:
            return tensor[:, tensor.shape[1] - self.tokens :]
        rows = torch.arange(tensor.shape[0], device=tensor.device)[:, None]
        return tensor[rows, self.columns]

    def without_virtual(self, ids: Tensor) -> Tensor:
        """(B · beams, L + n) -> (B · beams, T + n): a sequence as the user knows it, with what has been generated."""
        if self.same:
            return ids[:, self.added :]
        beams = ids.shape[0] // self.source.shape[0]
        columns = self.columns.repeat_interleave(beams, 0).to(ids.device)
        return torch.cat([ids.gather(1, columns), ids[:, self.length :]], 1)

    def mask(self, mask: Tensor | None) -> Tensor | None:
        """The attention mask, (B, T) or (B, 1, queries, keys), with the virtual tokens seen by all."""
        if mask is None:
            return (
                (self.source.ge(0) | self.virtual.ge(0)).long() if self.uneven else None
            )
        if mask.dim() == 2:
            return self.spread(mask, 1, 0)
        return self._mask_by_query(mask)

    def _mask_by_query(self, mask: Tensor) -> Tensor:
        """A mask of four dimensions, bool or added to the scores. A virtual token sees those up to itself."""
        is_bool = mask.dtype == torch.bool
        seen, hidden = (True, False) if is_bool else (0.0, torch.finfo(mask.dtype).min)
        by_key = self.spread(mask.permute(0, 3, 2, 1), seen, hidden).permute(0, 3, 2, 1)
        by_query = self.spread(by_key.transpose(1, 2), 0, 0).transpose(1, 2)
        is_virtual = (self.virtual >= 0)[:, None, None, :]  # (B, 1, 1, L)
        own = is_virtual.expand(-1, -1, self.length, -1).tril()
        of_virtual = own if is_bool else torch.where(own, seen, hidden).to(mask.dtype)
        return torch.where((self.source >= 0)[:, None, :, None], by_query, of_virtual)

    def positions(self, positions: Tensor) -> Tensor:
        """Position ids (B, T) -> (B, L): virtual tokens take the position of the token before which they stand, and
        those after it; the tokens behind move on.
        """
        token = torch.arange(self.tokens, device=positions.device)[None]
        moved = positions + torch.where(token < self.at, 0, self.count)
        first = positions.expand(len(self.at), -1).gather(
            1, self.at.clamp(max=self.tokens - 1)
        )
        return self.spread(moved, first + self.virtual - self.start, 0)


def first_tokens(mask: Tensor | None) -> Tensor | int:
    """(B, 1), the column of each row's first token by a mask (B, T); 0 where there is no such mask."""
    if mask is None or mask.dim() != 2:
        return 0
    return mask.bool().int().argmax(1, keepdim=True)
