"""From a source's columns to those that a task asks for, under the names of their roles and each of one type."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from petune.errors import PetuneError, unknown
from petune.training.remarks import remark
from petune.training.table import Table
from petune.training.values import alike, is_missing

if TYPE_CHECKING:
    import datasets

Reads = Mapping[str, Callable[[Any], Any]]
"""By role, what makes of a cell the value that the task works with, or raises a ValueError that says why not."""


def assign(
    rows: Table | datasets.Dataset,
    columns: Mapping[str, str],
    roles: Iterable[str],
    optional: Iterable[str] = (),
    reads: Reads | None = None,
    *,
    source: str = "",
) -> datasets.Dataset:
    """The columns that play the roles, under the roles' names, and nothing else.

    Args:
        reads: roles without one keep their cells as they are.
        source: what errors call the rows; a table's own name unless given.

    Raises:
        PetuneError: a role has no column, or a cell is nothing that the role can be; the message names the source,
            the column and the row.
    """
    from datasets import Dataset

    table = rows if isinstance(rows, Table) else Table.of_dataset(source, rows)
    source = source or table.source
    given = [role for role in optional if role in columns or role in table.columns]
    chosen = {role: columns.get(role, role) for role in (*roles, *given)}
    _check_there(table, chosen, columns, source)
    _check_apart(chosen, source)
    read = {}
    for role, column in chosen.items():
        read[role] = _read(table, column, (reads or {}).get(role), source)
    return Dataset.from_dict(read)


def _check_there(
    table: Table, chosen: Mapping[str, str], columns: Mapping[str, str], source: str
) -> None:
    """Refuse a role without a column; the message names the nearest."""
    for role, column in chosen.items():
        if column not in table.columns:
            missing = unknown("column", column, table.columns)
            hint = f"Say which plays {role!r}: columns: {{{role}: …}}."
            if role in columns:
                hint = f"It plays {role!r}."
            raise PetuneError(f"{source}: {missing} {hint}")


def _check_apart(chosen: Mapping[str, str], source: str) -> None:
    """Refuse a column that plays two roles."""
    columns = list(chosen.values())
    for column in columns:
        if columns.count(column) > 1:
            raise PetuneError(
                f"{source}: column {column!r} can't play two roles ({', '.join(chosen)})."
            )


def _read(
    table: Table, column: str, read: Callable[[Any], Any] | None, source: str
) -> Any:
    """A column's values as the role reads them, as an array of Arrow."""
    import pyarrow

    values = list(table.columns[column])
    _check_filled(table, column, values, source)
    for index, value in enumerate(values):
        try:
            values[index] = read(value) if read else value
        except ValueError as error:
            where = f"column {column!r}, {table.place(index)}"
            raise PetuneError(f"{source}: {where}: {error}") from None
    if read:
        _tell_of_blanks(table, column, values, source)
    try:
        return pyarrow.array(alike(values))
    except (pyarrow.ArrowException, OverflowError) as error:
        # a task of a plugin that says nothing of its cells' types
        raise PetuneError(
            f"{source}: column {column!r}: its values are of several kinds ({error})."
        ) from error


def _tell_of_blanks(table: Table, column: str, values: list[Any], source: str) -> None:
    """Say how many texts are empty: they may be meant, or left out by mistake."""
    blanks = [i for i, value in enumerate(values) if value in ("", [""])]
    if blanks:
        remark(
            f"{source}: column {column!r} is an empty text in {len(blanks)} of {len(values)} rows; "
            f"{table.place(blanks[0])} is the first."
        )


def _check_filled(table: Table, column: str, values: list[Any], source: str) -> None:
    """Refuse a column with holes; the message says how many and where the first is."""
    holes = [index for index, value in enumerate(values) if is_missing(value)]
    if holes:
        first = table.place(holes[0])
        raise PetuneError(
            f"{source}: column {column!r} is empty in {len(holes)} rows; {first} is the first. "
            f"Fill it in, leave such rows out, or name another split."
        )
