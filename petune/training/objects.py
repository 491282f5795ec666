"""Rows that are JSON objects: one a line, or a list of them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from petune.errors import PetuneError
from petune.training.encodings import read_text
from petune.training.table import Table

_SPACE = re.compile(r"\s*")
_MOST_DIGITS = 4000  # Python refuses to read or write whole numbers a little longer


def read_objects(path: Path) -> Table:
    """A .jsonl or .json file; either may hold what the other should.

    Raises:
        PetuneError: something in it is no JSON object; the message names the line.
    """
    text = read_text(path)
    start = len(text) - len(text.lstrip())
    if text.startswith("[", start):
        found = list(_elements(path, text, start + 1))
    else:
        if path.suffix.lower() == ".json":
            _check_several(path, text, start)
        found = list(_lines(path, text))
    rows = [row for row, _ in found]
    return Table.of_rows(str(path), rows, [line for _, line in found])


def _check_several(path: Path, text: str, start: int) -> None:
    """Refuse a text that is one object: rows are several."""
    if text[start:] and not text[_decoded(path, text, start)[1] :].strip():
        raise PetuneError(
            f"{path}: a .json file is a list of objects; put one object a line into a .jsonl file."
        )


def _lines(path: Path, text: str) -> Iterator[tuple[dict[str, Any], int]]:
    """The object of each line that is not blank, and the line's number."""
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        row, end = _decoded(path, line.strip(), 0, number)
        if line.strip()[end:]:
            raise PetuneError(
                f"{path} line {number}: more than one value; put one object a line."
            )
        if not isinstance(row, dict):
            raise PetuneError(
                f'{path} line {number}: each line is an object, such as {{"text": …}}.'
            )
        yield row, number


def _elements(
    path: Path, text: str, start: int
) -> Iterator[tuple[dict[str, Any], int]]:
    """The objects of the list that is open before `start`, each with the line on which it begins."""
    position, line, counted = _after_space(text, start), 1, 0
    while not text.startswith("]", position):
        line, counted = line + text.count("\n", counted, position), position
        row, position = _decoded(path, text, position)
        if not isinstance(row, dict):
            raise PetuneError(
                f'{path} line {line}: each row is an object, such as {{"text": …}}.'
            )
        yield row, line
        position = _after_space(text, position)
        if text.startswith(",", position):
            position = _after_space(text, position + 1)
        elif not text.startswith("]", position):
            raise PetuneError(
                f"{path} line {_line(text, position)}: no ',' or ']' after a row."
            )
    if rest := text[position + 1 :].strip():
        raise PetuneError(
            f"{path} line {_line(text, text.rindex(rest))}: more after the list of rows."
        )


def _after_space(text: str, position: int) -> int:
    found = _SPACE.match(text, position)
    return found.end() if found else position


def _line(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1


def _decoded(path: Path, text: str, start: int, first: int = 1) -> tuple[Any, int]:
    """The JSON value that begins at `start`, and where it ends. The text's own first line is the file's `first`."""
    line = first - 1 + _line(text, start)
    try:
        return _DECODER.raw_decode(text, start)
    except json.JSONDecodeError as error:
        line, reason = first - 1 + error.lineno, f"{error.msg} (column {error.colno})"
    except RecursionError:
        reason = "brackets within brackets, too many to be a row"
    except ValueError as error:
        reason = str(error)
    raise PetuneError(f"{path} line {line}: {reason}.")


class _Spelled(float):
    """A number that is written as its file has it: a price of 1.10 is no 1.1."""

    digits: str

    def __str__(self) -> str:
        return self.digits


def _fraction(digits: str) -> float:
    if repr(float(digits)) == digits:
        return float(digits)
    number = _Spelled(digits)
    number.digits = digits
    return number


def _whole(digits: str) -> int | str:
    return int(digits) if len(digits) < _MOST_DIGITS else digits


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object, whose keys must differ: of two equal ones a reader would drop the first."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} is given twice")
        found[key] = value
    return found


_DECODER = json.JSONDecoder(
    object_pairs_hook=_object,
    parse_float=_fraction,
    parse_int=_whole,
    parse_constant=_fraction,  # Infinity and NaN, which JSON has not but Python writes
)
