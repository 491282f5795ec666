"""`petune bench`, which reaches the command line as any plugin's command does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

import petune

Methods = Annotated[
    list[str] | None,
    typer.Option(
        "--method",
        metavar="'NAME [key=value …]'",
        help="Compare this method too; keys are its arguments or those of training. Repeatable.",
    ),
]
SuiteName = Annotated[
    str,
    typer.Argument(metavar="SUITE", help="A suite's name (quickstart) or a YAML file."),
]
Out = Annotated[
    Path | None,
    typer.Option(help="Where results and report go; bench/SUITE by default."),
]
Patterns = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PATTERN",
        help="Run only the cells so named, such as 'lora*'. Repeatable.",
    ),
]
Seeds = Annotated[
    int | None, typer.Option(min=1, help="Run each cell with so many seeds.")
]
Executor = Annotated[
    str, typer.Option(help="local: one cell at a time; ray: on a cluster.")
]
Fresh = Annotated[
    bool,
    typer.Option("--fresh", help="Run all cells anew, also those that are done."),
]
Json = Annotated[bool, typer.Option("--json", help="Print the rows as JSON.")]


@petune.hookimpl
def petune_commands() -> Mapping[str, Callable[..., Any]]:
    """`petune bench`."""
    return {"bench": bench}


def bench(
    suite: SuiteName,
    out: Out = None,
    method: Methods = None,
    cells: Patterns = None,
    seeds: Seeds = None,
    executor: Executor = "local",
    fresh: Fresh = False,
    json: Json = False,
) -> None:
    """Compare methods on memory, speed and score. A run that was interrupted goes on where it was."""
    from petune_bench.runner import run

    rows = run(
        suite,
        out=out,
        methods=method or (),
        cells=cells or ("*",),
        seeds=seeds,
        executor=executor,
        fresh=fresh,
        json=json,
    )
    if any(row["status"] in ("failed", "oom") for row in rows):
        raise typer.Exit(1)
