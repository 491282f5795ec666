"""Rows over seeds as one, and the plot's labels."""

from __future__ import annotations

import math

from petune_bench import results
from petune_bench.plot import draw, inline
from petune_bench.summary import summarize


def row(
    cell: str,
    seed: int = 0,
    score: float | None = 0.8,
    status: str = "ok",
    configuration: str = "a",
    **more,
):
    figures = "step_seconds tokens_per_second peak_memory_bytes saved_activation_bytes trainable_params adapter_bytes"
    return {
        "cell": cell, "seed": seed, "status": status, "error": None if status == "ok" else "why", "method": cell,
        "implementation": "petune", "precision": "nf4", "method_args": {}, "metric": "accuracy", "score": score,
        **dict.fromkeys(figures.split(), 1e8),
        "environment": {"configuration": configuration, "test_rows": 400, "training": {"learning_rate": 1e-3}},
    } | more  # fmt: skip


def test_mean_spread_and_standard_error():
    one, two = summarize([row("b", score=0.5), row("a", 0, 0.8), row("a", 1, 0.9)])
    assert (one.name, one.score, one.seeds) == ("a", 0.8500000000000001, [0, 1])
    assert math.isclose(one.spread, 0.1 / math.sqrt(2))
    assert two.spread is None
    assert math.isclose(two.error_bar, 0.025)  # sqrt(0.5 * 0.5 / 400)


def test_a_failed_seed_marks_the_cell_and_a_failed_cell_comes_last():
    cells = summarize(
        [
            row("c", score=None, status="oom"),
            row("a", 0, 0.1),
            row("a", 1, None, "failed"),
        ]
    )
    assert [(cell.name, cell.status) for cell in cells] == [
        ("a", "failed"),
        ("c", "oom"),
    ]
    assert cells[0].score == 0.1


def test_current_rows_are_the_last_of_the_wanted_configuration():
    rows = [
        row("a", 0, 0.1),
        row("a", 0, 0.2),
        row("a", 1, 0.3),
        row("a", 0, 0.9, configuration="b"),
        row("z", 0, 0.5),
    ]
    assert [r["score"] for r in results.current(rows, {"a": "a"})] == [0.2, 0.3, 0.5]
    assert [r["score"] for r in results.current(rows, {})] == [0.9, 0.5]


def test_labels_do_not_overlap():
    cells = summarize(
        [
            row(
                f"a-long-name-{i}", score=0.8 + i / 500, peak_memory_bytes=1e8 + i * 1e5
            )
            for i in range(9)
        ]
    )
    figure = draw(cells)
    renderer = figure._get_renderer()
    boxes = [text.get_window_extent(renderer) for text in figure.axes[0].texts]
    assert len(boxes) == 9
    assert not [
        1 for i, box in enumerate(boxes) for other in boxes[:i] if box.overlaps(other)
    ]
    assert "http" not in inline(figure)


def test_without_a_score_there_is_no_plot():
    assert draw(summarize([row("a", score=None, status="failed")])) is None
