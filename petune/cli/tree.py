"""The hook points of a model as a tree: its modules, with the layers that are alike drawn once."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from rich.console import Console
from rich.text import Text
from rich.tree import Tree

from petune.core.frozen.site import Site


class Entry(NamedTuple):
    """One site as a line: where it is in its layer (empty for the layer itself), its role and its sizes."""

    path: str
    role: str
    sizes: str


Branch = tuple[str, list[Entry]]
"""The name of a layer, or of a site outside all layers, and what is in it."""


def print_tree(title: str, sites: Sequence[Site]) -> None:
    """Draw the sites; each with its role, and its sizes as (in → out)."""
    tree = Tree(Text(title, style="bold"), guide_style="dim")
    for name, entries in _alike(_branches(sites)):
        _draw(tree, name, entries)
    Console(width=None if sys.stdout.isatty() else 10_000).print(tree)


def _draw(tree: Tree, name: str, entries: Sequence[Entry]) -> None:
    """Add one branch; a site goes below the site that it lies in."""
    own = next((entry for entry in entries if entry.path == ""), None)
    first = Text(name) if own is None else _line(own._replace(path=name))
    opened = [("", tree.add(first))]
    for entry in entries:
        if entry.path == "":
            continue
        while not _lies_in(entry.path, opened[-1][0]):
            opened.pop()
        outer, node = opened[-1]
        shown = entry.path.removeprefix(outer).lstrip(".")
        added = node.add(_line(entry._replace(path=shown)))
        if entry.path != outer:
            opened.append((entry.path, added))


def _lies_in(path: str, outer: str) -> bool:
    return outer == "" or f"{path}.".startswith(f"{outer}.")


def _line(entry: Entry) -> Text:
    path = "" if entry.path in ("", entry.role) else f"{entry.path} "
    return Text.assemble(path, (entry.role, "bold cyan"), "  ", (entry.sizes, "dim"))


def _branches(sites: Sequence[Site]) -> Iterator[Branch]:
    """What is in no layer by itself, then each layer with the sites in it, in the order of the model."""
    layers: dict[str, list[Site]] = {}
    for site in sites:
        name = site.name if site.layer is None else _layer_name(site, sites)
        layers.setdefault(name, []).append(site)
    for name, inside in layers.items():
        yield name, [_entry(site, name) for site in inside]


def _entry(site: Site, layer: str) -> Entry:
    module = site.name.partition("#")[0]
    return Entry(module.removeprefix(layer).lstrip("."), site.role, _sizes(site))


def _layer_name(site: Site, sites: Sequence[Site]) -> str:
    """The name of the layer around a site; its own where there is none."""
    for other in sites:
        if other.role == "layer" and _lies_in(site.name, other.name):
            return other.name
    return site.name


def _alike(branches: Iterator[Branch]) -> Iterator[Branch]:
    """Neighbours that differ in nothing but their number as one: `model.layers.0-29`."""
    run: list[Branch] = []
    for name, entries in branches:
        if (
            run
            and entries
            and (_stem(name), entries) != (_stem(run[-1][0]), run[-1][1])
        ):
            yield _run_name(run), run[0][1]
            run = []
        run.append((name, entries))
    if run:
        yield _run_name(run), run[0][1]


def _run_name(run: Sequence[Branch]) -> str:
    first, last = run[0][0], run[-1][0].rpartition(".")[2]
    return first if len(run) == 1 else f"{first}-{last}"


def _stem(name: str) -> str:
    """The name without its number; a name without a number is like no other."""
    stem = re.sub(r"\.\d+$", "", name)
    return f"{name}#" if stem == name else stem


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
