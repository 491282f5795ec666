"""The hook points of a model as a tree: its modules, with the layers that are alike drawn once."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.text import Text
from rich.tree import Tree

from petune.core.frozen.site import Site

Row = tuple[str, str, str]  # where in its layer, the role, the sizes


def print_tree(title: str, sites: Sequence[Site]) -> None:
    """Draw the sites; each with its role, and its sizes as (in → out)."""
    tree = Tree(Text(title, style="bold"), guide_style="dim")
    for name, rows in _alike(_branches(sites)):
        whole = [row for row in rows if row[0] == ""]
        branch = (
            tree.add(_line((name, *whole[0][1:]))) if whole else tree.add(Text(name))
        )
        open_at: list[tuple[str, Tree]] = [("", branch)]
        for path, role, sizes in rows:
            if path == "" and whole:
                continue
            while open_at[-1][0] and not f"{path}.".startswith(f"{open_at[-1][0]}."):
                open_at.pop()
            shown = path.removeprefix(open_at[-1][0]).lstrip(".")
            node = open_at[-1][1].add(_line((shown, role, sizes)))
            if path != open_at[-1][0]:
                open_at.append((path, node))
    Console(width=None if sys.stdout.isatty() else 10_000).print(tree)


def _line(row: Row) -> Text:
    path, role, sizes = row
    return Text.assemble(
        "" if path in ("", role) else f"{path} ",
        (role, "bold cyan"),
        "  ",
        (sizes, "dim"),
    )


def _branches(sites: Sequence[Site]) -> Iterator[tuple[str, list[Row]]]:
    """What is in no layer by itself, then each layer with the sites in it, in the order of the model."""
    layers: dict[str, list[Site]] = {}
    for site in sites:
        stack = site.name if site.layer is None else _layer_name(site, sites)
        layers.setdefault(stack or "", []).append(site)
    for name, inside in layers.items():
        yield (
            name,
            [
                (
                    s.name.partition("#")[0].removeprefix(name).lstrip("."),
                    s.role,
                    _sizes(s),
                )
                for s in inside
            ],
        )


def _layer_name(site: Site, sites: Sequence[Site]) -> str:
    around = (
        s.name
        for s in sites
        if s.role == "layer" and f"{site.name}.".startswith(f"{s.name}.")
    )
    return next(around, site.name)


def _alike(
    branches: Iterator[tuple[str, list[Row]]],
) -> Iterator[tuple[str, list[Row]]]:
    """Neighbours that differ in nothing but their number as one: `model.layers.0-29`."""
    run: list[tuple[str, list[Row]]] = []
    for name, rows in branches:
        if run and rows and (_stem(name), rows) != (_stem(run[-1][0]), run[-1][1]):
            yield _run_name(run), run[0][1]
            run = []
        run.append((name, rows))
    if run:
        yield _run_name(run), run[0][1]


def _run_name(run: list[tuple[str, list[Row]]]) -> str:
    first, last = run[0][0], run[-1][0].rpartition(".")[2]
    return first if len(run) == 1 else f"{first}-{last}"


def _stem(name: str) -> str:
    return re.sub(r"\.\d+$", "", name) if re.search(r"\.\d+$", name) else f"{name}#"


def _sizes(site: Site) -> str:
    if site.kind == "attention":
        groups = (
            f", {site.kv_heads} of keys and values"
            if site.kv_heads != site.heads
            else ""
        )
        return f"{site.heads} heads of {site.head_dim}{groups}"
    if site.kind in ("linear", "embedding"):
        parts = f" = {' + '.join(site.parts)}" if site.parts else ""
        return f"{site.in_features} → {site.out_features}{parts}"
    return "" if site.kind == "module" else str(site.out_features)
