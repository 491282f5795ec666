"""How an adapter comes to stand around a module: the module's class gets a mixin, as `parametrize` and FSDP2 do, so
that the base's keys, `isinstance` and checkpoints survive, and taking it off restores the class.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from petune.core.forward.link import Link

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from petune.core.attached.tuning import Tuning
    from petune.core.forward.plan import Plan
    from petune.core.method.batch import Batch


@dataclass(eq=False)
class Board:
    """What all adapted modules of one model share: switching and routing change it, and nothing walks the model."""

    tunings: dict[str, Tuning] = field(default_factory=dict)
    plan: Plan | None = None
    inserted: int | None = None
    """During `generate`, how many columns of virtual tokens stand before the user's tokens."""
    vocabulary: int = 0
    """Ids from here on are virtual."""
    causal: bool = True
    """The model reads left to right, so that virtual tokens may stand before its first token."""
    prompted: int | None = None
    """During `generate`, how many columns are the prompt's, those of virtual tokens included."""
    mask: Tensor | None = None
    """During `generate`, which columns of the prompts hold tokens, (rows, columns)."""
    batch: dict[str, Batch] = field(default_factory=dict)
    """What adapters may know of the forward that runs, by stack."""
    flags: dict[str, bool] = field(default_factory=dict)
    """Which base parameters asked for gradients before the first attach."""


def board_of(model: PreTrainedModel) -> Board | None:
    """What petune keeps on a model, None if nothing is attached."""
    graft = vars(model).get("petune_graft")
    return graft.board if graft is not None else None


def _serving(board: Board) -> list[Tuning]:
    """The tunings that act now."""
    return [
        t
        for t in board.tunings.values()
        if (t.name in board.plan.names if board.plan else t.enabled)
    ]


def _asked(board: Board) -> bool:
    """An adapter that acts now wants to know the batch."""
    return any(tuning.reads for tuning in _serving(board))


def prompts(board: Board) -> list[Link]:
    """The prompts that act now."""
    return [link for tuning in _serving(board) for link in tuning.prompts]


def table_of(board: Board) -> Tensor:
    """The rows of all serving prompts, (virtual tokens, hidden)."""
    return torch.cat([link.adapter() for link in prompts(board)])


def rows_of(board: Board, batch: int) -> list[tuple[int, int]]:
    """For each row of the batch where its virtual tokens start in the table, and how many they are."""
    spans: dict[str | None, tuple[int, int]] = {}
    end = 0
    for link in prompts(board):
        length = int(link.adapter.length)  # type: ignore[arg-type]
        start, count = spans.get(link.tuning.name, (end, 0))
        spans[link.tuning.name] = start, count + length
        end += length
    if board.plan is None:
        return [(0, end)] * batch
    return [spans.get(name, (0, 0)) for name in board.plan.repeated(batch)]
