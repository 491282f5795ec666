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
        plot_text="; ".join(_spoken(cell) for cell in cells if cell.score is not None),
        facts=_facts(rows),
        metric=next((cell.metric for cell in cells if cell.metric), "score"),
        columns=list(COLUMNS),
        cells=[
            (
                cell,
                figures(cell),
                [cell.figures.get(key) for key, _ in COLUMNS.values()],
            )
            for cell in cells
        ],
        several_seeds=any(cell.spread is not None for cell in cells),
        error_bar=max((cell.error_bar or 0.0 for cell in cells), default=0.0),
        test_rows=max(
            (row["environment"].get("test_rows") or 0 for row in rows), default=0
        ),
    )
    path = out / "report.html"
    write_text(path, text)
    return path


def _spoken(cell: Summary) -> str:
    return f"{cell.name}: {cell.score_text} at {cell.figures['peak_memory_bytes'] / 2**20:.0f} MiB"


def _facts(rows: Sequence[Row]) -> dict[str, str]:
    """What was run, on what and with what; several values where rows differ."""

    def said(values: Iterable[Any]) -> str:
        return ", ".join(
            dict.fromkeys(str(value) for value in values if value is not None)
        )

    def noted(key: str) -> str:
        return said(row["environment"].get(key) for row in rows)

    packages = [key for key in (*PACKAGES, "python") if noted(key)]
    facts = {
        "model": said(row["model"] for row in rows),
        "precision": said(row["precision"] for row in rows),
        "data": said(row["data"] for row in rows),
        "task": said(row["task"] for row in rows),
        "steps": said(row["steps"] for row in rows),
        "seeds": said(sorted({row["seed"] for row in rows})),
        "test rows": noted("test_rows"),
        "machine": f"{noted('cpu')}, {noted('cores')} cores, {noted('platform')}",
        "device": said(row["device"] for row in rows),
        "versions": "; ".join(f"{key} {noted(key)}" for key in packages),
    }
    return {key: value for key, value in facts.items() if value}
