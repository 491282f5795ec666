"""One batch, each row its own tuning."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from petune.core.forward.plan import Plan
from petune.core.graft.board import board_of
from petune.errors import PetuneError, unknown

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def route(model: PreTrainedModel, names: Sequence[str | None]) -> Iterator[None]:
    """Within the context row i of a batch goes through the tuning `names[i]` alone; None is the base.

    Raises:
        PetuneError: a name is not attached, or a batch does not fit the names.
    """
    board = board_of(model)
    known = board.tunings if board else {}
    for name in names:
        if name is not None and name not in known:
            raise PetuneError("route(): " + unknown("tuning", name, known))
    if not names:
        raise PetuneError(
            "route(): no names; give one for each row of the batch, None for the base."
        )
    if board is None:
        yield
        return
    before, board.plan = board.plan, Plan(names)
    try:
        yield
    finally:
        board.plan = before
