"""`petune bench`: from a suite to rows, a table and a report."""

from __future__ import annotations

import fnmatch
import inspect
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from petune.core.registry.plugins import registry
from petune.errors import PetuneError, unknown
from petune.files import at_home
from petune_bench import cluster, local, results
from petune_bench.cell import Cell, Row, configuration, folder_of
from petune_bench.environment import machine, versions
from petune_bench.progress import Progress, waiting
from petune_bench.suite import CellSpec, Suite, check_names, extra_cell, load_suite

EXECUTORS = {"local": local.run, "ray": cluster.run}


@dataclass(frozen=True)
class Bench:
    """A suite, and where its results go."""

    suite: Suite
    name: str
    source: str
    """What errors call the suite."""
    out: Path


def run(
    suite: str,
    *,
    out: Path | None = None,
    methods: Sequence[str] = (),
    cells: Sequence[str] = ("*",),
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
    bench = Bench(loaded, name, source, at_home(out or f"bench/{name}"))
    if executor == "ray":
        cluster.load()
    else:
        local.warm_up()
    specs = _specs(loaded, source, methods, cells)
    with waiting("checking the suite"):
        todo = plan(bench, specs, seeds)
    _prefetch(todo)
    if fresh:
        (bench.out / results.FILE).unlink(missing_ok=True)
        shutil.rmtree(bench.out / "runs", ignore_errors=True)
    _run_missing(todo, bench.out, executor)
    rows = _rows_in_order(todo, bench.out)
    _show(rows, bench, json)
    names = {cell.name for cell in todo}
    return [row for row in rows if row["cell"] in names]


def _run_missing(todo: Sequence[Cell], out: Path, executor: str) -> None:
    """Run the cells without a result, and append the row of each as soon as it is there."""
    done = set()
    for row in results.current(results.read(out), _configurations(todo)):
        if row["status"] in ("ok", "unsupported"):
            done.add((row["cell"], row["seed"]))
    missing = [cell for cell in todo if (cell.name, cell.seed) not in done]
    out.mkdir(parents=True, exist_ok=True)
    with Progress(len(todo), len(todo) - len(missing)) as progress:
        for row in EXECUTORS[executor](missing, progress.started, progress.step):
            results.append(out, row)
            progress.finished(row)


def _rows_in_order(todo: Sequence[Cell], out: Path) -> list[Row]:
    """All rows that count, in the order of the cells; those of cells that were not asked for come last."""
    rows = results.current(results.read(out), _configurations(todo))
    order = {cell.name: i for i, cell in enumerate(todo)}
    return sorted(rows, key=lambda row: order.get(row["cell"], len(order)))


def _configurations(cells: Sequence[Cell]) -> dict[str, str]:
    return {cell.name: cell.configuration for cell in cells}


def plan(bench: Bench, specs: Sequence[CellSpec], seeds: int | None) -> list[Cell]:
    """Every cell and seed, checked before anything is loaded or downloaded.

    Raises:
        PetuneError: a name that nothing installed goes by, or an argument that a method doesn't take.
    """
    chosen = range(seeds) if seeds else bench.suite.seeds
    return [_cell(bench, spec, seed) for seed in chosen for spec in specs]


def _cell(bench: Bench, spec: CellSpec, seed: int) -> Cell:
    files = tuple(p.package for p in registry().plugins.values() if p.version == "file")
    folder = folder_of(bench.out, spec.label, seed)
    recipe = bench.suite.recipe(spec, seed, folder, bench.source).resolved()
    recipe.check(source=f"{bench.source}: {spec.label}")
    training = recipe.training.model_dump(exclude={"seed"}, exclude_none=True)
    key = configuration(recipe, spec.implementation, versions(), _code(spec.method))
    environment = {
        **versions(),
        **machine(),
        "configuration": key,
        "training": training,
    }
    return Cell(
        suite=bench.name,
        name=spec.label,
        implementation=spec.implementation,
        recipe=recipe,
        plugins=files,
        configuration=key,
        environment=environment,
    )


def _specs(
    suite: Suite, source: str, methods: Sequence[str], patterns: Sequence[str]
) -> list[CellSpec]:
    """The cells to run: the suite's and those of `--method` that it has not, as far as `--cells` picks them."""
    present = {cell.label for cell in suite.cells}
    extra = [
        cell
        for cell in map(extra_cell, dict.fromkeys(methods))
        if cell.label not in present
    ]
    specs = [*suite.cells, *extra]
    check_names(specs, source)
    known = [cell.label for cell in specs]
    picked: set[str] = set()
    for pattern in patterns:
        fitting = fnmatch.filter(known, pattern)
        if not fitting:
            raise PetuneError(f"--cells: {unknown('cell', pattern, known)}")
        picked.update(fitting)
    return [cell for cell in specs if cell.label in picked]


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
    for model in dict.fromkeys(cell.recipe.model for cell in cells):
        if model in models:
            fetch(models[model])
    data = [cell.recipe.data for cell in cells if isinstance(cell.recipe.data, str)]
    for name in dict.fromkeys(data):
        if name in sets:
            fetch(sets[name].source)


def _show(rows: Sequence[Row], bench: Bench, json: bool) -> None:
    from petune_bench.report import write_report
    from petune_bench.summary import summarize
    from petune_bench.table import as_json, show

    cells = summarize(rows)
    report = write_report(
        cells,
        rows,
        bench.out,
        title=bench.suite.title or bench.name,
        about=bench.suite.about,
        command=shlex.join(["petune", *sys.argv[1:]]),
    )
    if json:
        as_json(rows)
    else:
        show(cells)
        file = bench.out / results.FILE
        print(f"\nThe report is {report}, the rows are in {file}.")
