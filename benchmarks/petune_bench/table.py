"""The table that ends a benchmark."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence

from petune.training.result import finite
from petune_bench.cell import Row
from petune_bench.summary import Summary, metric_of


def _mib(value: float) -> str:
    return f"{value / 2**20:.1f}"


COLUMNS: dict[str, tuple[str, Callable[[float], str]]] = {
    "trained": ("trainable_params", lambda value: f"{value:,.0f}"),
    "step s": ("step_seconds", lambda value: f"{value:.3f}"),
    "tokens/s": ("tokens_per_second", lambda value: f"{value:,.0f}"),
    "peak MiB": ("peak_memory_bytes", _mib),
    "saved MiB": ("saved_activation_bytes", _mib),
    "adapter MiB": ("adapter_bytes", lambda value: f"{value / 2**20:.3f}"),
}
"""Heading, key of the row, how its figure is written."""


def figures(cell: Summary) -> list[str]:
    """The cell's figures as text; empty where it has none."""
    return [
        write(cell.figures[key]) if key in cell.figures else ""
        for key, write in COLUMNS.values()
    ]


def show(cells: Sequence[Summary]) -> None:
    """Drawn on a terminal, elsewhere plain text in columns."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    metric = metric_of(cells)
    drawn = Table(
        padding=(0, 1, 0, 0),
        box=SIMPLE_HEAD if sys.stdout.isatty() else None,
        pad_edge=False,
        header_style="bold",
    )
    drawn.add_column("method", no_wrap=True)
    drawn.add_column("precision")
    drawn.add_column(metric, justify="right", no_wrap=True)
    for heading in COLUMNS:
        drawn.add_column(heading, justify="right")
    for cell in cells:
        drawn.add_row(
            Text(cell.name),
            cell.precision,
            cell.score_text or cell.status,
            *figures(cell),
        )
    console = (
        Console(highlight=False)
        if sys.stdout.isatty()
        else Console(width=10_000, highlight=False, no_color=True)
    )
    console.print(drawn)
    for cell in cells:
        if cell.status != "ok":
            console.print(Text(f"{cell.name}: {cell.status}: {cell.error}"))


def as_json(rows: Sequence[Row]) -> None:
    """The rows as one JSON document."""
    print(json.dumps(finite(list(rows)), indent=2, ensure_ascii=False, default=str))
