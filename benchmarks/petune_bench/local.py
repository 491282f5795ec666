"""Cells one after the other on this machine, each in a process of its own: a crash or a full memory ends only one."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

from petune_bench.cell import Cell, Row, measure

POLL = 0.3  # seconds between looks at how far a cell is


def context() -> BaseContext:
    """A server that has imported torch once and forks a child for each cell; fresh processes beside a GPU.

    An import may already touch a GPU's driver, and a fork of that cannot use it.
    """
    gpu = any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/kfd"))
    if (
        gpu
        or "forkserver" not in multiprocessing.get_all_start_methods()
        or sys.platform == "darwin"
    ):
        return multiprocessing.get_context("spawn")
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["petune_bench.preload"])
    return found


def warm_up() -> None:
    """Let the server import while the suite is being checked."""
    if context().get_start_method() == "forkserver":
        from multiprocessing.forkserver import ensure_running

        ensure_running()


def run(
    cells: Iterable[Cell], started: Callable[[Cell], None], step: Callable[[int], None]
) -> Iterator[Row]:
    """The rows, each as soon as its cell is done. `step` is told how many steps the present cell has trained."""
    for cell in cells:
        started(cell)
        yield _one(cell, step)


def _one(cell: Cell, step: Callable[[int], None]) -> Row:
    ours, theirs = multiprocessing.Pipe(duplex=False)
    folder = Path(cell.recipe.output)
    log = folder.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    for old in (folder / "metrics.jsonl", log):
        old.unlink(missing_ok=True)
    process: Any = context().Process(target=_work, args=(cell, theirs, log))  # type: ignore[attr-defined]
    process.start()
    theirs.close()
    try:
        while not wait([ours, process.sentinel], timeout=POLL):
            step(_steps(folder / "metrics.jsonl"))
        row: Row | None = _receive(ours)
        process.join()
    except BaseException:
        process.kill()
        process.join()
        raise
    return row or cell.row(*_death(process.exitcode, log))


def _receive(connection: Connection) -> Row | None:
    try:
        row: Row = connection.recv()
    except EOFError:  # it died
        return None
    return row


def _work(cell: Cell, connection: Connection, log: Path) -> None:
    """The child: what it prints goes into its log, and it ends when its parent does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.join,), daemon=True).start()
    with log.open("w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        connection.send(measure(cell))


def _end_with(join: Callable[[], None]) -> None:
    join()
    os._exit(1)


def _steps(metrics: Path) -> int:
    try:
        return int(
            json.loads(metrics.read_text(encoding="utf-8").splitlines()[-1])["step"]
        )
    except (OSError, ValueError, LookupError):  # not there yet, or half a line
        return 0


def _death(code: int, log: Path) -> tuple[str, str]:
    if code >= 0:
        return "failed", f"the process ended with exit code {code}; see {log}."
    name = signal.Signals(-code).name
    if name == "SIGKILL":
        return (
            "oom",
            "the process was killed (SIGKILL), as the kernel does when memory runs out.",
        )
    return "failed", f"the process died of {name}; see {log}."
