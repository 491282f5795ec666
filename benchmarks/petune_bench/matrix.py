"""Every method on every precision: the conformance kit's results as a page. `python -m petune_bench.matrix --help`."""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from petune.testing import Row, reasons
from petune.testing.rows import FAILS, HOLDS, REFUSED
from petune_bench.environment import versions
from petune_bench.options import Parser

FAMILIES, PRECISIONS = "llama gpt2 bert t5", "fp32 bf16 nf4 fp4 int8 int8wo"
ARGUMENTS: dict[str, dict[str, Any]] = {
    "trainable-tokens": {"ids": [81, 10, 20, 59, 102, 93, 41]}
}
"""For methods that can't do without: tokens of the kit's batch."""
NAMES = {"llama": "Llama (grouped-query)", "gpt2": "GPT-2", "bert": "BERT", "t5": "T5"}
Cell = tuple[str, str, str]
"""Method, family, precision."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is not in the results yet, write the page; 1 if something fails."""
    options = _parser().parse_args(argv)
    methods = options.methods or _methods(everything=options.all)
    cells = list(product(methods, options.families, options.precisions))
    results = Path(options.results)
    results.parent.mkdir(parents=True, exist_ok=True)
    if options.fresh:
        results.unlink(missing_ok=True)
    _run_missing(cells, results, options)
    done = read(results)
    found = {cell: done[cell] for cell in cells}
    if options.out:
        Path(options.out).write_text(page(found))
    failures = _failures(found)
    print("\n".join([*failures, f"{len(found)} cells, {len(failures)} failures"]))
    return 1 if failures else 0


def _methods(*, everything: bool) -> list[str]:
    """The registered methods; those of other packages, which have a prefix (peft:…), only if asked for."""
    import petune

    return [name for name in sorted(petune.methods()) if everything or ":" not in name]


def _run_missing(
    cells: Sequence[Cell], results: Path, options: argparse.Namespace
) -> None:
    """Run the cells that have no results, append those of each as soon as they are there, and print how far it is."""
    done = read(results)
    missing = [cell for cell in cells if cell not in done]
    ran = run(missing, options.jobs, options.device)
    for number, (cell, rows, seconds) in enumerate(ran, 1):
        line = {
            "cell": cell,
            "rows": [vars(row) for row in rows],
            "seconds": round(seconds, 2),
            "ran_on": _here(),
        }
        with results.open("a") as file:
            file.write(json.dumps(line) + "\n")
        where = f"{number}/{len(missing)}  {' '.join(cell)}"
        print(f"{where}  {_said(rows)}  {seconds:.1f} s", flush=True)


def _here() -> dict[str, str]:
    """What results depend on: the versions of the libraries, and petune's own code."""
    return {**versions(), "source": source()}


def _said(rows: Sequence[Row]) -> str:
    failed = sum(bool(row.error) for row in rows)
    if failed:
        return f"{failed} FAIL"
    return "refused" if all(row.refused for row in rows) else "holds"


def _failures(found: Mapping[Cell, Sequence[Row]]) -> list[str]:
    """A line for each reason why something fails."""
    lines = []
    for (method, _, precision), rows in found.items():
        for why, about in reasons(rows).items():
            if about[0].error:
                lines.append(f"{method} {precision}: {why}")
    return lines


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m petune_bench.matrix", description=__doc__)
    parser.add_argument("--out", help="the page to write, such as docs/matrix.md")
    parser.add_argument(
        "--results",
        default="bench/matrix.jsonl",
        help="one row a cell; what is there is not run again",
    )
    parser.add_argument("--fresh", action="store_true", help="run everything anew")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument(
        "--methods",
        action="words",
        default=[],
        help="all that are registered by default",
    )
    parser.add_argument(
        "--all",
        action="store_true",
        help="also methods of other packages behind a prefix (peft:…)",
    )
    parser.add_argument("--families", action="words", default=FAMILIES.split())
    parser.add_argument("--precisions", action="words", default=PRECISIONS.split())
    parser.add_argument("--device", default="cpu")
    return parser


def run(
    cells: Sequence[Cell], jobs: int, device: str
) -> Iterator[tuple[Cell, list[Row], float]]:
    """The cells as they get done, each method's in one process."""
    if jobs < 2:
        for cell in cells:
            yield check(cell, device)
        return
    os.environ["OMP_NUM_THREADS"] = (
        "1"  # threads that wait for each other take most of the time of a tiny model
    )
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        for future in as_completed(
            [pool.submit(check, cell, device) for cell in cells]
        ):
            yield future.result()


def check(cell: Cell, device: str = "cpu") -> tuple[Cell, list[Row], float]:
    """The kit on one method, family and precision."""
    import petune
    from petune.testing import run_checks
    from petune.training.setup import quietly

    method, family, precision = cell
    began = time.perf_counter()
    options: dict[str, Any] = {
        "families": [family],
        "precisions": [precision],
        "device": device,
    }
    try:
        with quietly():
            rows = list(run_checks(method, **options, **ARGUMENTS.get(method, {})))
    except (
        petune.PetuneError
    ) as wrong:  # it needs arguments that ARGUMENTS does not have
        rows = [Row("run", family, precision, str(wrong))]
    return cell, rows, time.perf_counter() - began


def read(results: Path) -> dict[Cell, list[Row]]:
    """What was run with the code and the versions that are installed; the last of each cell."""
    found: dict[Cell, list[Row]] = {}
    lines = results.read_text().splitlines() if results.exists() else []
    for text in lines:
        line = json.loads(text)
        if line["ran_on"] == _here():
            method, family, precision = line["cell"]
            found[method, family, precision] = [Row(**row) for row in line["rows"]]
    return found


@cache
def source() -> str:
    """A digest of the code that results depend on."""
    digest = hashlib.sha256()
    for package in ("petune", "petune_plugins"):
        home = Path(importlib.import_module(package).__path__[0])
        for path in sorted(home.rglob("*.py")):
            if path.relative_to(home).parts[0] not in ("cli", "training"):
                digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def page(found: dict[Cell, list[Row]]) -> str:
    """The results as Markdown: a row a method, a column a precision, the families folded."""
    methods, families, precisions = _names(found)
    notes = Notes()
    table = [f"| method | {' | '.join(precisions)} |"]
    table += [f"| --- |{' :-: |' * len(precisions)}"]
    for method in methods:
        marks = []
        for precision in precisions:
            rows = _rows(found, method, families, precision)
            marks.append(_mark(rows) + notes.of(method, rows))
        table.append(f"| {method} | {' | '.join(marks)} |")
    rows = [row for each in found.values() for row in each]
    marks = [row.mark for row in rows]
    behaviours = dict.fromkeys(row.behaviour for row in rows)
    options = _option("families", families, FAMILIES)
    options += _option("precisions", precisions, PRECISIONS)
    return HEAD.format(
        options=options,
        count=len(methods),
        date=time.strftime("%Y-%m-%d"),
        versions=", ".join(f"{name} {number}" for name, number in versions().items()),
        families=", ".join(NAMES.get(family, family) for family in families),
        behaviours="; ".join(f"*{name}*" for name in behaviours),
        held=marks.count(HOLDS),
        refused=marks.count(REFUSED),
        failed=marks.count(FAILS),
        table="\n".join(table),
        notes=notes.text(),
    )


def _names(cells: Iterable[Cell]) -> list[list[str]]:
    """The methods, the families and the precisions that occur, each once."""
    columns = zip(*cells, strict=True)
    return [list(dict.fromkeys(column)) for column in columns]


def _rows(
    found: Mapping[Cell, list[Row]],
    method: str,
    families: Sequence[str],
    precision: str,
) -> list[Row]:
    """The rows of a method at a precision, of one family after the other."""
    rows = []
    for family in families:
        rows += found.get((method, family, precision), [])
    return rows


class Notes:
    """The numbered reasons below the table, each once."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def of(self, method: str, rows: Sequence[Row]) -> str:
        """The numbers of what does not hold of a method, as a cell of the table shows them."""
        found = []
        for why in reasons(rows):
            number = self.numbers.setdefault(f"{method}, {why}", len(self.numbers) + 1)
            found.append(str(number))
        return f" <sup>{' '.join(found)}</sup>" if found else ""

    def text(self) -> str:
        """The list of them."""
        lines = [f"{number}. {note}" for note, number in self.numbers.items()]
        return "\n".join(lines) or "None."


def _mark(rows: Sequence[Row]) -> str:
    """One mark for several rows: refused only where all are."""
    if any(row.error for row in rows):
        return FAILS
    return REFUSED if all(row.refused for row in rows) else HOLDS


def _option(name: str, given: Sequence[str], default: str) -> str:
    """An option as the command had it; empty where it is the default."""
    words = " ".join(given)
    return "" if words == default else f' --{name} "{words}"'


HEAD = """# Every method on every precision

The conformance kit (`petune.testing`, `petune check METHOD`) on {count} methods, as it was last run by

```sh
python -m petune_bench.matrix --out docs/matrix.md --jobs 2{options}
```

on {date} with {versions}.

A cell stands for these behaviours on {families}, tiny random models of the real structure:

{behaviours}

*Merge, or a reason* holds where the method merges into dense weights and, on a quantized base, back into the same
quantization, and where it says that it has no merged form. *Cached generation* is for models that generate.

✓ holds everywhere but for what its numbers say; – is refused; ✗ fails. {held:,} checks hold, {refused:,} are refused,
{failed:,} fail. `nf4`, `fp4` and `int8` are bitsandbytes' (its int8 rounds activations too), `int8wo` is torchao's
weight-only int8. fp16 needs a GPU: `--precisions fp16 --device cuda`.

{table}

## Refused, and why

{notes}
"""

if __name__ == "__main__":
    raise SystemExit(main())
