"""What a `with` sets for a model: a route, tunings switched off, weights. It belongs to the context that set it, so
that threads and asyncio's tasks don't see each other's.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from petune.core.forward.plan import Plan
from petune.errors import UnsupportedError


@dataclass(frozen=True)
class Settings:
    """What the current context has set for one model, all of it by the tunings' names."""

    plan: Plan | None = None
    off: frozenset[str] = frozenset()
    weights: Mapping[str, float] = field(default_factory=dict)


NOTHING_SET = Settings()
Entry = tuple[object, Settings]
"""The board of a model, and what is set for it."""
_set: ContextVar[tuple[Entry, ...]] = ContextVar("petune_settings", default=())


class _Thread(threading.local):
    """The settings once more, by thread: torch.compile can't trace a read of a context variable."""

    def __init__(self) -> None:
        self.entries: tuple[Entry, ...] = ()
        self.shared_by_tasks = 0


_thread = _Thread()


def settings_of(board: object) -> Settings:
    """What the current context has set for the model of a board.

    Raises:
        UnsupportedError: compiled code can't tell which of a thread's asyncio tasks it runs in.
    """
    entries: tuple[Entry, ...]
    if torch.compiler.is_compiling():
        if _thread.shared_by_tasks:
            raise UnsupportedError(
                "a compiled model can't be routed or switched by a `with` in an asyncio task."
            )
        entries = _thread.entries
    else:
        entries = _set.get()
    for owner, found in entries:
        if owner is board:
            return found
    return NOTHING_SET


@contextmanager
def setting(board: object, **changes: Any) -> Iterator[None]:
    """Within the context the settings of a board's model are changed: `plan`, `off`, `weights`."""
    changed = replace(settings_of(board), **changes)
    others = tuple(entry for entry in _set.get() if entry[0] is not board)
    entries = (*others, (board, changed))
    token = _set.set(entries)
    _thread.entries = entries
    in_task = _runs_in_a_task()
    _thread.shared_by_tasks += in_task
    try:
        yield
    finally:
        _thread.shared_by_tasks -= in_task
        _set.reset(token)
        _thread.entries = _set.get()  # tasks that take turns don't end in order


def _runs_in_a_task() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
