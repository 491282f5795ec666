"""Which tuning serves each row of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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
        self._splits: dict[Any, tuple[list[tuple[str | None, Index]], Tensor | None]] = {}

    def with_beams(self, beams: int) -> Plan:
        """The plan of a batch that holds each row `beams` times over, one after another."""
        return Plan(self.names, beams)

    def by_row(self, batch: int) -> list[str | None]:
        """A name for each row of a batch of this size.

        Raises:
            PetuneError: the batch does not have one row a name (and beam).
        """
        wanted = len(self.names) * self.beams
        if batch != wanted:
            raise PetuneError(
                f"route(): {len(self.names)} names for a batch of {batch // self.beams} rows."
            )
        return [name for name in self.names for _ in range(self.beams)]

    def split(self, links: list[Link], batch: int, device: torch.device) -> Split:
        """The rows of a batch by what serves them among the links that meet at a site."""
        by_name: dict[str, list[Link]] = {}
        for link in links:
            by_name.setdefault(link.tuning.name, []).append(link)
        key = (tuple(by_name), batch, device)
        if key not in self._splits:
            self._splits[key] = self._grouped(set(by_name), batch, device)
        groups, back = self._splits[key]
        return Split([Group(by_name.get(name or "", []), index) for name, index in groups], back)

    def _grouped(
        self, here: set[str], batch: int, device: torch.device
    ) -> tuple[list[tuple[str | None, Index]], Tensor | None]:
        rows_of: dict[str | None, list[int]] = {}
        for row, name in enumerate(self._names_of(batch)):
            served = name if name in here else None
            rows_of.setdefault(served, []).append(row)
        order = torch.tensor([row for rows in rows_of.values() for row in rows], dtype=torch.long)
        in_order = bool((order.diff() == 1).all())
        back = None if in_order else order.argsort().to(device)
        return [(name, _index(rows, device)) for name, rows in rows_of.items()], back

    def _names_of(self, batch: int) -> list[str | None]:
        """The names by row at a site, where each row may stand several times (tokens that are flattened into it)."""
        names = self.by_row(len(self.names) * self.beams)
        times, left = divmod(batch, len(names))
        if left or not times:
            raise PetuneError(f"route(): {len(self.names)} names for a batch of {batch} rows.")
        return [name for name in names for _ in range(times)]


def _index(rows: list[int], device: torch.device) -> Index:
    if rows == list(range(rows[0], rows[-1] + 1)):
        return slice(rows[0], rows[-1] + 1)
    return torch.tensor(rows, dtype=torch.long, device=device)
