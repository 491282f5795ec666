"""The places of a model where a method may act, and how a user or a method picks among them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import Tensor

from petune.core.frozen.site import FUSED, KIND_OF, Site
from petune.errors import PetuneError, UnsupportedError, unknown

WHY = {
    "attention": "it has no softmax attention over keys and values, or none that petune can stand around",
    "prompt": "it can't take more embeddings than tokens",
    "embedding": "it has no single table of input embeddings",
}
"""Why a model has no site of a kind."""


def select(sites: list[Site], where: str, *, strict: bool = True) -> list[Site]:
    """The sites that `where` picks, in the model's order.

    `where` is a list of words: a role (`q`), the end of a name or a pattern (`q_proj`, `*.layers.?.mlp.*`), each
    with an optional range of layers (`q@4:`, `down@-2:`). Roles inside a fused projection pick their part of it;
    all of them together pick it whole.

    Args:
        strict: a word that picks nothing is an error; for a method's own default it is not.

    Raises:
        PetuneError: a word picked nothing (strict).
        UnsupportedError: the model has nothing of the kind.
    """
    picked: dict[str, Site] = {}
    words = where.split()
    for word in words:
        hits = list(_hits(sites, word, words))
        if not hits and strict:
            known = {s.role for s in sites} | {p for s in sites for p in s.parts}
            raise PetuneError(
                f"where={where!r} matches no site: " + unknown("role or name", word, known)
            )
        picked |= {s.name: s for s in hits}
    if not picked:
        reasons = "; ".join(dict.fromkeys(WHY[k] for k in map(KIND_OF.get, words) if k in WHY))
        raise UnsupportedError(
            f"this model has no site for {where!r}: {reasons or '`petune sites MODEL` shows its sites'}."
        )
    order = {s.name: i for i, s in enumerate(sites)}
    return sorted(picked.values(), key=lambda s: order[s.name.partition("[")[0]])


def _hits(sites: list[Site], word: str, words: list[str]) -> Iterable[Site]:
    what, _, layers = word.partition("@")
    depth: dict[str, int] = {}
    for site in sites if layers else []:
        depth[_stack(site)] = max(depth.get(_stack(site), 0), 1 + (site.layer or 0))
    for site in sites:
        if layers and (
            site.layer is None or site.layer not in _range(layers, depth[_stack(site)], word)
        ):
            continue
        if what == site.role:
            yield site
        elif what in FUSED.get(site.role, ()):
            together = {w for w in (x.partition("@")[0] for x in words) if w in FUSED[site.role]}
            whole = (
                site.role in words
                or len(together) == len(FUSED[site.role])
                or what not in site.parts
            )
            yield site if whole else _part(site, what)
        elif what not in KIND_OF and site.kind in ("linear", "block") and _named(site, what):
            yield site


def _named(site: Site, what: str) -> bool:
    return site.name.endswith("." + what) or fnmatchcase(site.name, what)


def _part(site: Site, role: str) -> Site:
    part = site.parts[role]
    if isinstance(part, slice):
        part = slice(*part.indices(site.out_features))  # an end may be left open
    width = len(part) if isinstance(part, Tensor) else part.stop - part.start
    return dataclasses.replace(
        site, name=f"{site.name}[{role}]", role=role, out_features=width, part=part, parts={}
    )


def _stack(site: Site) -> str:
    """`model.layers.3.mlp` and `model.layers.4.mlp` are of one stack."""
    return re.split(r"\.\d+(?:\.|$)", site.name)[0]


def _range(text: str, depth: int, word: str) -> range:
    try:
        start, colon, stop = text.partition(":")
        bounds = slice(int(start) if start else None, int(stop) if stop else None)
        if not colon:
            bounds = slice(int(text), int(text) + 1 or None)
    except ValueError:
        raise PetuneError(
            f"where: {word!r}: layers are written 3, 2:5, 4: or -2:, not {text!r}."
        ) from None
    return range(depth)[bounds]
