"""A built-in data set: where its files are, how they become rows, and the one split that every method gets."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from petune.errors import PetuneError
from petune.loading.fetch import Source, fetch

if TYPE_CHECKING:
    import datasets

Row = dict[str, Any]


@dataclass(frozen=True)
class Dataset:
    """What a data set plugin brings.

    `columns` says which column plays which of the task's roles, the input first, such as
    `{"text": "text", "label": "label"}`. `read` turns the fetched file or folder into rows.
    """

    task: str
    columns: Mapping[str, str]
    source: Source
    read: Callable[[Path], Iterable[Row]]

    def rows(self) -> list[Row]:
        """Every row, in the order of the file.

        Raises:
            PetuneError: the files can't be had, or are not what `read` expects.
        """
        path = fetch(self.source)
        try:
            return list(self.read(path))
        except (OSError, ValueError, LookupError) as error:
            raise PetuneError(
                f"{path}: {type(error).__name__}: {error}. Delete {path.parent} to fetch it again."
            ) from error

    def splits(self, seed: int = 0) -> dict[str, datasets.Dataset]:
        """`test` (a fifth), `validation` (a tenth) and `train` (the rest), the same on every machine.

        Raises:
            PetuneError: as for `rows`.
        """
        from datasets import Dataset as Table

        rows = shuffled(self.rows(), next(iter(self.columns.values())), seed)
        fifth, tenth = len(rows) // 5, len(rows) // 10
        cut = {
            "train": rows[fifth + tenth :],
            "validation": rows[fifth : fifth + tenth],
            "test": rows[:fifth],
        }
        return {split: Table.from_list(part) for split, part in cut.items()}


def shuffled(rows: Iterable[Row], column: str, seed: int = 0) -> list[Row]:
    """By the sha256 of `seed` and the input: no library's generator is asked, and equal inputs stay together.

    So a sentence that stands in the file twice is not in two splits, unless a border falls between the two.
    """
    return sorted(
        rows,
        key=lambda row: sha256(f"{seed} {json.dumps(row[column])}".encode()).digest(),
    )
