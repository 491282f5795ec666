"""The rows of one file: .jsonl, .json, .csv, .tsv or .parquet."""

from __future__ import annotations

import json
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from petune.errors import PetuneError, unknown

if TYPE_CHECKING:
    import datasets
    import pyarrow


def read_rows(path: str | Path) -> datasets.Dataset:
    """The rows of one file; the kind is told by its ending.

    Raises:
        PetuneError: no such file, an ending that is not known, or content that is not what the ending says.
    """
    from datasets import Dataset

    path = existing(path)
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise PetuneError(f"{path}: {unknown('kind of file', path.suffix, READERS)}")
    try:
        found = reader(path)
        rows = Dataset.from_list(found) if isinstance(found, list) else Dataset(found)
    except PetuneError:
        raise
    except Exception as error:
        # pyarrow's own errors share no base class with one another
        raise PetuneError(f"{path}: {one_line(error)}") from error
    if not len(rows):
        raise PetuneError(f"{path}: no rows.")
    return rows


def existing(path: str | Path) -> Path:
    """The path of a file or a folder that is there.

    Raises:
        PetuneError: it is not; the message names the nearest beside it.
    """
    path = Path(path).expanduser()
    if not path.exists():
        siblings = (
            [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        )
        near = get_close_matches(path.name, siblings, n=1)
        hint = f" Did you mean {path.parent / near[0]}?" if near else ""
        raise PetuneError(f"{path}: no such file.{hint}")
    return path


def one_line(error: Exception) -> str:
    """What an error says, in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def _jsonl(path: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise PetuneError(f"{path} line {number}: {error.msg}.") from None
        if not isinstance(row, dict):
            raise PetuneError(
                f'{path} line {number}: each line is an object, such as {{"text": …}}.'
            )
        rows.append(row)
    return rows


def _json(path: Path) -> list[dict[str, Any]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # one object a line, under the other ending
            return _jsonl(path)
        raise PetuneError(f"{path} line {error.lineno}: {error.msg}.") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise PetuneError(
            f"{path}: a .json file is a list of objects; put one object a line into a .jsonl file."
        )
    return rows


def _csv(path: Path, delimiter: str = ",") -> pyarrow.Table:
    from pyarrow import csv

    parse = csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
    return csv.read_csv(path, parse_options=parse)


def _parquet(path: Path) -> pyarrow.Table:
    from pyarrow import parquet

    return parquet.read_table(path)


READERS: dict[str, Callable[[Path], Any]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": lambda path: _csv(path, "\t"),
    ".parquet": _parquet,
}
