"""A run's folder: what lies where, and when training may write into it."""

from __future__ import annotations

import shutil
from pathlib import Path

import yaml

from petune.errors import PetuneError
from petune.files import write_text
from petune.training.recipe import Recipe, load_recipe

RECIPE = "recipe.yaml"
TASK = "task.json"
ADAPTER = "adapter"
METRICS = "metrics.jsonl"
RESULT = "result.json"
CHECKPOINTS = "checkpoints"

_FREE = {"steps", "epochs", "checkpoint_every", "log_every", "eval_every", "eval_rows", "eval_batch_size",
         "max_new_tokens"}  # fmt: skip
"""Keys of `training` that may change between the sessions of one run."""


def make_room(run: Path, recipe: Recipe, *, resume: bool, overwrite: bool) -> None:
    """See that training may write into `run`.

    Raises:
        PetuneError: something is there already that neither `resume` nor `overwrite` allows for.
    """
    if not run.exists():
        return
    if not run.is_dir():
        raise PetuneError(f"output {run}: is a file; name a folder.")
    if not (run / RECIPE).exists():
        if any(run.iterdir()):
            raise PetuneError(
                f"output {run}: holds other files than a run; name a new folder."
            )
        return
    if overwrite:
        for name in (
            RESULT,
            RECIPE,
            TASK,
            METRICS,
            ADAPTER,
            CHECKPOINTS,
        ):  # nothing else that someone put there
            path = run / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    elif resume:
        _check_same(recipe, load_recipe(run / RECIPE), run / RECIPE)
    elif (run / RESULT).exists():
        raise PetuneError(
            f"output {run}: holds a finished run; --overwrite trains it anew, or name another folder."
        )
    elif any((run / CHECKPOINTS).glob("checkpoint-*")):
        raise PetuneError(
            f"output {run}: holds an unfinished run; --resume goes on, --overwrite starts anew."
        )
    elif (run / ADAPTER).exists():
        raise PetuneError(
            f"output {run}: holds an adapter; `petune eval` scores it, --overwrite trains it anew."
        )


def write_recipe(run: Path, recipe: Recipe) -> None:
    """The resolved recipe, every default included."""
    text = yaml.safe_dump(
        recipe.resolved().model_dump(), sort_keys=False, allow_unicode=True
    )
    write_text(run / RECIPE, text)


def _check_same(recipe: Recipe, old: Recipe, path: Path) -> None:
    new, was = recipe.resolved().model_dump(), old.model_dump()
    trained, before = new.pop("training"), was.pop("training")
    changed = [key for key in new if new[key] != was[key] and key != "output"]
    changed += [
        f"training.{key}"
        for key in trained
        if key not in _FREE and trained[key] != before[key]
    ]
    if changed:
        raise PetuneError(
            f"{path}: the run was begun with another {', '.join(changed)}; put it back, or --overwrite."
        )
