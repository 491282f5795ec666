"""The rows of a sweep as a page."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import transformers

from petune_bench.coverage.checks import METHODS

Row = Mapping[str, Any]
NO_SOFTMAX = "computes no softmax attention: there are no keys to put a prefix beside"
NO_TABLE = (
    "reads no token by one table of embeddings: there is no place for a row of a prompt"
)
IMPOSSIBLE: dict[str, dict[str, str]] = {
    "prefix-tuning": dict.fromkeys(
        ["falcon_mamba", "fnet", "mamba", "mamba2", "rwkv", "xlstm", "yoso"], NO_SOFTMAX
    ),
    "prompt-tuning": {
        **dict.fromkeys(
            ["canine", "musicgen", "musicgen_melody", "perceiver"], NO_TABLE
        ),
        "deepseek_v4": "picks its experts by a table of token ids, which has none for virtual tokens",
    },
}
"""{method: {architecture: why nothing could be done}}: refusals that count for no method's failing."""
HEAD = """# Coverage

Every architecture of transformers {transformers} that is mapped for causal or masked language modelling, sequence
or token classification, question answering or sequence-to-sequence, built small and random from its configuration
class, with a method for each hook point. A cell is one architecture with one head and one method. It holds if the
method attaches, gets gradients wherever the base's own parameters would, changes the output when its parameters
change, gives the base exactly when switched off and when detached (class, keys, output), and generates the same with
and without a cache where the base does. `python -m petune_bench.coverage --out FOLDER` runs the cells and writes this
page (torch {torch}, CPU, float32).

**{holds:,} of {cells:,} cells hold: {share:.1%}.** {impossible} others are refused because nothing could be done there;
of the rest {rest:.1%} hold. {built} of {mapped} model types could be built ({heads} with their heads).
"""
NOT_BUILT = "What transformers itself could not build or run at these sizes, offline, from token ids alone."

BY_ARCHITECTURE = """## By architecture

`+` holds with every head, `-` is impossible, `!` is a hole with one head at least.
"""


def page(rows: Sequence[Row]) -> str:
    """The markdown of a sweep's rows."""
    run = [row for row in rows if row["status"] != "not built"]
    cannot = [row for row in run if _impossible(row)]
    holes = [row for row in run if _is_hole(row)]
    reasons = ("method", "architecture", "heads", "reason")
    sections = [
        _head(rows, run),
        _table(("method", "holds", "impossible", "holes", "cells"), _by_method(run)),
        "## Holes\n",
        _table(reasons, _grouped(holes)),
        "## Impossible\n",
        _table(reasons, _grouped(cannot, IMPOSSIBLE)),
        f"## Not built\n\n{NOT_BUILT}\n",
        _table(("architecture", "reason"), _not_built(rows)),
        BY_ARCHITECTURE,
        _table(("architecture", "heads", *METHODS), _by_architecture(run)),
    ]
    return "\n".join(sections)


def _is_hole(row: Row) -> bool:
    return row["status"] != "holds" and not _impossible(row)


def _not_built(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """(architecture, why it could not be built), of the last head that was tried."""
    why = {}
    for row in rows:
        if row["status"] == "not built":
            why[row["architecture"]] = _cell(row["reason"])
    return list(why.items())


def _by_architecture(run: Sequence[Row]) -> list[tuple[str, ...]]:
    kinds = sorted({row["architecture"] for row in run})
    return [_line(kind, run) for kind in kinds]


def _head(rows: Sequence[Row], run: Sequence[Row]) -> str:
    """The page's beginning, with the counts."""
    holds = sum(row["status"] == "holds" for row in run)
    cannot = sum(map(_impossible, run))
    return HEAD.format(
        transformers=transformers.__version__,
        torch=torch.__version__.partition("+")[0],
        holds=holds,
        cells=len(run),
        share=holds / max(1, len(run)),
        impossible=cannot,
        rest=holds / max(1, len(run) - cannot),
        built=len({row["architecture"] for row in run}),
        mapped=len({row["architecture"] for row in rows}),
        heads=len({(row["architecture"], row["head"]) for row in run}),
    )


def _by_method(run: Sequence[Row]) -> Iterator[tuple[str, int, int, int, int]]:
    """(method, cells that hold, that are impossible, that are holes, all cells)."""
    for method in METHODS:
        own = [row for row in run if row["method"] == method]
        holds = sum(row["status"] == "holds" for row in own)
        yield (
            method,
            holds,
            sum(map(_impossible, own)),
            sum(map(_is_hole, own)),
            len(own),
        )


def _impossible(row: Row) -> bool:
    return row["status"] == "refused" and row["architecture"] in IMPOSSIBLE.get(
        row["method"], {}
    )


def _line(kind: str, run: Sequence[Row]) -> tuple[str, ...]:
    own = [row for row in run if row["architecture"] == kind]
    heads = dict.fromkeys(row["head"] for row in own)
    return kind, ", ".join(heads), *(_mark(own, method) for method in METHODS)


def _mark(run: Sequence[Row], method: str) -> str:
    """One mark for the rows of a method."""
    rows = [row for row in run if row["method"] == method]
    if all(row["status"] == "holds" for row in rows):
        return "+"
    return "-" if all(map(_impossible, rows)) else "!"


def _grouped(
    rows: Iterable[Row], reasons: Mapping[str, Mapping[str, str]] | None = None
) -> list[tuple[str, ...]]:
    found: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        method, kind = row["method"], row["architecture"]
        why = reasons[method][kind] if reasons else row["reason"]
        found.setdefault((method, kind, _cell(why)), []).append(row["head"])
    return [
        (method, kind, ", ".join(heads), why)
        for (method, kind, why), heads in sorted(found.items())
    ]


def _cell(text: str) -> str:
    plain = text.replace("|", "/").replace("\n", " ").removeprefix("AssertionError: ")
    return plain if len(plain) <= 140 else plain[:140].rpartition(" ")[0] + " …"


def _table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"
