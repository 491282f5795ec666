"""Runs the cells, an architecture a process, and writes `coverage.jsonl` and `coverage.md`."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import time
import warnings
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

import petune
from petune.core.registry.plugins import registry
from petune_bench.coverage import checks, report, tiny
from petune_bench.options import Parser

LIMIT = 600.0
"""Seconds that one architecture may take."""
Cell = tuple[str, str]


def main() -> None:
    """Run the sweep."""
    parser = Parser(prog="python -m petune_bench.coverage", description=__doc__)
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="the folder for coverage.jsonl and coverage.md",
    )
    parser.add_argument(
        "architectures",
        nargs="*",
        help="model types to run again, the others stay; all by default",
    )
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    registry().all("petune_sites")  # once, before the processes fork
    known = tiny.architectures()
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "coverage.jsonl"
    again = options.architectures or list(known)
    old = (
        [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        if file.exists()
        else []
    )
    found = [row for row in old if row["architecture"] not in again]
    for kind in again:
        found += apart(kind, known[kind])
        found.sort(key=lambda row: str(row["architecture"]))
        file.write_text(
            "".join(json.dumps(row) + "\n" for row in found), encoding="utf-8"
        )
    (options.out / "coverage.md").write_text(report.page(found), encoding="utf-8")


def apart(kind: str, heads: dict[str, str]) -> Iterator[dict[str, Any]]:
    """The rows of one architecture, from a process of its own: a crash or a hang ends only that."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(
        target=_work, args=(kind, heads, theirs)
    )
    start = time.monotonic()
    process.start()
    theirs.close()
    left = [(head, method) for head in heads for method in checks.METHODS]
    try:
        while left and ours.poll(max(0.0, LIMIT - time.monotonic() + start)):
            row = ours.recv()
            left.remove((row["head"], row["method"]))
            yield row
    except EOFError:
        pass
    late = time.monotonic() - start > LIMIT
    process.kill()
    process.join()
    for cell in left:
        yield _row(
            kind,
            cell,
            "fails",
            f"it took more than {LIMIT:.0f} seconds" if late else "the process died",
        )


def _work(kind: str, heads: dict[str, str], out: Connection) -> None:
    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    for head, name in heads.items():
        for row in rows(kind, head, name):
            out.send(row)


def rows(kind: str, head: str, name: str) -> Iterator[dict[str, Any]]:
    """The rows of one architecture with one head."""
    cells = [(head, method) for method in checks.METHODS]
    try:
        model = tiny.build(kind, head, name)
        inputs = tiny.batch(model)
        checks.repeatable(model, inputs)
    except Exception as error:
        yield from (_row(kind, cell, "not built", _said(error)) for cell in cells)
        return
    for cell in cells:
        try:
            checks.cell(model, inputs, cell[1])
            yield _row(kind, cell, "holds", "")
        except petune.UnsupportedError as reason:
            yield _row(kind, cell, "refused", str(reason))
        except Exception as error:
            yield _row(kind, cell, "fails", _said(error))
            model = tiny.build(kind, head, name)  # it may have been left half changed


def _row(kind: str, cell: Cell, status: str, reason: str) -> dict[str, Any]:
    return {
        "architecture": kind,
        "head": cell[0],
        "method": cell[1],
        "status": status,
        "reason": reason,
    }


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


if __name__ == "__main__":
    main()
