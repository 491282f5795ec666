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
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    points = [cell for cell in cells if _has_both(cell)]
    if not points:
        return None
    with mpl.rc_context(RC):
        figure = Figure(figsize=(8, 5), layout="constrained")
        FigureCanvasAgg(figure)  # becomes the figure's own: it measures the names
        axes: Any = figure.add_subplot()
        for group in GROUPS:
            _draw_group(axes, group, points)
        _dress(axes, title, points[0].metric)
        figure.draw_without_rendering()  # settles the layout that labels are placed in
        _label(axes, points)
    return figure


def _has_both(cell: Summary) -> bool:
    """Whether the cell has a place on both axes."""
    return cell.score is not None and "peak_memory_bytes" in cell.figures


def _draw_group(axes: Any, group: str, points: Sequence[Summary]) -> None:
    """The points of one group with their error bars, if it has any."""
    chosen = [cell for cell in points if cell.group == group]
    if not chosen:
        return
    legend, marker, color = GROUPS[group]
    axes.errorbar(
        [_mib(cell) for cell in chosen],
        [cell.score for cell in chosen],
        [_doubt(cell) for cell in chosen],
        fmt=marker,
        color=color,
        markersize=8,
        elinewidth=1,
        alpha=0.95,
        label=legend,
    )


def _doubt(cell: Summary) -> float:
    """Half the length of the point's error bar."""
    if cell.spread is not None:
        return cell.spread
    return cell.error_bar or 0.0


def _dress(axes: Any, title: str, metric: str | None) -> None:
    """Everything around the points."""
    axes.set_xlabel("peak memory of a training step, MiB  (less is better)")
    axes.set_ylabel(f"{metric} on the test split  (more is better)")
    axes.set_title(title, loc="left", fontsize=12)
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


def _label(axes: Axes, points: Sequence[Summary]) -> None:
    """Names beside the points, each where it covers the least of points and names already there."""
    figure: Any = axes.figure
    marks = [axes.transData.transform(_place(cell)) for cell in points]
    taken: list[Bbox] = []
    legend = axes.get_legend()
    if legend is not None:
        taken.append(legend.get_window_extent(figure.canvas.get_renderer()))
    for cell in points:
        taken.append(_name_beside(axes, cell, marks, taken))


def _place(cell: Summary) -> tuple[float, float]:
    """The cell's coordinates."""
    return _mib(cell), cell.score or 0.0


def _name_beside(
    axes: Axes, cell: Summary, marks: Sequence[Any], taken: Sequence[Bbox]
) -> Bbox:
    """Write the cell's name at the cheapest of its places; the box that it then takes."""
    figure: Any = axes.figure
    renderer = figure.canvas.get_renderer()
    tried: list[tuple[float, Any, Bbox]] = []
    for rank in range(len(_PLACES)):
        text = _annotate(axes, cell, rank)
        box = text.get_window_extent(renderer).padded(2)
        cost = _covered(axes, box, marks, taken) + rank * 0.2
        tried.append((cost, text, box))
    best = min(tried, key=lambda one: one[0])
    for one in tried:
        if one is not best:
            one[1].remove()
    return best[2]


def _annotate(axes: Axes, cell: Summary, rank: int) -> Any:
    """The cell's name at one of the places around its point."""
    dx, dy, horizontal, vertical = _PLACES[rank]
    line = {"arrowstyle": "-", "color": INK, "alpha": 0.4, "linewidth": 0.7}
    return axes.annotate(
        cell.name,
        _place(cell),
        (dx, dy),
        textcoords="offset points",
        ha=horizontal,
        va=vertical,
        fontsize=10,
        arrowprops=line if rank >= _NEAR else None,
    )


def _covered(
    axes: Axes, box: Bbox, marks: Sequence[Any], taken: Sequence[Bbox]
) -> float:
    """What a box costs for the names, the points and the border that it covers."""
    names = sum(box.overlaps(other) for other in taken)
    points = sum(box.contains(*mark) for mark in marks)
    border = 0 if _inside(axes.bbox, box) else 8
    return names * 10 + points * 6 + border


def _inside(outer: Bbox, inner: Bbox) -> bool:
    return bool(
        outer.x0 <= inner.x0
        and inner.x1 <= outer.x1
        and outer.y0 <= inner.y0
        and inner.y1 <= outer.y1
    )


_PLACES = [
    (9, 0, "left", "center"), (-9, 0, "right", "center"), (0, 9, "center", "bottom"), (0, -9, "center", "top"),
    (8, 8, "left", "bottom"), (8, -8, "left", "top"), (-8, 8, "right", "bottom"), (-8, -8, "right", "top"),
    *((x, y, "left" if x > 0 else "right", "center") for y in (16, -16, 28, -28, 42, -42) for x in (22, -22)),
]  # fmt: skip
"""(dx, dy, horizontal and vertical alignment), the dearest last; from the _NEAR-th on a line leads to the point."""
_NEAR = 8
