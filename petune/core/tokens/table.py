"""The input embedding of a model with prompts: it answers virtual ids with the prompts' rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from petune.core.forward.forward_pass import ForwardPass
from petune.core.forward.link import Link
from petune.core.graft.board import Board
from petune.core.graft.module import Grafted, graft_of
from petune.core.tokens.layout import Span


class PromptTable(Grafted):
    """The mixin of an embedding of input ids."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        board = graft_of(self).board
        forward = board.forward_pass()
        prompts = board.prompts(forward)
        if not prompts or not forward.may_have_virtual:
            return super().forward(*args, **kwargs)
        ids = args[0] if args else kwargs["input"]
        is_virtual = ids >= board.vocabulary
        out = super().forward(ids.masked_fill(is_virtual, 0))
        rows = rows_of(prompts).to(out)
        if (
            rows.shape[-1] != out.shape[-1]
        ):  # a second table that the model looks ids up in
            return out
        found = rows[(ids - board.vocabulary).clamp(min=0)]
        return torch.where(is_virtual[..., None], found, out)


def rows_of(prompts: list[Link]) -> Tensor:
    """The rows of several prompts one after another, (virtual tokens, hidden)."""
    return torch.cat([link.adapter() for link in prompts])


def spans_of(board: Board, forward: ForwardPass, batch: int) -> list[Span]:
    """The virtual tokens of each row of a batch."""
    spans: dict[str | None, Span] = {}
    end = 0
    for link in board.prompts(forward):
        length: Any = link.adapter.length
        before = spans.get(link.tuning.name, Span(end, 0))
        spans[link.tuning.name] = Span(before.start, before.count + int(length))
        end += int(length)
    if forward.plan is None:
        return [Span(0, end)] * batch
    forward.plan.check(batch)
    none = Span(0, 0)
    return [spans.get(name, none) for name in forward.plan.by_row]
