"""Every method on every precision: the conformance kit's results as a page. `python -m petune_bench.matrix --help`."""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from petune.testing import Row, reasons
from petune_bench.environment import versions

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
    cells = _cells(options)
    results = Path(options.results)
    results.parent.mkdir(parents=True, exist_ok=True)
    if options.fresh:
        results.unlink(missing_ok=True)
    done = read(results)
    missing = [cell for cell in cells if cell not in done]
    _run_into(results, missing, options.jobs, options.device)
    done = read(results)
    found = {cell: done[cell] for cell in cells}
    if options.out:
        Path(options.out).write_text(page(found))
    failures = _failures(found)
    print("\n".join([*failures, f"{len(found)} cells, {len(failures)} failures"]))
    return 1 if failures else 0


def _cells(options: argparse.Namespace) -> list[Cell]:
    """Every cell that the options ask for."""
    import petune

    methods = options.methods.split()
    if not methods:
        known = sorted(petune.methods())
        methods = [name for name in known if options.all or ":" not in name]
    return list(product(methods, options.families.split(), options.precisions.split()))


def _run_into(results: Path, cells: Sequence[Cell], jobs: int, device: str) -> None:
    """Run the cells, each into a line of the results and a printed one."""
    ran_on = {**versions(), "source": source()}
    for number, (cell, rows, seconds) in enumerate(run(cells, jobs, device), 1):
        line = {
            "cell": cell,
            "rows": [vars(row) for row in rows],
            "seconds": round(seconds, 2),
            "ran_on": ran_on,
        }
        with results.open("a") as file:
            file.write(json.dumps(line) + "\n")
        which = f"{number}/{len(cells)}  {' '.join(cell)}"
        print(f"{which}  {_outcome(rows)}  {seconds:.1f} s", flush=True)


def _outcome(rows: Sequence[Row]) -> str:
    """A cell's rows in a word or two."""
    failed = sum(bool(row.error) for row in rows)
    refused = sum(bool(row.refused) for row in rows)
    if failed:
        return f"{failed} FAIL"
    return "refused" if refused == len(rows) else "holds"


def _failures(found: dict[Cell, list[Row]]) -> list[str]:
    """A line for each cell and reason for which it fails."""
    lines = []
    for (method, _, precision), rows in found.items():
        for why, alike in reasons(rows).items():
            if alike[0].error:
                lines.append(f"{method} {precision}: {why}")
    return lines


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m petune_bench.matrix", description=__doc__
    )
    parser.add_argument("--out", help="the page to write, such as docs/matrix.md")
    parser.add_argument(
        "--results",
        default="bench/matrix.jsonl",
        help="one row a cell; what is there is not run again",
    )
    parser.add_argument("--fresh", action="store_true", help="run everything anew")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument(
        "--methods", default="", help="all that are registered by default"
    )
    parser.add_argument(
        "--all",
        action="store_true",
        help="also methods of other packages behind a prefix (peft:…)",
    )
    parser.add_argument("--families", default=FAMILIES)
    parser.add_argument("--precisions", default=PRECISIONS)
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
    for text in results.read_text().splitlines() if results.exists() else ():
        line = json.loads(text)
        if line["ran_on"] == {**versions(), "source": source()}:
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
            if path.relative_to(home).parts[0] not in ("cli", "tune"):
                digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def page(found: dict[Cell, list[Row]]) -> str:
    """The results as Markdown: a row a method, a column a precision, the families folded."""
    methods, families, precisions = (_different(found, i) for i in range(3))
    notes: dict[str, int] = {}
    lines = [
        f"| method | {' | '.join(precisions)} |",
        f"| --- |{' :-: |' * len(precisions)}",
    ]
    for method in methods:
        marks = [_mark(method, precision, found, notes) for precision in precisions]
        lines.append(f"| {method} | {' | '.join(marks)} |")
    numbered = [f"{number}. {note}" for note, number in notes.items()]
    installed = [f"{name} {number}" for name, number in versions().items()]
    return HEAD.format(
        options=_options(families, precisions),
        count=len(methods),
        date=time.strftime("%Y-%m-%d"),
        versions=", ".join(installed),
        families=", ".join(NAMES.get(family, family) for family in families),
        table="\n".join(lines),
        notes="\n".join(numbered) or "None.",
        **_counts(found),
    )


def _different(cells: Iterable[Cell], part: int) -> list[str]:
    """The different methods, families or precisions of the cells, in their order."""
    return list(dict.fromkeys(cell[part] for cell in cells))


def _mark(
    method: str,
    precision: str,
    found: dict[Cell, list[Row]],
    notes: dict[str, int],
) -> str:
    """A method's cell at a precision, over the families; its reasons get the next numbers among the notes."""
    rows: list[Row] = []
    for cell, own in found.items():
        if cell[0] == method and cell[2] == precision:
            rows += own
    numbers = []
    for why in reasons(rows):
        number = notes.setdefault(f"{method}, {why}", len(notes) + 1)
        numbers.append(str(number))
    mark = "✓"
    if any(row.error for row in rows):
        mark = "✗"
    elif all(row.refused for row in rows):
        mark = "–"
    return mark + (f" <sup>{' '.join(numbers)}</sup>" if numbers else "")


def _options(families: list[str], precisions: list[str]) -> str:
    """What the command needs besides, where the page is not of all families and precisions."""
    said = ""
    if " ".join(families) != FAMILIES:
        said += f' --families "{" ".join(families)}"'
    if " ".join(precisions) != PRECISIONS:
        said += f' --precisions "{" ".join(precisions)}"'
    return said


def _counts(found: dict[Cell, list[Row]]) -> dict[str, Any]:
    """The behaviours that were checked, and how many checks went which way."""
    rows: list[Row] = []
    for own in found.values():
        rows += own
    behaviours = dict.fromkeys(row.behaviour for row in rows)
    return {
        "behaviours": "; ".join(f"*{name}*" for name in behaviours),
        "held": sum(not row.error and not row.refused for row in rows),
        "refused": sum(bool(row.refused) and not row.error for row in rows),
        "failed": sum(bool(row.error) for row in rows),
    }


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
