"""results.jsonl: one row a cell and seed, only ever appended to."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from petune.errors import PetuneError
from petune.training.result import finite
from petune_bench.cell import Row

FILE = "results.jsonl"


def read(out: Path) -> list[Row]:
    """All rows, oldest first; half a line that a crash left is passed over.

    Raises:
        PetuneError: a line in the middle is no row.
    """
    path = out / FILE
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    rows: list[Row] = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            row["cell"], row["seed"], row["status"]
        except (ValueError, LookupError, TypeError):
            if number == len(lines):
                break
            where = f"{path} line {number}"
            raise PetuneError(
                f"{where}: not a row of petune's; mend it, or start anew with --fresh."
            ) from None
        rows.append(row)
    return rows


def append(out: Path, row: Row) -> None:
    """One write of one whole line, on the disk before it returns."""
    path = out / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(finite(row), ensure_ascii=False, default=str) + "\n"
    with path.open("ab+") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)  # half a line is what a crash left
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())


def current(rows: Sequence[Row], configurations: Mapping[str, str]) -> list[Row]:
    """The last row of each cell and seed, of the cell's configuration: the one given, else its latest."""
    latest = {
        row["cell"]: row["environment"].get("configuration") for row in rows
    } | dict(configurations)
    chosen = {
        (row["cell"], row["seed"]): row
        for row in rows
        if row["environment"].get("configuration") == latest[row["cell"]]
    }
    return list(chosen.values())
