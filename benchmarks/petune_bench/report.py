"""report.html: one file that opens without a network, made from the rows alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from petune.files import write_text
from petune_bench.cell import Row
from petune_bench.environment import PACKAGES
from petune_bench.plot import draw, inline, save
from petune_bench.summary import Summary
from petune_bench.table import COLUMNS, figures


def write_report(
    cells: Sequence[Summary],
    rows: Sequence[Row],
    out: Path,
    *,
    title: str,
    about: str,
    command: str,
) -> Path:
    """Write report.html, and its plot alone as report.svg and report.png."""
    from jinja2 import Environment, StrictUndefined

    figure = draw(cells, title)
    if figure is not None:
        save(figure, out)
        figure.axes[0].set_title("", loc="left")
    template = files("petune_bench").joinpath("report.html").read_text(encoding="utf-8")
    page = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    text = page.from_string(template).render(
        title=title,
        about=about,
        command=command,
        plot=inline(figure) if figure else "",
        facts=_facts(rows),
        test_rows=_test_rows(rows),
        **_shown(cells),
    )
    path = out / "report.html"
    write_text(path, text)
    return path


def _shown(cells: Sequence[Summary]) -> dict[str, Any]:
    """What the template shows of the cells."""
    scored = [cell for cell in cells if cell.score is not None]
    metrics = [cell.metric for cell in cells if cell.metric]
    error_bars = [cell.error_bar or 0.0 for cell in cells]
    return {
        "plot_text": "; ".join(map(_spoken, scored)),
        "metric": metrics[0] if metrics else "score",
        "columns": list(COLUMNS),
        "cells": [(cell, figures(cell), _numbers(cell)) for cell in cells],
        "several_seeds": any(cell.spread is not None for cell in cells),
        "error_bar": max(error_bars, default=0.0),
    }


def _numbers(cell: Summary) -> list[float | None]:
    """The cell's figures by which the columns sort."""
    return [cell.figures.get(key) for key, _ in COLUMNS.values()]


def _test_rows(rows: Sequence[Row]) -> int:
    """How many test rows the scores are means over, at most."""
    counts = [row["environment"].get("test_rows") or 0 for row in rows]
    return max(counts, default=0)


def _spoken(cell: Summary) -> str:
    return f"{cell.name}: {cell.score_text} at {cell.figures['peak_memory_bytes'] / 2**20:.0f} MiB"


def _facts(rows: Sequence[Row]) -> dict[str, str]:
    """What was run, on what and with what; several values where rows differ."""
    packages = [key for key in (*PACKAGES, "python") if _noted(rows, key)]
    machine = f"{_noted(rows, 'cpu')}, {_noted(rows, 'cores')} cores"
    facts = {
        "model": _told(rows, "model"),
        "precision": _told(rows, "precision"),
        "data": _told(rows, "data"),
        "task": _told(rows, "task"),
        "steps": _told(rows, "steps"),
        "seeds": _said(sorted({row["seed"] for row in rows})),
        "test rows": _noted(rows, "test_rows"),
        "machine": f"{machine}, {_noted(rows, 'platform')}",
        "device": _told(rows, "device"),
        "versions": "; ".join(f"{key} {_noted(rows, key)}" for key in packages),
    }
    return {key: value for key, value in facts.items() if value}


def _told(rows: Sequence[Row], key: str) -> str:
    """The values that the rows have under a key."""
    return _said(row[key] for row in rows)


def _noted(rows: Sequence[Row], key: str) -> str:
    """The values that the rows' environments have under a key."""
    return _said(row["environment"].get(key) for row in rows)


def _said(values: Iterable[Any]) -> str:
    """Each value once, in the order of their coming."""
    texts = [str(value) for value in values if value is not None]
    return ", ".join(dict.fromkeys(texts))
