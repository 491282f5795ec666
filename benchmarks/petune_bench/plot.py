"""Peak memory against score, each point with its name beside it."""

from __future__ import annotations

from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from petune_bench.summary import Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox

INK = "#1f2328"
GROUPS = {
    "petune": ("petune", "o", "#2f81f7"),
    "peft": ("PEFT", "s", "#d1700f"),
    "full": ("full fine-tuning", "D", "#8957e5"),
}
"""Legend, marker and colour: each is told apart without the colour, and reads on white and on black."""
RC: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "petune",
    "font.family": "sans-serif",
    "font.size": 11,
    **dict.fromkeys(
        (
            "text.color",
            "axes.edgecolor",
            "axes.labelcolor",
            "xtick.color",
            "ytick.color",
        ),
        INK,
    ),
}


def draw(cells: Sequence[Summary], title: str = "") -> Figure | None:
    """The figure, or None where no cell has both figures."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    points = [cell for cell in cells if _has_both(cell)]
    if not points:
        return None
    with mpl.rc_context(RC):
        figure = Figure(figsize=(8, 5), layout="constrained")
        axes: Any = figure.add_subplot()
        for group in GROUPS:
            chosen = [cell for cell in points if cell.group == group]
            if chosen:
                _draw_points(axes, group, chosen)
        axes.set_title(title, loc="left", fontsize=12)
        _dress(axes, points[0].metric)
        figure.draw_without_rendering()  # computes the layout that names are placed in
        _name(axes, points)
    return figure


def _has_both(cell: Summary) -> bool:
    return cell.score is not None and "peak_memory_bytes" in cell.figures


def _draw_points(axes: Any, group: str, cells: Sequence[Summary]) -> None:
    """The cells of one group, each with its doubt as a bar: over the seeds, else of the test split."""
    legend, marker, color = GROUPS[group]
    memory = [_mib(cell) for cell in cells]
    scores = [cell.score for cell in cells]
    axes.errorbar(
        memory, scores, [_doubt(cell) for cell in cells],
        fmt=marker, color=color, markersize=8, elinewidth=1, alpha=0.95, label=legend,
    )  # fmt: skip


def _doubt(cell: Summary) -> float:
    return (cell.error_bar or 0.0) if cell.spread is None else cell.spread


def _dress(axes: Any, metric: str | None) -> None:
    """Words, lines and margins."""
    axes.set_xlabel("peak memory of a training step, MiB  (less is better)")
    axes.set_ylabel(f"{metric} on the test split  (more is better)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=INK, alpha=0.12, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.margins(0.14, 0.12)
    axes.legend(frameon=False, loc="best", fontsize=10)


def save(figure: Figure, out: Path) -> None:
    """`report.svg` and `report.png`, on white, for a page elsewhere."""
    import matplotlib as mpl

    with mpl.rc_context(RC):
        figure.savefig(out / "report.svg", metadata={"Date": None}, facecolor="white")
        figure.savefig(out / "report.png", dpi=160, facecolor="white")


def inline(figure: Figure) -> str:
    """An `<svg>` element in the colours of the page around it."""
    import matplotlib as mpl

    text = StringIO()
    with mpl.rc_context(RC):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    element = text.getvalue().partition("<svg")[2].partition(">")
    body = element[2].replace(INK, "currentColor")
    body = (
        body[: body.index("<metadata>")]
        + body[body.index("</metadata>") + len("</metadata>") :]
    )
    size = element[0].partition("viewBox=")[2].split('"')[1]
    # inside HTML an svg needs no namespace declared, save for the links to its own markers
    return (
        f'<svg viewBox="{size}" role="img" aria-labelledby="plot-text">{body}'.replace(
            "xlink:href", "href"
        )
    )


def _mib(cell: Summary) -> float:
    return cell.figures["peak_memory_bytes"] / 2**20


def _name(axes: Axes, cells: Sequence[Summary]) -> None:
    """Names beside the points, each where it covers the least of points and names already there."""
    marks = [axes.transData.transform((_mib(c), c.score or 0.0)) for c in cells]
    taken: list[Bbox] = []
    legend = axes.get_legend()
    if legend is not None:
        taken.append(legend.get_window_extent())
    for cell in cells:
        taken.append(_write_name(axes, cell, taken, marks))


def _write_name(
    axes: Axes, cell: Summary, taken: Sequence[Bbox], marks: Sequence[Any]
) -> Bbox:
    """Write a cell's name at the best of all offsets, and say where it stands."""
    tried = []
    for rank, offset in enumerate(_OFFSETS):
        text = _annotate(axes, cell, offset, line=rank >= _NEAR)
        box = text.get_window_extent().padded(2)
        tried.append((_cost(axes, box, taken, marks) + rank * 0.2, text, box))
    best = min(tried, key=lambda one: one[0])
    for one in tried:
        if one is not best:
            one[1].remove()
    return best[2]


def _annotate(axes: Axes, cell: Summary, offset: Offset, *, line: bool) -> Any:
    dx, dy, horizontal, vertical = offset
    arrow = {"arrowstyle": "-", "color": INK, "alpha": 0.4, "linewidth": 0.7}
    return axes.annotate(
        cell.name,
        (_mib(cell), cell.score or 0.0),
        (dx, dy),
        textcoords="offset points",
        ha=horizontal,
        va=vertical,
        fontsize=10,
        arrowprops=arrow if line else None,
    )


def _cost(axes: Axes, box: Bbox, taken: Sequence[Bbox], marks: Sequence[Any]) -> int:
    """How bad it is to write into this box: over other names, over points, past the edge of the plot."""
    names = sum(bool(box.overlaps(other)) for other in taken)
    points = sum(bool(box.contains(*mark)) for mark in marks)
    outside = not _inside(axes.bbox, box)
    return names * 10 + points * 6 + outside * 8


def _inside(outer: Bbox, inner: Bbox) -> bool:
    return bool(
        outer.x0 <= inner.x0
        and inner.x1 <= outer.x1
        and outer.y0 <= inner.y0
        and inner.y1 <= outer.y1
    )


Offset = tuple[int, int, str, str]
_OFFSETS: list[Offset] = [
    (9, 0, "left", "center"), (-9, 0, "right", "center"), (0, 9, "center", "bottom"), (0, -9, "center", "top"),
    (8, 8, "left", "bottom"), (8, -8, "left", "top"), (-8, 8, "right", "bottom"), (-8, -8, "right", "top"),
    *((x, y, "left" if x > 0 else "right", "center") for y in (16, -16, 28, -28, 42, -42) for x in (22, -22)),
]  # fmt: skip
"""(dx, dy, horizontal and vertical alignment), the dearest last; from the _NEAR-th on a line leads to the point."""
_NEAR = 8
