"""What the kit found, a row for each behaviour, and the reasons of what does not hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

HOLDS, FAILS, REFUSED = "✓✗–"


@dataclass(frozen=True)
class Row:
    """One behaviour on one family at one precision: it holds, fails with an error, or is refused for a reason."""

    behaviour: str
    family: str
    precision: str
    error: str | None = None
    refused: str | None = None

    @property
    def mark(self) -> str:
        """How tables show it."""
        if self.error:
            return FAILS
        return REFUSED if self.refused else HOLDS

    @property
    def why(self) -> str:
        """In one line why it does not hold; empty if it does."""
        return " ".join((self.error or self.refused or "").split())


def reasons(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """What does not hold, a line each, and the rows that it is about: `bert, t5: routing: <why>`."""
    found: dict[tuple[str, str], list[Row]] = {}
    for alike in _by_family_and_reason(rows):
        what = _behaviours(alike, rows)
        found.setdefault((what, alike[0].why), []).extend(alike)
    lines = {}
    for (what, why), about in found.items():
        families = dict.fromkeys(row.family for row in about)
        lines[f"{', '.join(families)}: {what}: {why}"] = about
    return lines


def _by_family_and_reason(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows that don't hold, those of one family and one reason together."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.why:
            found.setdefault((row.family, row.why), []).append(row)
    return list(found.values())


def _behaviours(alike: Sequence[Row], rows: Sequence[Row]) -> str:
    """The behaviours of these rows of one family, or `everything` if they are all that the family has among `rows`."""
    family = alike[0].family
    every = {row.behaviour for row in rows if row.family == family}
    some = list(dict.fromkeys(row.behaviour for row in alike))
    return "everything" if set(some) == every else ", ".join(some)
