"""Hyperparameters by site: each may have other values where the user says so."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from petune.core.attached.parts import Part
from petune.core.frozen.site import Site
from petune.core.frozen.where import select
from petune.core.method.arguments import PATTERN, arguments
from petune.errors import PetuneError


def arguments_at(sites: Sequence[Site], part: Part) -> list[dict[str, Any]]:
    """The arguments of a method for each of its sites.

    Raises:
        PetuneError: a word of a pattern means none of the sites.
    """
    known = arguments(part.cls)
    plain = {name: value for name, value in part.arguments.items() if name in known}
    found = [dict(plain) for _ in sites]
    for name, pattern in part.arguments.items():
        if name not in known and pattern is not None:
            _apply(name, pattern, sites, found)
    return found


def _apply(
    name: str,
    pattern: dict[str, Any],
    sites: Sequence[Site],
    found: list[dict[str, Any]],
) -> None:
    """Set what a pattern says; of two words that mean a site the first one counts."""
    argument = name.removesuffix(PATTERN)
    for word, value in reversed(pattern.items()):
        for i in _meant(name, word, sites):
            found[i][argument] = value


def _meant(name: str, word: str, sites: Sequence[Site]) -> list[int]:
    """The numbers of the sites that a word of a pattern means."""
    same = [i for i, site in enumerate(sites) if word in (site.role, site.name)]
    if same:
        return same
    try:
        names = {site.name for site in select(list(sites), word)}
    except PetuneError:
        some = f"a role (such as {sites[0].role}) or a name ({sites[0].name})"
        raise PetuneError(
            f"{name}: {word!r} matches none of the sites adapted; it takes {some}."
        ) from None
    return [i for i, site in enumerate(sites) if site.name in names]
