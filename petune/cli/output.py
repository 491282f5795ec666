"""What commands print: tables for people, JSON for programs, complaints on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any


class Stopped(Exception):  # noqa: N818
    """A command was interrupted and has something to say about it."""


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table: drawn on a terminal, elsewhere plain text in columns, never cut."""
    cells = [[_text(cell) for cell in row] for row in rows]
    if sys.stdout.isatty():
        _draw(columns, cells)
    else:
        _print_aligned([[column.upper() for column in columns], *cells])


def _text(cell: object) -> str:
    return "" if cell is None else str(cell)


def _draw(columns: Sequence[str], rows: list[list[str]]) -> None:
    """A table for a terminal; a cell that is too wide is folded."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        drawn.add_column(column, overflow="fold")
    for row in rows:
        drawn.add_row(*map(Text, row))  # Text: brackets in a cell are no markup
    Console().print(drawn)


def _print_aligned(rows: list[list[str]]) -> None:
    """A table as plain text, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        padded = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        print("  ".join(padded).rstrip())


def as_json(value: Any) -> None:
    """The value as one JSON document."""
    from petune.training.result import finite

    print(json.dumps(finite(value), indent=2, ensure_ascii=False, default=str))


def complain(message: str) -> None:
    """One line on stderr."""
    print(f"petune: {' '.join(message.split())}", file=sys.stderr)


def warn_of_failures() -> None:
    """Name the plugins that could not be loaded, a line each."""
    from petune.core.registry.plugins import registry

    for plugin in registry().plugins.values():
        if plugin.error:
            complain(
                f"warning: plugin {plugin.name} ({plugin.package}) is not loaded: {plugin.error}"
            )


def number(value: Any) -> str:
    """A figure as people read it."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    return str(value)
