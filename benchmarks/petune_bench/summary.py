"""What the table and the report show of a cell: its rows over the seeds as one."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from petune_bench.cell import Row

AVERAGED = (
    "step_seconds", "tokens_per_second", "peak_memory_bytes", "saved_activation_bytes",
    "trainable_params", "adapter_bytes",
)  # fmt: skip
PROPORTIONS = ("accuracy", "exact_match")
"""Metrics that are a share of the test rows, whose standard error is thus known."""


@dataclass(frozen=True)
class Summary:
    """One cell. `spread` is the standard deviation over seeds, `error_bar` the binomial standard error of one score."""

    name: str
    method: str
    implementation: str
    precision: str
    status: str
    error: str | None
    seeds: list[int]
    metric: str | None
    score: float | None
    spread: float | None
    error_bar: float | None
    learning_rate: float
    method_args: dict[str, Any]
    figures: dict[str, float]
    """Means over the seeds."""

    @property
    def group(self) -> str:
        """What the plot tells apart."""
        if self.implementation != "petune":
            return self.implementation
        return "full" if self.method == "full" else "petune"

    @property
    def score_text(self) -> str:
        """`0.811 ± 0.009`, over the seeds where there are several, else the test split's standard error."""
        if self.score is None:
            return ""
        doubt = self.error_bar if self.spread is None else self.spread
        return f"{self.score:.3f}" + (f" ± {doubt:.3f}" if doubt is not None else "")


def summarize(rows: Sequence[Row]) -> list[Summary]:
    """The cells, the best score first, those without one at the end."""
    grouped: dict[str, list[Row]] = {}
    for row in rows:
        grouped.setdefault(row["cell"], []).append(row)
    return sorted(
        map(_summary, grouped.values()),
        key=lambda cell: (cell.score is None, -(cell.score or 0.0)),
    )


def metric_of(cells: Sequence[Summary]) -> str:
    """The name of the score that the cells share."""
    return next((cell.metric for cell in cells if cell.metric), "score")


def _summary(rows: list[Row]) -> Summary:
    good, bad = _by_status(rows)
    first, worst = (good or rows)[0], (bad or rows)[0]
    scores = [row["score"] for row in good]
    score = statistics.mean(scores) if scores else None
    return Summary(
        name=first["cell"],
        method=first["method"],
        implementation=first["implementation"],
        precision=first["precision"],
        status=worst["status"],
        error=worst["error"] if bad else None,
        seeds=[row["seed"] for row in good],
        metric=first["metric"],
        score=score,
        spread=statistics.stdev(scores) if len(scores) > 1 else None,
        error_bar=_binomial(first, score),
        learning_rate=first["environment"]["training"]["learning_rate"],
        method_args=first["method_args"],
        figures=_means(good),
    )


def _by_status(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """(the rows that have figures, those that have none)."""
    good = [row for row in rows if row["status"] == "ok"]
    return good, [row for row in rows if row["status"] != "ok"]


def _means(rows: Sequence[Row]) -> dict[str, float]:
    """The means of what was measured; empty without rows."""
    if not rows:
        return {}
    found = {}
    for key in AVERAGED:
        found[key] = statistics.mean(row[key] for row in rows)
    return found


def _binomial(row: Row, score: float | None) -> float | None:
    count = row["environment"].get("test_rows")
    if score is None or not count or row["metric"] not in PROPORTIONS:
        return None
    return math.sqrt(max(score * (1 - score), 0.0) / count)
