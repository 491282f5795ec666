r"""Rows of cells between commas (.csv) or tabs (.tsv), the columns' names in the first.

A cell may stand in quotes; then it may hold commas, line ends, and quotes, written twice or, within a line, after a
backslash as Spark and MySQL do. A quote that encloses no cell is text: those of `"Never again` and `5" wide` are. In a
.tsv file lines come before quotes: where every line of a quoted cell would be a row by itself, each is one, and the
quotes are text; unless the header stands in quotes too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from petune.errors import PetuneError
from petune.training.encodings import read_text
from petune.training.table import Table

_NAMES = {",": "commas", "\t": "tabs", ";": "semicolons"}
_QUOTED = r'"([^"]*+(?:""[^"]*+)*+)"'
_ESCAPED = r'"((?:[^"\\\n]|\\.)*+)"'
_WHOLE = re.compile(r"0|-?[1-9][0-9]{0,17}")
_NO_NUMBER = ("", "nan", "NaN")


def read_delimited(path: Path) -> Table:
    """A .csv or .tsv file; one whose header knows another delimiter only, such as Excel's semicolon, by that one.

    A column of nothing but numbers, spelled as Python spells them, becomes numbers, so their spelling comes back. All
    other cells stay the text that they are.

    Raises:
        PetuneError: a row has more or fewer cells than the header, or two columns have one name.
    """
    text = read_text(path)
    delimiter = _delimiter(text, "\t" if path.suffix.lower() == ".tsv" else ",")
    records = list(_Records(path, text, delimiter))
    if not records:
        return Table(str(path), {})
    (first, header), *rows = records
    columns: dict[str, Sequence[Any]] = {}
    for i, name in enumerate(header):
        cells = [row[i] for _, row in rows]
        if not name and not any(cells):
            continue  # delimiters at the end of every line, as spreadsheets leave them
        if name in columns:
            raise PetuneError(
                f"{path} line {first}: two columns are called {name!r}; rename one."
            )
        columns[name] = _typed(cells)
    return Table(str(path), columns, [line for line, _ in rows])


def _delimiter(text: str, usual: str) -> str:
    """What stands between cells: the usual, unless the header has another and not that."""
    header = text.lstrip("\n").partition("\n")[0]
    return next((mark for mark in (usual, *_NAMES) if mark in header), usual)


class _Records:
    """The records of a text, each after the number of its first line; blank ones are passed over."""

    def __init__(self, path: Path, text: str, delimiter: str) -> None:
        self.path, self.text, self.delimiter = path, text, delimiter
        self.width: int | None = None  # cells of the header
        self.by_lines = delimiter == "\t" and not text.lstrip().startswith('"')
        ends, plain = rf"(?=[{delimiter}\n]|\Z)", rf"([^{delimiter}\n]*+)"
        self.cell = re.compile(f"{_QUOTED}{ends}|{_ESCAPED}{ends}|{plain}")

    def __iter__(self) -> Iterator[tuple[int, list[str]]]:
        start, line = 0, 1
        while start < len(self.text):
            end = self._line_end(start)
            if self.text[start:end].strip(self.delimiter + " "):
                cells, end = self._record(start, line)
                self.width = len(cells)
                yield line, cells
            line += self.text.count("\n", start, end) + 1
            start = end + 1

    def _record(self, start: int, line: int) -> tuple[list[str], int]:
        """The cells of the record that begins at `start`, and where it ends."""
        end = self._line_end(start)
        by_line = self.text[start:end].split(self.delimiter)
        fits = self.width in (None, len(by_line))
        if fits and self.text.find('"', start, end) < 0:
            return by_line, end
        by_quotes, last = self._by_quotes(start)
        if self.width in (None, len(by_quotes)) and not (
            fits and self._are_rows(start, last)
        ):
            return by_quotes, last
        if fits:
            return [_unquoted(cell) for cell in by_line], end
        count = f"{len(by_line)} cell{'s' * (len(by_line) != 1)}"
        raise PetuneError(
            f"{self.path}: line {line} has {count} between {_NAMES[self.delimiter]}, the header {self.width}. "
            f"Put a cell that holds one in quotes, or write .jsonl."
        )

    def _by_quotes(self, start: int) -> tuple[list[str], int]:
        """The same, where quoted cells may hold delimiters and line ends."""
        cells: list[str] = []
        while True:
            found = self.cell.match(self.text, start)
            assert found is not None
            cells.append(_text(*found.groups()))
            start = found.end()
            if not self.text.startswith(self.delimiter, start):
                return cells, start
            start += 1

    def _are_rows(self, start: int, end: int) -> bool:
        """Whether lines come before quotes, and each of several here has the cells of a row."""
        lines = self.text[start:end].split("\n")
        if not self.by_lines or len(lines) == 1:
            return False
        return all(line.count(self.delimiter) + 1 == self.width for line in lines)

    def _line_end(self, start: int) -> int:
        found = self.text.find("\n", start)
        return len(self.text) if found < 0 else found


def _text(quoted: str | None, escaped: str | None, plain: str | None) -> str:
    """What a cell says that is written in one of the three ways."""
    if quoted is not None:
        return quoted.replace('""', '"')
    if escaped is not None:
        return re.sub(r'\\(["\\])', r"\1", escaped)
    return plain or ""


def _unquoted(cell: str) -> str:
    found = re.fullmatch(_QUOTED, cell)
    return found[1].replace('""', '"') if found else cell


def _typed(cells: list[str]) -> Sequence[str | float | None]:
    """Numbers where every cell is one, None where one is blank among them; else the cells."""
    numbers: list[float | None] = []
    for cell in cells:
        try:
            numbers.append(None if cell in _NO_NUMBER else _number(cell))
        except ValueError:
            return cells
    return cells if all(number is None for number in numbers) else numbers


def _number(cell: str) -> float:
    """The number that is spelled so.

    Raises:
        ValueError: the number would be spelled otherwise.
    """
    if _WHOLE.fullmatch(cell):
        return int(cell)
    number = float(cell)
    if repr(number) != cell or not math.isfinite(number):
        raise ValueError(cell)
    return number
