"""How far a benchmark is: bars on a terminal, a line a cell elsewhere. All on stderr."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars

from petune_bench.cell import Cell, Row


def waiting(what: str) -> AbstractContextManager[object]:
    """Says on a terminal what takes a moment: importing torch does."""
    console = Console(stderr=True)
    return console.status(what) if console.is_terminal else nullcontext()


def _doing(step: int, steps: float | None) -> str:
    """What a cell does that has trained so many of its steps."""
    if step == 0:
        return "loading"
    return "scoring" if step == steps else "training"


class Progress:
    """Two bars: the cells of the suite, and the steps of the present one."""

    def __init__(self, total: int, done: int) -> None:
        self.console = Console(stderr=True)
        self.total, self.done = total, done
        self.bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
            transient=True,
        )
        self.all = self.bars.add_task("cells", total=total - done)
        self.one = self.bars.add_task("", total=None, visible=False)
        self.began = time.monotonic()

    def __enter__(self) -> Self:
        if self.done:
            self._say(
                f"{self.done} of {self.total} cells are done already; --fresh runs them anew."
            )
        self.bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bars.stop()
        if kind is KeyboardInterrupt:
            self._say(
                f"{self.done} of {self.total} cells are done; the same command goes on."
            )

    def started(self, cell: Cell) -> None:
        """A cell begins to load."""
        self.began = time.monotonic()
        steps = cell.recipe.training.steps
        self.bars.reset(
            self.one, description=f"{cell.name}: loading", total=steps, visible=True
        )

    def step(self, step: int) -> None:
        """So many steps of the present cell are done."""
        task = self.bars.tasks[self.one]
        name = task.description.rpartition(": ")[0]
        doing = _doing(step, task.total)
        self.bars.update(self.one, completed=step, description=f"{name}: {doing}")

    def finished(self, row: Row) -> None:
        """A cell is done, one way or another."""
        self.done += 1
        self.bars.advance(self.all)
        what = (
            f"{row['metric']} {row['score']:.3f}"
            if row["status"] == "ok"
            else f"{row['status']}: {row['error']}"
        )
        seed = f" (seed {row['seed']})" if row["seed"] else ""
        self._say(
            f"[{self.done}/{self.total}] {row['cell']}{seed}: {what}, {time.monotonic() - self.began:.0f} s"
        )

    def _say(self, line: str) -> None:
        self.bars.console.print(line, markup=False, highlight=False, soft_wrap=True)
