"""The rows of a source as it has them, before anyone says what they are for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import datasets


@dataclass(frozen=True)
class Table:
    """Columns by name, each with a value a row, None where the row has none.

    Args:
        source: what errors call it, such as its file.
        columns: values of any type, in the order of the rows; the types of one column may differ.
        lines: the line of the file on which each row begins, if it has lines.
    """

    source: str
    columns: Mapping[str, Sequence[Any]]
    lines: Sequence[int] = ()

    @classmethod
    def of_rows(
        cls, source: str, rows: Sequence[Mapping[str, Any]], lines: Sequence[int] = ()
    ) -> Table:
        """From rows, which need not have the same keys."""
        names = dict.fromkeys(name for row in rows for name in row)
        columns = {name: [row.get(name) for row in rows] for name in names}
        return cls(source, columns, lines)

    @classmethod
    def of_dataset(cls, source: str, rows: datasets.Dataset) -> Table:
        """From a data set of the datasets package; its columns are read when asked for."""
        return cls(source, {name: rows[name] for name in rows.column_names})

    def __len__(self) -> int:
        return max(map(len, self.columns.values()), default=0)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for values in zip(*self.columns.values(), strict=True):
            yield dict(zip(self.columns, values, strict=True))

    def place(self, index: int) -> str:
        """How a person finds a row: `row 3`, or `row 3 (line 4)` where the two differ."""
        row = index + 1
        if self.lines and self.lines[index] != row:
            return f"row {row} (line {self.lines[index]})"
        return f"row {row}"
