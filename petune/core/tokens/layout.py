"""Virtual tokens: ids past the vocabulary, which the embedding answers with learned rows. Positions, masks, caches
and `generate` see ordinary tokens, so they need no code.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Layout:
    """Where a batch's tokens go when virtual tokens come in at column `at`.

    `source` (batch, length) is the token that a column holds and -1 if none; `virtual` is the row of the prompt
    table and -1 if none; where both are -1 there is padding. `columns` (batch, tokens) says where the tokens went.
    """

    at: int
    tokens: int
    padded: bool
    start: Tensor
    count: Tensor
    source: Tensor
    virtual: Tensor
    columns: Tensor

    @classmethod
    def of(
        cls, spans: list[tuple[int, int]], tokens: int, at: int, left: bool, device: torch.device
    ) -> Layout:
        """Row i gets the rows of the table that `spans[i]` says, (start, count). Shorter rows are padded on the
        right, where positions stay what they are without the others; on the left for generation.
        """
        start, count = torch.tensor(spans, device=device)[..., None].unbind(1)  # (batch, 1) each
        least, most = min(n for _, n in spans), max(n for _, n in spans)
        shift = most - count if left else torch.zeros_like(count)
        column = torch.arange(most + tokens, device=device)[None] - shift
        is_virtual = (column >= at) & (column < at + count)
        source = torch.where(column < at, column, column - count)
        source = torch.where(is_virtual | (column < 0) | (source >= tokens), -1, source)
        token = torch.arange(tokens, device=device)[None]
        columns = token + torch.where(token < at, 0, count) + shift
        virtual = torch.where(is_virtual, start + column - at, -1)
        return cls(at, tokens, least < most, start, count, source, virtual, columns)

    @property
    def added(self) -> int:
        """How many columns come in."""
        return self.source.shape[1] - self.tokens

    def spread(self, tensor: Tensor, virtual: Tensor | float, padding: float) -> Tensor:
        """(batch, tokens, …) -> (batch, length, …), with values for the new columns."""
        shape = (*self.source.shape, *(1,) * (tensor.dim() - 2))
        rows = torch.arange(tensor.shape[0], device=tensor.device)[:, None]
        out = tensor[rows, self.source.clamp(min=0)]
        fill = torch.as_tensor(virtual, device=tensor.device, dtype=tensor.dtype)
        out = torch.where((self.virtual >= 0).view(shape), fill, out)
        empty = torch.as_tensor(padding, device=tensor.device, dtype=tensor.dtype)
        return torch.where(((self.virtual < 0) & (self.source < 0)).view(shape), empty, out)

    def gather(self, tensor: Tensor) -> Tensor:
        """(batch, length, …) -> (batch, tokens, …): the results at the tokens."""
        if self.at == 0 and not self.padded:
            return tensor[:, tensor.shape[1] - self.tokens :]
        rows = torch.arange(tensor.shape[0], device=tensor.device)[:, None]
        return tensor[rows, self.columns]

    def mask(self, mask: Tensor | None) -> Tensor | None:
        """The attention mask, (batch, tokens) or (batch, 1, queries, keys), with the virtual tokens seen by all."""
        if mask is None:
            return (self.source.ge(0) | self.virtual.ge(0)).long() if self.padded else None
        if mask.dim() == 2:
            return self.spread(mask, 1, 0)
        seen, hidden = (
            (True, False) if mask.dtype == torch.bool else (0.0, torch.finfo(mask.dtype).min)
        )
        by_key = self.spread(mask.permute(0, 3, 2, 1), seen, hidden).permute(0, 3, 2, 1)
        own = torch.where(self.virtual >= 0, 1.0, 0.0)[
            :, None, None, :
        ]  # a virtual token sees those up to itself
        own = own * torch.ones_like(own).expand(-1, -1, own.shape[-1], -1).tril()
        rows = (
            own.bool()
            if mask.dtype == torch.bool
            else torch.where(own.bool(), seen, hidden).to(mask.dtype)
        )
        out = self.spread(by_key.transpose(1, 2), 0, 0).transpose(1, 2)
        return torch.where((self.source >= 0)[:, None, :, None], out, rows)
