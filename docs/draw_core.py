"""Draws docs/images/core.svg from the core's imports: `python docs/draw_core.py`. A test holds that it is current."""

from __future__ import annotations

import json
import re
import tomllib
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from xml.sax.saxutils import escape

import grimp

ROOT = Path(__file__).parent.parent
CORE = ROOT / "petune/core"
PICTURE = Path(__file__).parent / "images/core.svg"
CONTRACT = "inside the core too"
"""The contract in pyproject.toml that lists the floors, the highest first."""

WIDTH, MARGIN = 1000, 12
ROW, LANE, LANES = 720, 38, 22  # a row's width; between two lanes; before the first
LINE, BOX, GAP = 19, 22, 6  # between arrows; a box's height; between boxes
LETTER = 7.0  # the width of a letter in a box
COLOURS = [
    "#1f5fa8",
    "#b3541e",
    "#2b7a3d",
    "#8a2f6b",
    "#6b6b1f",
    "#1f7a7a",
    "#7a1f1f",
    "#444444",
]


@dataclass(frozen=True)
class Core:
    """What the picture shows.

    Attributes:
        floors: the folders on each floor, the highest floor first; a file outside the folders goes by its own name.
        files: the files in each of them.
        imports: how many imports there are of a file of one by a file of another, by `one -> other`, and within
            each by `one -> one`.
    """

    floors: list[list[str]]
    files: dict[str, list[str]]
    imports: dict[str, int]


def core() -> Core:
    """The core as its files and their imports are now."""
    floors = _floors()
    files = {folder: _files(folder) for floor in floors for folder in floor}
    return Core(floors, files, _imports())


def _floors() -> list[list[str]]:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = settings["tool"]["importlinter"]["contracts"]
    (layers,) = (each["layers"] for each in contracts if each["name"] == CONTRACT)
    return [layer.split(" | ") for layer in layers]


def _files(folder: str) -> list[str]:
    if not (CORE / folder).is_dir():
        return [f"{folder}.py"]
    names = [path.name for path in (CORE / folder).glob("*.py")]
    return sorted(name for name in names if name != "__init__.py")


def _imports() -> dict[str, int]:
    """Imports for type checking count too, as they do in the contract."""
    graph = grimp.build_graph("petune", cache_dir=None)
    found: Counter[str] = Counter()
    for importer in graph.modules:
        for imported in graph.find_modules_directly_imported_by(importer):
            here, there = _folder(importer), _folder(imported)
            if here and there:
                found[f"{here} -> {there}"] += 1
    return dict(sorted(found.items()))


def _folder(module: str) -> str:
    """The folder of the core in which a module is; "" outside the core."""
    words = module.split(".")
    return words[2] if words[:2] == ["petune", "core"] and len(words) > 2 else ""


@dataclass(frozen=True)
class Row:
    """A folder in the picture: the height at which it begins, and the files on each line of its boxes."""

    folder: str
    top: float
    height: float
    lines: list[list[str]]


def drawn(shown: Core) -> str:
    """The picture as SVG, with what it shows in a comment."""
    rows = _rows(shown)
    last = list(rows.values())[-1]
    height = last.top + last.height + MARGIN
    senders = [folder for folder in rows if _targets(shown, folder)]
    # the highest folder's lane is outermost, so that no lane runs through another's beginning
    lanes = {
        folder: MARGIN + ROW + LANES + LANE * (len(senders) - 1 - i)
        for i, folder in enumerate(senders)
    }
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height:g}" '
        f'viewBox="0 0 {WIDTH} {height:g}" font-family="Helvetica, Arial, sans-serif">',
        f"<!-- {json.dumps(asdict(shown))} -->",
        "<title>The floors of petune's core and the imports between them</title>",
        f'<rect width="{WIDTH}" height="{height:g}" fill="#ffffff"/>',
    ]
    for row in rows.values():
        parts += _row(shown, row)
    for folder, colour in zip(senders, COLOURS, strict=False):
        parts += _arrows(shown, rows, folder, lanes, colour)
    return "\n".join([*parts, "</svg>", ""])


def _targets(shown: Core, folder: str) -> list[str]:
    """The other folders that a folder imports from, the highest first."""
    every = [other for floor in shown.floors for other in floor]
    return [
        other
        for other in every
        if other != folder and f"{folder} -> {other}" in shown.imports
    ]


def _rows(shown: Core) -> dict[str, Row]:
    """The folders from the top down; those of one floor stand close together."""
    rows: dict[str, Row] = {}
    top: float = MARGIN
    for floor in shown.floors:
        for folder in floor:
            is_folder = (CORE / folder).is_dir()
            lines = _lines(shown.files[folder]) if is_folder else []
            incoming = len(_sources(shown, folder))
            boxes = 32 + len(lines) * (BOX + GAP)
            height = max(boxes, LINE * (incoming + 1) + 8)
            rows[folder] = Row(folder, top, height, lines)
            top += height + 4
        top += 14
    return rows


def _sources(shown: Core, folder: str) -> list[str]:
    """The other folders that import from a folder."""
    return [other for other in shown.files if folder in _targets(shown, other)]


def _lines(files: list[str]) -> list[list[str]]:
    """The files broken into lines that fit into a row."""
    lines: list[list[str]] = [[]]
    used = 0.0
    for name in files:
        width = _width(name) + GAP
        if used + width > ROW - 2 * MARGIN:
            lines.append([])
            used = 0.0
        lines[-1].append(name)
        used += width
    return lines


def _width(name: str) -> float:
    return len(name) * LETTER + 14


def _row(shown: Core, row: Row) -> list[str]:
    within = shown.imports.get(f"{row.folder} -> {row.folder}")
    title = f"{row.folder}/" if row.lines else f"{row.folder}.py"
    left, right, line = MARGIN + 10, MARGIN + ROW - 10, row.top + 20
    parts = [
        f'<rect x="{MARGIN}" y="{row.top:g}" width="{ROW}" height="{row.height:g}" rx="5" '
        'fill="#f3f5f8" stroke="#c3cad4"/>',
        f'<text x="{left}" y="{line:g}" font-size="15" font-weight="bold">{title}'
        '<tspan dx="9" font-size="11" font-weight="normal" fill="#555">'
        f"{escape(_sentence(row.folder))}</tspan></text>",
    ]
    if within is not None:
        parts.append(
            f'<text x="{right}" y="{line:g}" font-size="11" text-anchor="end" fill="#555">{within} within</text>'
        )
    for number, names in enumerate(row.lines):
        x: float = left
        y = row.top + 30 + number * (BOX + GAP)
        for name in names:
            parts += _box(name, x, y)
            x += _width(name) + GAP
    return parts


def _sentence(folder: str) -> str:
    """The first sentence of what a folder, or a file beside the folders, says of itself."""
    found = CORE / folder / "__init__.py"
    path = found if found.exists() else CORE / f"{folder}.py"
    return path.read_text(encoding="utf-8").partition('"""')[2].partition('"""')[0]


def _box(name: str, x: float, y: float) -> list[str]:
    width = _width(name)
    return [
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{BOX}" rx="3" fill="#fff" stroke="#98a3b3"/>',
        f'<text x="{x + width / 2:g}" y="{y + 15:g}" font-size="12" text-anchor="middle">{name}</text>',
    ]


def _arrows(
    shown: Core, rows: dict[str, Row], folder: str, lanes: dict[str, int], colour: str
) -> list[str]:
    """A folder's lane down the right side, with an arrow into each folder that it imports from."""
    lane, edge = lanes[folder], MARGIN + ROW
    targets = _targets(shown, folder)
    begin = rows[folder].top + 15
    ends = {other: _end(shown, rows[other], folder) for other in targets}
    down = max(ends.values())
    parts = [
        f'<path d="M {edge} {begin:g} H {lane} V {down:g}" fill="none" stroke="{colour}" stroke-width="1.5"/>',
        f'<circle cx="{edge}" cy="{begin:g}" r="3.5" fill="{colour}"/>',
    ]
    for other, y in ends.items():
        count = shown.imports[f"{folder} -> {other}"]
        parts += [
            f'<path d="M {lane} {y:g} H {edge + 7}" stroke="{colour}" stroke-width="1.5"/>',
            f'<path d="M {edge} {y:g} l 9 -4 v 8 z" fill="{colour}"/>',
            f'<rect x="{lane - 12}" y="{y - 8:g}" width="24" height="16" rx="8" fill="#fff" stroke="{colour}"/>',
            f'<text x="{lane}" y="{y + 4:g}" font-size="12" text-anchor="middle" fill="{colour}">{count}</text>',
        ]
    return parts


def _end(shown: Core, row: Row, source: str) -> float:
    """The height at which the arrow from a folder ends, below those from lower ones, so that lanes don't meet it."""
    sources = _sources(shown, row.folder)
    return row.top + 15 + LINE * (len(sources) - sources.index(source))


def written() -> Core:
    """What the picture says that it shows."""
    found = re.search(r"<!-- (.*) -->", PICTURE.read_text(encoding="utf-8"))
    assert found is not None, "run python docs/draw_core.py"
    return Core(**json.loads(found[1]))


if __name__ == "__main__":
    PICTURE.write_text(drawn(core()), encoding="utf-8")
