"""`python -m petune_bench.coverage --out FOLDER [ARCHITECTURE …]`: see `petune_bench.coverage`."""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import time
import warnings
from collections.abc import Iterator
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from petune.plugins import registry

LIMIT = 600.0
"""Seconds that one architecture may take."""


def main() -> None:
    """Run the cells and write `coverage.jsonl` and `coverage.md`."""
    parser = argparse.ArgumentParser(prog="petune_bench.coverage", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the folder for coverage.jsonl and coverage.md")
    parser.add_argument("architectures", nargs="*", help="model types; all that transformers maps by default")
    options = parser.parse_args()
    from petune_bench.coverage.tiny import architectures

    import_module("petune_bench.coverage.checks")  # once, before the processes fork
    registry().all("petune_sites")
    known = architectures()
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / "coverage.jsonl").open("w", encoding="utf-8") as file:
        for kind in options.architectures or known:
            for row in _apart(kind, known[kind]):
                print(json.dumps(row), file=file, flush=True)


def _apart(kind: str, heads: dict[str, str]) -> Iterator[dict[str, Any]]:
    """The rows of one architecture, from a process of its own: a crash or a hang ends only that."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_work, args=(kind, heads, theirs))
    start = time.monotonic()
    process.start()
    theirs.close()
    left = [(head, method) for head in heads for method in _methods()]
    try:
        while left and ours.poll(max(0.0, LIMIT - time.monotonic() + start)):
            row = ours.recv()
            left = [c for c in left if c != (row["head"], row["method"])]
            yield row
    except EOFError:
        pass
    process.kill()
    process.join()
    why = "it crashed" if time.monotonic() - start < LIMIT else f"it took more than {LIMIT:.0f} seconds"
    for head, method in left:
        yield {"architecture": kind, "head": head, "method": method, "status": "fails", "reason": why}


def _methods() -> list[str]:
    from petune_bench.coverage.checks import METHODS

    return list(METHODS)


def _work(kind: str, heads: dict[str, str], out: Connection) -> None:
    import torch

    import petune
    from petune_bench.coverage import checks, tiny

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    for head, name in heads.items():
        model, trouble = None, ""
        for method in checks.METHODS:
            row = {"architecture": kind, "head": head, "method": method}
            try:
                model = model or tiny.build(kind, head, name)
                inputs = tiny.batch(model)
                checks.repeatable(model, inputs)
            except Exception as error:
                trouble = trouble or f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            if trouble:
                out.send({**row, "status": "not built", "reason": trouble})
                continue
            try:
                checks.cell(model, inputs, method)
                out.send({**row, "status": "holds", "reason": ""})
            except petune.UnsupportedError as reason:
                out.send({**row, "status": "refused", "reason": str(reason)})
            except Exception as error:
                model = None  # it may be left half changed
                out.send({**row, "status": "fails", "reason": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"})


if __name__ == "__main__":
    main()
