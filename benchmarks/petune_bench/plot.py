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

    points = [
        cell
        for cell in cells
        if cell.score is not None and "peak_memory_bytes" in cell.figures
    ]
    if not points:
        return None
    with mpl.rc_context(RC):
        figure = Figure(figsize=(8, 5), layout="constrained")
        axes: Any = figure.add_subplot()
        for group, (legend, marker, color) in GROUPS.items():
            chosen = [cell for cell in points if cell.group == group]
            if chosen:
                doubts = [
                    cell.error_bar or 0.0 if cell.spread is None else cell.spread
                    for cell in chosen
                ]
                axes.errorbar(
                    [_mib(cell) for cell in chosen], [cell.score for cell in chosen], doubts,
                    fmt=marker, color=color, markersize=8, elinewidth=1, alpha=0.95, label=legend,
                )  # fmt: skip
        axes.set_xlabel("peak memory of a training step, MiB  (less is better)")
        axes.set_ylabel(f"{points[0].metric} on the test split  (more is better)")
        axes.set_title(title, loc="left", fontsize=12)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color=INK, alpha=0.12, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.margins(0.14, 0.12)
        axes.legend(frameon=False, loc="best", fontsize=10)
        figure.draw_without_rendering()  # settles the layout that labels are placed in
        _label(axes, points)
    return figure


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
    renderer = figure._get_renderer()
    marks = [
        axes.transData.transform((_mib(cell), cell.score or 0.0)) for cell in points
    ]
    taken: list[Bbox] = []
    legend = axes.get_legend()
    if legend is not None:
        taken.append(legend.get_window_extent(renderer))
    for cell in points:
        best: tuple[float, Any, Bbox] | None = None
        for cost, (dx, dy, ha, va) in enumerate(_PLACES):
            text = axes.annotate(
                cell.name,
                (_mib(cell), cell.score or 0.0),
                (dx, dy),
                textcoords="offset points",
                ha=ha,
                va=va,
                fontsize=10,
                arrowprops={
                    "arrowstyle": "-",
                    "color": INK,
                    "alpha": 0.4,
                    "linewidth": 0.7,
                }
                if cost >= _NEAR
                else None,
            )
            box = text.get_window_extent(renderer).padded(2)
            covered = (
                sum(box.overlaps(other) for other in taken) * 10
                + sum(box.contains(*mark) for mark in marks) * 6
            )
            covered += 0 if _inside(axes.bbox, box) else 8
            total = covered + cost * 0.2
            if best is None or total < best[0]:
                if best:
                    best[1].remove()
                best = (total, text, box)
            else:
                text.remove()
        assert best is not None
        taken.append(best[2])


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
