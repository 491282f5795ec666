"""A cell: one method at one seed. `measure` trains it and returns its row of results.jsonl."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from petune.errors import PetuneError, UnsupportedError
from petune.training.recipe import Recipe

if TYPE_CHECKING:
    from petune.training.adapting import Adapt

SCHEMA_VERSION = 1
MEASURED = (
    "trainable_params", "adapter_bytes", "score", "metric", "train_loss", "step_seconds", "tokens_per_second",
    "peak_memory_bytes", "saved_activation_bytes", "load_seconds", "eval_seconds", "device",
)  # fmt: skip
KEYS = (
    "schema_version", "suite", "cell", "status", "error", "model", "precision", "method", "method_args",
    "implementation", "task", "data", "seed", "steps", *MEASURED, "environment",
)  # fmt: skip
"""The keys of a row, in their order."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """What a worker needs to know, in a form that travels between processes and machines."""

    suite: str
    name: str
    implementation: str
    recipe: Recipe
    plugins: tuple[str, ...]
    """Single-file plugins to load, as the command line did."""
    configuration: str
    """A hash of all that the figures depend on, the seed left out: rows that share it may be averaged."""
    environment: Mapping[str, Any]

    @property
    def seed(self) -> int:
        """The training's seed."""
        return self.recipe.training.seed

    def row(self, status: str, error: str | None = None, **measured: Any) -> Row:
        """A row with all keys; those that were not measured are null."""
        r = self.recipe
        known = {
            **vars(self),
            **r.model_dump(
                include={"model", "precision", "method", "method_args", "task", "data"}
            ),
            **measured,
            "method": r.method if isinstance(r.method, str) else "+".join(r.method),
            "schema_version": SCHEMA_VERSION,
            "cell": self.name,
            "status": status,
            "error": error and " ".join(error.split())[:500],
            "seed": self.seed,
            "steps": measured.get("steps", r.training.steps),
        }
        return {key: known.get(key) for key in KEYS}


def configuration(
    recipe: Recipe, implementation: str, versions: Mapping[str, str], source: str
) -> str:
    """The hash of a cell; `source` is the method's code, so that a method under development is measured anew."""
    values = recipe.resolved().model_dump(exclude={"output"})
    del values["training"]["seed"]
    text = json.dumps(
        [values, implementation, dict(versions), source], sort_keys=True, default=str
    )
    return sha256(text.encode()).hexdigest()[:12]


def measure(cell: Cell) -> Row:
    """Train and score the cell. What goes wrong becomes the row's status; the traceback goes to stderr."""
    import traceback

    try:
        return _measure(cell)
    except Exception as error:
        traceback.print_exc()
        kind = "" if isinstance(error, PetuneError) else f"{type(error).__name__}: "
        return cell.row(_status(error), f"{kind}{error}")


def _measure(cell: Cell) -> Row:
    from petune.core.registry.plugins import registry
    from petune.training import train
    from petune_bench.environment import machine

    for file in cell.plugins:
        registry().add_file(file)
    result = train(
        cell.recipe,
        adapt=_adapt(cell.implementation),
        overwrite=True,
        quiet=True,
        last_checkpoint=False,
    )
    measured: dict[str, Any] = {key: getattr(result, key) for key in MEASURED}
    environment = {
        **cell.environment,
        **machine(),
        "test_rows": _test_rows(cell.recipe),
    }
    if result.score is None or not math.isfinite(result.train_loss):
        return cell.row(
            "failed",
            f"training diverged: the loss is {result.train_loss}.",
            environment=environment,
        )
    return cell.row("ok", **measured, steps=result.steps, environment=environment)


def _adapt(implementation: str) -> Adapt | None:
    if implementation == "petune":
        return None
    from petune_bench.peers import adapt

    return adapt


def _test_rows(recipe: Recipe) -> int:
    """How many rows the score is a mean over: its standard error follows from it."""
    from petune.core.registry.plugins import registry
    from petune.training.setup import make_splits

    most = (
        recipe.training.eval_rows
        or registry().get("petune_tasks", recipe.task).eval_rows
    )
    count = len(make_splits(recipe)["test"])
    return min(count, most) if most else count


def _status(error: Exception) -> str:
    import torch

    text = str(error).lower()
    if (
        isinstance(error, MemoryError | torch.OutOfMemoryError)
        or "allocate memory" in text
        or "out of memory" in text
    ):
        return "oom"
    if isinstance(error, UnsupportedError):
        return "unsupported"
    return "failed"


def folder_of(out: Path, name: str, seed: int) -> Path:
    """Where a cell's run goes; the name as far as a file system takes it."""
    if not (
        slug := "".join(c if c.isalnum() or c in "-_.=" else "-" for c in name).strip(
            "-."
        )
    ):
        raise PetuneError(f"a cell can't be called {name!r}: use a letter or a digit.")
    return out / "runs" / f"{slug}-seed{seed}"
