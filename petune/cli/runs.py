"""Training, and what is done with its result."""

from __future__ import annotations

import json as jsonlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from petune.cli.inspect import AsJson
from petune.cli.output import (
    Stopped,
    as_json,
    complain,
    number,
    table,
    warn_of_failures,
)
from petune.errors import PetuneError

if TYPE_CHECKING:
    from petune.core.attached.cost import Merged

LOST = 0.5
"""How much of what a tuning changes may be lost in merged weights before it is said in words."""

RunFolder = Annotated[
    Path,
    typer.Argument(metavar="RUN", help="A run's folder, as `petune train` leaves it."),
]


def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.yaml")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[key=value ...]", help="Such as training.steps=10."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Throw away the run that is there.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
    json: AsJson = False,
) -> None:
    """Fine-tune a model as a recipe says."""
    from petune.training.loop import train as run
    from petune.training.plugin_files import bring_back
    from petune.training.processes import Processes
    from petune.training.recipe import load_recipe
    from petune.training.signals import Interrupted

    loaded = load_recipe(recipe, overrides or ())
    if resume:
        bring_back(Path(loaded.output))
    loaded.check(source=str(recipe))
    warn_of_failures()
    try:
        result = run(loaded, resume=resume, overwrite=overwrite, quiet=quiet)
    except Interrupted as stop:
        raise Stopped(str(stop)) from None
    if not Processes.joined().writes:
        return
    values = asdict(result)
    figures = {**values.pop("metrics"), **values}
    if json:
        as_json({**figures, "run": str(loaded.output)})
    else:
        _print_figures(figures)
        print(f"The run is in {loaded.output}.")


def evaluate(
    run: RunFolder,
    data: Annotated[
        Path | None,
        typer.Option(help="Rows to score; the run's test split by default."),
    ] = None,
    json: AsJson = False,
) -> None:
    """Score a run."""
    from petune.training.run import evaluate as score

    metrics = score(run, data, quiet=False)
    if json:
        as_json(metrics)
    else:
        _print_figures(metrics)


def _print_figures(figures: Mapping[str, Any]) -> None:
    """A table of them. The score is left out, it is the main metric once more; so are cut rows, which are said."""
    rows = [
        (name, number(value))
        for name, value in figures.items()
        if name not in ("score", "metric", "cut_rows")
    ]
    table(("figure", "value"), rows)


def predict(
    run: RunFolder,
    data: Annotated[Path, typer.Option(help="The rows to answer.")],
    out: Annotated[
        Path | None, typer.Option(help="Write the rows there, one JSON object a line.")
    ] = None,
    json: AsJson = False,
) -> None:
    """Answer the rows of a file, in their order."""
    from petune.files import write_text
    from petune.training.result import finite
    from petune.training.run import predict as ask
    from petune.training.run_folder import check_can_be_made

    if out is not None:  # said before the rows are answered
        check_can_be_made(out.parent)
        _check_apart(data, out)
    rows = ask(run, data, quiet=False)
    try:
        lines = [
            jsonlib.dumps(finite(row), ensure_ascii=False, default=str) for row in rows
        ]
    except RecursionError:
        raise PetuneError(
            f"{data}: brackets within brackets, too many to write them again; leave that column out."
        ) from None
    if out is not None:
        write_text(out, "".join(line + "\n" for line in lines))
    if json:
        print("\n".join(lines))
    elif out is None:
        table(list(rows[0]), [list(row.values()) for row in rows])


def _check_apart(data: Path, out: Path) -> None:
    """See that answers don't take the place of the rows that they belong to."""
    if out.is_file() and data.exists() and out.samefile(data):
        raise PetuneError(f"--out {out}: holds the rows to answer; name another.")


def merge(
    run: RunFolder,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    quantized: Annotated[
        bool,
        typer.Option("--quantized", help="Keep the run's precision; dense otherwise."),
    ] = False,
) -> None:
    """Fold a run's adapter into its model: a transformers folder that needs no petune."""
    from petune.training.run import merge_run

    merged = merge_run(run, out, quantized=quantized)
    print(out)
    if quantized:
        print(merged)
    _say_loss(merged)


def _say_loss(merged: Merged) -> None:
    """Say in words where storing the merged weights undid the tuning."""
    if merged.loss >= LOST:
        complain(
            f"what storing the merged weights loses is {merged.loss:.2g} times as large as what was tuned: little of "
            "the tuning is left in them. Score them, or keep the adapter."
        )


def export(
    run: RunFolder,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    format: Annotated[
        str,
        typer.Option(
            help="peft: PEFT's folder; serving: LoRA for vLLM and llama.cpp's converter; dense: a merged "
            "model; or a plugin's own format."
        ),
    ] = "peft",
) -> None:
    """Hand a run's result to other programs."""
    from petune.training.run import export_run

    merged = export_run(run, out, format)
    print(out)
    if merged is not None:
        _say_loss(merged)
