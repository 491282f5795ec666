"""One batch, each row its own tuning."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from petune.core.forward.plan import Plan
from petune.core.forward.settings import setting
from petune.core.graft.board import board_of
from petune.errors import PetuneError, unknown

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def route(model: PreTrainedModel, names: Sequence[str | None]) -> Iterator[None]:
    """Within the context row i of a batch goes through the tuning `names[i]` alone; None is the base.

    It holds for the context that sets it (a thread, an asyncio task) and for no other. `generate` repeats the names
    for its beams.

    Raises:
        PetuneError: a name is not attached, or a batch does not have one row a name.
    """
    if isinstance(names, str) or not isinstance(names, Sequence):
        how = "give a list, a name for each row of the batch"
        raise PetuneError(f"route(): {names!r} is no list of names; {how}.")
    board = board_of(model)
    known = {} if board is None else board.tunings
    strange = set(names) - {None} - known.keys()
    if strange:
        raise PetuneError("route(): " + unknown("tuning", strange.pop(), known))
    if not names:
        raise PetuneError(
            "route(): no names; give one for each row of the batch, None for the base."
        )
    if board is None:
        yield
        return
    with setting(board, plan=Plan(names)):
        yield
