"""`petune bench`: from a suite to rows, a table and a report."""

from __future__ import annotations

import inspect
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from petune.core.registry.plugins import registry
from petune.errors import PetuneError, unknown
from petune.training.recipe import Recipe
from petune_bench import cluster, local, results
from petune_bench.cell import Cell, Row, configuration, folder_of
from petune_bench.environment import machine, versions
from petune_bench.progress import Progress, waiting
from petune_bench.suite import CellSpec, Suite, check_names, extra_cell, load_suite

EXECUTORS = {"local": local.run, "ray": cluster.run}


def run(
    suite: str,
    *,
    out: Path | None = None,
    methods: Sequence[str] = (),
    cells: str = "*",
    seeds: int | None = None,
    executor: str = "local",
    fresh: bool = False,
    json: bool = False,
) -> list[Row]:
    """Run what has no result yet, write results.jsonl and the report into `out`, print the table.

    Raises:
        PetuneError: a mistake in the suite or the arguments.
    """
    if executor not in EXECUTORS:
        raise PetuneError(f"--executor: {unknown('executor', executor, EXECUTORS)}")
    loaded, name, source = load_suite(suite)
    out = out or Path("bench") / name
    _make_ready(executor)
    specs = _specs(loaded, source, methods, cells)
    with waiting("checking the suite"):
        todo = plan(loaded, specs, name, source, out, seeds)
    _prefetch(todo)
    if fresh:
        (out / results.FILE).unlink(missing_ok=True)
        shutil.rmtree(out / "runs", ignore_errors=True)
    configurations = {cell.name: cell.configuration for cell in todo}
    _run_missing(todo, configurations, out, executor)
    rows = results.current(results.read(out), configurations)
    order = {cell.name: i for i, cell in enumerate(todo)}
    rows.sort(key=lambda row: order.get(row["cell"], len(order)))
    _show(rows, loaded, name, out, json)
    return [row for row in rows if row["cell"] in order]


def _make_ready(executor: str) -> None:
    """Find what is not installed, or begin to import, before anything is checked."""
    if executor == "ray":
        cluster.load()
    else:
        local.warm_up()


def _run_missing(
    todo: Sequence[Cell], configurations: Mapping[str, str], out: Path, executor: str
) -> None:
    """Run the cells that have no result yet, each into a row of the results."""
    done = set()
    for row in results.current(results.read(out), configurations):
        if row["status"] in ("ok", "unsupported"):
            done.add((row["cell"], row["seed"]))
    missing = [cell for cell in todo if (cell.name, cell.seed) not in done]
    out.mkdir(parents=True, exist_ok=True)
    with Progress(len(todo), len(todo) - len(missing)) as progress:
        for row in EXECUTORS[executor](missing, progress.started, progress.step):
            results.append(out, row)
            progress.finished(row)


def plan(
    suite: Suite,
    specs: Sequence[CellSpec],
    name: str,
    source: str,
    out: Path,
    seeds: int | None,
) -> list[Cell]:
    """Every cell and seed, checked before anything is loaded or downloaded.

    Raises:
        PetuneError: a name that nothing installed goes by, or an argument that a method doesn't take.
    """
    files = tuple(p.package for p in registry().plugins.values() if p.version == "file")
    cells = []
    for seed in range(seeds) if seeds else suite.seeds:
        for spec in specs:
            folder = folder_of(out, spec.label, seed)
            recipe = suite.recipe(spec, seed, folder, source).resolved()
            recipe.check(source=f"{source}: {spec.label}")
            cells.append(_planned(name, spec, recipe, files))
    return cells


def _planned(
    suite: str, spec: CellSpec, recipe: Recipe, files: tuple[str, ...]
) -> Cell:
    """The cell of a checked recipe."""
    code = _code(spec.method)
    key = configuration(recipe, spec.implementation, versions(), code)
    environment = {
        **versions(),
        **machine(),
        "configuration": key,
        "training": recipe.training.model_dump(exclude={"seed"}, exclude_none=True),
    }
    return Cell(suite, spec.label, spec.implementation, recipe, files, key, environment)


def _specs(
    suite: Suite, source: str, methods: Sequence[str], pattern: str
) -> list[CellSpec]:
    present = {cell.label for cell in suite.cells}
    specs = [
        *suite.cells,
        *(cell for cell in map(extra_cell, methods) if cell.label not in present),
    ]
    check_names(specs, source)
    chosen = [cell for cell in specs if fnmatchcase(cell.label, pattern)]
    if not chosen:
        raise PetuneError(
            f"--cells: {unknown('cell', pattern, [cell.label for cell in specs])}"
        )
    return chosen


def _code(method: str | list[str]) -> str:
    """The method's source: the file of its class."""
    if not isinstance(method, str):
        return "".join(map(_code, method))
    try:
        file = inspect.getsourcefile(registry().get("petune_methods", method))
        return Path(file).read_text(encoding="utf-8") if file else ""
    except (TypeError, OSError):  # made at run time
        return ""


def _prefetch(cells: Sequence[Cell]) -> None:
    """Downloads show their progress here; in a worker they would be counted as the cell's loading."""
    from petune.loading.fetch import fetch

    models, sets = registry().all("petune_models"), registry().all("petune_datasets")
    for name in dict.fromkeys(cell.recipe.model for cell in cells):
        if name in models:
            fetch(models[name])
    for data in dict.fromkeys(
        cell.recipe.data for cell in cells if isinstance(cell.recipe.data, str)
    ):
        if data in sets:
            fetch(sets[data].source)


def _show(rows: Sequence[Row], suite: Suite, name: str, out: Path, json: bool) -> None:
    from petune_bench.report import write_report
    from petune_bench.summary import summarize
    from petune_bench.table import as_json, show

    cells = summarize(rows)
    command = shlex.join(["petune", *sys.argv[1:]])
    report = write_report(
        cells, rows, out, title=suite.title or name, about=suite.about, command=command
    )
    if json:
        as_json(rows)
    else:
        show(cells)
        print(f"\nThe report is {report}, the rows are in {out / results.FILE}.")
