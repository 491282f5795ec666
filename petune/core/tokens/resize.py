"""The vocabulary of an adapted model grows or shrinks: what acts elsewhere follows, what acts there is refused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

from torch import nn

from petune.core.frozen.modules import base_class
from petune.core.frozen.tables import input_table
from petune.core.graft.board import Board
from petune.errors import PetuneError

WHAT = "resize_token_embeddings"


@contextmanager
def resizing(model: Any, board: Board) -> Iterator[None]:
    """Within the context the base's tables of tokens may take another size. Virtual tokens have their ids behind the
    new vocabulary then, and new rows are as frozen as the old ones.

    Raises:
        PetuneError: a tuning acts at one of the tables, or another thread runs a forward.
    """
    before = _tables(model)
    check_unused(board, before, WHAT)
    with board.gate.change(WHAT):
        yield
        after = _tables(model)
        for table in after:
            _freeze(table)
        board.vocabulary = getattr(input_table(model), "num_embeddings", 0)


def check_replaceable(board: Board, old: Any, new: Any) -> None:
    """See that nothing of petune stands on a table of tokens that another module is to replace.

    Raises:
        PetuneError: something does, and would be lost without a word.
    """
    if old is None or old is new:
        return
    what = f"replacing a {base_class(old).__name__} of tokens"
    check_unused(board, [old], what)
    if "petune_graft" in vars(old):
        names = [t.name for t in board.tunings.values() if t.prompts]
        raise PetuneError(
            f"{what}: the virtual tokens of tuning {names[0]!r} have their rows there; do it before attach."
        )


def check_unused(board: Board, modules: list[nn.Module], what: str) -> None:
    """See that no tuning acts at one of the modules.

    Raises:
        PetuneError: one does, which would lose its place or not fit.
    """
    weights = set(chain.from_iterable(map(_own, modules)))
    for tuning in board.tunings.values():
        for link in tuning.links:
            if not weights.isdisjoint(_own(link.site.module)):
                raise PetuneError(
                    f"{what}: tuning {tuning.name!r} acts at {link.site.name} and has its size; "
                    "do it before attach, or merge() or detach() the tuning first."
                )


def _tables(model: Any) -> list[nn.Module]:
    """The modules with a row for each token."""
    found = [model.get_input_embeddings(), model.get_output_embeddings()]
    return list(filter(None, found))


def _own(module: nn.Module) -> list[int]:
    """The identities of the parameters that a module itself holds, which a tied one shares."""
    return list(map(id, module.parameters(recurse=False)))


def _freeze(table: nn.Module) -> None:
    for parameter in table.parameters(recurse=False):
        parameter.requires_grad_(False)
