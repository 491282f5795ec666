"""Which tuning serves each row of a batch."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import chain, repeat
from typing import Any

import torch
from torch import Tensor

from petune.core.forward.link import Link
from petune.errors import PetuneError

Index = Tensor | slice
"""Some rows of a batch; a slice where they follow each other, so that taking them copies nothing."""


@dataclass(frozen=True)
class Group:
    """Rows that one tuning serves: its links at a site, none for the rows that are left to the base."""

    links: list[Link]
    index: Index


@dataclass(frozen=True)
class Split:
    """A batch by what serves its rows.

    Args:
        groups: the rows of each tuning that acts at the site, and those of the base.
        back: the permutation that puts the groups' concatenated results in the batch's order; None if they are.
    """

    groups: list[Group]
    back: Tensor | None

    def joined(self, results: list[Tensor]) -> Tensor:
        """The groups' results, in the order of `groups`, as one batch."""
        out = torch.cat(results)
        return out if self.back is None else out[self.back]


class Plan:
    """The tuning of each row. Rows are grouped once for each set of tunings that meet at a site, not once a layer.

    Args:
        names: a name for each row, None for the base.
        beams: within `generate` each row stands as often as there are beams.
    """

    def __init__(self, names: Sequence[str | None], beams: int = 1) -> None:
        self.names = list(names)
        self.beams = beams
        self.by_row = _repeated(self.names, beams)
        self.served = [name for name in dict.fromkeys(self.names) if name is not None]
        self._rows: dict[Any, Rows] = {}

    def with_beams(self, beams: int) -> Plan:
        """The plan of a batch that holds each row `beams` times over, one after another."""
        return Plan(self.names, beams)

    def check(self, batch: int) -> None:
        """See that a batch of this size has one row for each name and beam.

        Raises:
            PetuneError: it has not.
        """
        if batch != len(self.by_row):
            raise PetuneError(
                f"route(): {len(self.names)} names for a batch of {batch} rows."
            )

    def split(self, links: list[Link], batch: int, device: torch.device) -> Split:
        """The rows of a batch by what serves them among the links that meet at a site.

        Args:
            batch: the size of what comes to the site, where a row may stand several times: its tokens, flattened.
        """
        by_name: dict[str | None, list[Link]] = {}
        for link in links:
            by_name.setdefault(link.tuning.name, []).append(link)
        key = (tuple(by_name), batch, device)
        if key not in self._rows:
            self._rows[key] = self._grouped(by_name.keys(), batch, device)
        rows = self._rows[key]
        groups = [Group(by_name.get(name, []), index) for name, index in rows.of_each]
        return Split(groups, rows.back)

    def _grouped(
        self, here: Collection[str | None], batch: int, device: torch.device
    ) -> Rows:
        times, left = divmod(batch, len(self.by_row))
        if left or not times:
            self.check(batch)
        rows_of: dict[str | None, list[int]] = {}
        for row, name in enumerate(_repeated(self.by_row, times)):
            served = name if name in here else None
            rows_of.setdefault(served, []).append(row)
        order = torch.tensor(list(chain.from_iterable(rows_of.values())))
        in_order = bool((order.diff() == 1).all())
        back = None if in_order else order.argsort().to(device)
        return Rows(
            [(name, _index(rows, device)) for name, rows in rows_of.items()], back
        )


@dataclass(frozen=True)
class Rows:
    """The rows that each tuning serves, None being the base, and the permutation that puts results back in order."""

    of_each: list[tuple[str | None, Index]]
    back: Tensor | None


def _repeated(names: Sequence[str | None], times: int) -> list[str | None]:
    """Each name `times` times, one after another."""
    return list(chain.from_iterable(repeat(name, times) for name in names))


def _index(rows: list[int], device: torch.device) -> Index:
    first, last = rows[0], rows[-1]
    if rows == list(range(first, last + 1)):
        return slice(first, last + 1)
    return torch.tensor(rows, dtype=torch.long, device=device)
