"""The hook points of a model as a tree: its modules, with the layers that are alike drawn once."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence

from rich.console import Console
from rich.text import Text
from rich.tree import Tree

from petune.core.frozen.site import Site

Row = tuple[str, str, str]  # where in its layer, the role, the sizes
Branch = tuple[str, list[Row]]  # a layer's name and the sites in it


def print_tree(title: str, sites: Sequence[Site]) -> None:
    """Draw the sites; each with its role, and its sizes as (in → out)."""
    tree = Tree(Text(title, style="bold"), guide_style="dim")
    for name, rows in _alike(_branches(sites)):
        _add_branch(tree, name, rows)
    Console(width=None if sys.stdout.isatty() else 10_000).print(tree)


def _add_branch(tree: Tree, name: str, rows: list[Row]) -> None:
    """Add a layer with the sites in it. The layer's own site, which has no path, stands beside its name."""
    own = [row for row in rows if row[0] == ""]
    if not own:
        _add_rows(tree.add(Text(name)), rows)
        return
    _, role, sizes = own[0]
    inside = [row for row in rows if row[0] != ""]
    _add_rows(tree.add(_line((name, role, sizes))), inside)


def _add_rows(branch: Tree, rows: list[Row]) -> None:
    """Add the sites of a layer. One whose path continues another's becomes a branch of that one."""
    around = [("", branch)]  # the paths that the last site lies in, the outermost first
    for path, role, sizes in rows:
        while not _lies_in(path, around[-1][0]):
            around.pop()
        outer, node = around[-1]
        shown = path.removeprefix(outer).lstrip(".")
        added = node.add(_line((shown, role, sizes)))
        if path != outer:
            around.append((path, added))


def _lies_in(path: str, outer: str) -> bool:
    """Whether a module is another one or stands in it; the empty path is around all."""
    return outer == "" or f"{path}.".startswith(f"{outer}.")


def _line(row: Row) -> Text:
    path, role, sizes = row
    shown = "" if path in ("", role) else f"{path} "
    return Text.assemble(shown, (role, "bold cyan"), "  ", (sizes, "dim"))


def _branches(sites: Sequence[Site]) -> Iterator[Branch]:
    """What is in no layer by itself, then each layer with the sites in it, in the order of the model."""
    layers: dict[str, list[Site]] = {}
    for site in sites:
        name = site.name if site.layer is None else _layer_name(site, sites)
        layers.setdefault(name, []).append(site)
    for name, inside in layers.items():
        yield name, [_row(site, name) for site in inside]


def _row(site: Site, layer: str) -> Row:
    module = site.name.partition("#")[0]
    path = module.removeprefix(layer).lstrip(".")
    return path, site.role, _sizes(site)


def _layer_name(site: Site, sites: Sequence[Site]) -> str:
    """The name of the layer that a site is in; the site's own where no layer is a site."""
    layers = [s.name for s in sites if s.role == "layer"]
    around = (name for name in layers if _lies_in(site.name, name))
    return next(around, site.name)


def _alike(branches: Iterable[Branch]) -> Iterator[Branch]:
    """Neighbours that differ in nothing but their number as one: `model.layers.0-29`."""
    run: list[Branch] = []
    for name, rows in branches:
        if run and rows and (_stem(name), rows) != (_stem(run[-1][0]), run[-1][1]):
            yield _run_name(run), run[0][1]
            run = []
        run.append((name, rows))
    if run:
        yield _run_name(run), run[0][1]


def _run_name(run: list[Branch]) -> str:
    first, last = run[0][0], run[-1][0].rpartition(".")[2]
    return first if len(run) == 1 else f"{first}-{last}"


def _stem(name: str) -> str:
    """A name without its number at the end; one without a number is like no other, which `#` stands for."""
    stem, dot, end = name.rpartition(".")
    return stem if dot and end.isdecimal() else f"{name}#"


def _sizes(site: Site) -> str:
    """The size of what goes in and of what comes out, or the heads of an attention."""
    if site.kind == "attention":
        return f"{site.heads} heads of {site.head_dim}{_groups(site)}"
    if site.kind in ("linear", "embedding"):
        parts = f" = {' + '.join(site.parts)}" if site.parts else ""
        return f"{site.in_features} → {site.out_features}{parts}"
    if site.kind == "experts":
        return f"{site.experts} times {site.in_features} → {site.out_features}"
    return "" if site.kind == "module" else str(site.out_features)


def _groups(site: Site) -> str:
    """The heads of keys and values, where there are fewer than of queries."""
    if site.kv_heads == site.heads:
        return ""
    return f", {site.kv_heads} of keys and values"
