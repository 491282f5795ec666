"""Hyperparameters by site: each may have other values where the user says so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
    given = part.arguments
    own = given.keys() & arguments(part.cls).keys()
    patterns = [Pattern(name, given[name] or {}) for name in given.keys() - own]
    meant = [pattern.by_site(sites) for pattern in patterns]
    found = []
    for site in sites:
        here = {name: given[name] for name in own}
        for values in meant:
            here.update(values.get(site.name, {}))
        found.append(here)
    return found


@dataclass(frozen=True)
class Pattern:
    """Values of a hyperparameter where words of a `where` say: `rank_pattern={"q": 4}`.

    Args:
        name: the argument, which ends in `_pattern`.
        values: by word. Of two that mean a site the first one counts.
    """

    name: str
    values: Mapping[str, Any]

    def by_site(self, sites: Sequence[Site]) -> dict[str, dict[str, Any]]:
        """For each site that a word means, by its name, the argument and its value."""
        argument = self.name.removesuffix(PATTERN)
        found: dict[str, dict[str, Any]] = {}
        for word in reversed(list(self.values)):
            meant = self._meant(word, sites)
            found.update((name, {argument: self.values[word]}) for name in meant)
        return found

    def _meant(self, word: str, sites: Sequence[Site]) -> list[str]:
        """The names of the sites that a word means."""
        try:
            return [site.name for site in select(list(sites), word)]
        except PetuneError:
            first = sites[0]
            some = f"a role (such as {first.role}) or a name ({first.name})"
            what = f"{self.name}: {word!r} matches none of the sites adapted"
            raise PetuneError(f"{what}; it takes {some}.") from None
