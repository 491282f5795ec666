"""report.html: one file that opens without a network, made from the rows alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from petune.files import write_text
from petune_bench.cell import Row
from petune_bench.environment import PACKAGES
from petune_bench.plot import draw, inline, save
from petune_bench.summary import Summary, metric_of
from petune_bench.table import COLUMNS, figures

if TYPE_CHECKING:
    from jinja2 import Template

SHARED = ("model", "precision", "data", "task", "steps")
"""Keys of a row that a report shows once, since its rows mostly agree in them."""


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
    figure = draw(cells, title)
    if figure is not None:
        save(figure, out)
        figure.axes[0].set_title("", loc="left")  # the page has it above the plot
    text = _template().render(
        title=title,
        about=about,
        command=command,
        plot=inline(figure) if figure else "",
        plot_text="; ".join(_spoken(cell) for cell in cells if cell.score is not None),
        facts=_facts(rows),
        metric=metric_of(cells),
        columns=list(COLUMNS),
        cells=[(cell, figures(cell), _numbers(cell)) for cell in cells],
        several_seeds=any(cell.spread is not None for cell in cells),
        error_bar=max((cell.error_bar or 0.0 for cell in cells), default=0.0),
        test_rows=max(map(_test_rows, rows), default=0),
    )
    path = out / "report.html"
    write_text(path, text)
    return path


def _template() -> Template:
    from jinja2 import Environment, StrictUndefined

    text = files("petune_bench").joinpath("report.html").read_text(encoding="utf-8")
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.from_string(text)


def _numbers(cell: Summary) -> list[float | None]:
    """The cell's figures in the order of the columns, by which the page sorts."""
    return [cell.figures.get(key) for key, _ in COLUMNS.values()]


def _test_rows(row: Row) -> int:
    return row["environment"].get("test_rows") or 0


def _spoken(cell: Summary) -> str:
    return f"{cell.name}: {cell.score_text} at {cell.figures['peak_memory_bytes'] / 2**20:.0f} MiB"


def _facts(rows: Sequence[Row]) -> dict[str, str]:
    """What was run, on what and with what; several values where rows differ."""
    machine = f"{_noted(rows, 'cpu')}, {_noted(rows, 'cores')} cores, {_noted(rows, 'platform')}"
    facts = {
        **{key: _values(rows, key) for key in SHARED},
        "seeds": _said(sorted({row["seed"] for row in rows})),
        "test rows": _noted(rows, "test_rows"),
        "machine": machine,
        "device": _values(rows, "device"),
        "versions": _versions(rows),
    }
    return {key: value for key, value in facts.items() if value}


def _versions(rows: Sequence[Row]) -> str:
    found = {key: _noted(rows, key) for key in (*PACKAGES, "python")}
    return "; ".join(f"{key} {version}" for key, version in found.items() if version)


def _values(rows: Sequence[Row], key: str) -> str:
    return _said(row[key] for row in rows)


def _noted(rows: Sequence[Row], key: str) -> str:
    """What the rows' environments say under a key."""
    return _said(row["environment"].get(key) for row in rows)


def _said(values: Iterable[Any]) -> str:
    """The values, each once; those that are unknown are left out."""
    return ", ".join(dict.fromkeys(str(value) for value in values if value is not None))
