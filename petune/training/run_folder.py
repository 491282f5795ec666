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
        _clear(run)
    elif resume:
        _check_same(recipe, load_recipe(run / RECIPE), run / RECIPE)
    else:
        _check_not_begun(run)


def _clear(run: Path) -> None:
    """Remove what petune has written, and nothing else that someone put there."""
    for name in (RESULT, RECIPE, TASK, METRICS, ADAPTER, CHECKPOINTS):
        path = run / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _check_not_begun(run: Path) -> None:
    """Refuse a folder in which a run was finished or begun, and say what the user can do about it."""
    if (run / RESULT).exists():
        trouble = "a finished run; --overwrite trains it anew, or name another folder."
    elif any((run / CHECKPOINTS).glob("checkpoint-*")):
        trouble = "an unfinished run; --resume goes on, --overwrite starts anew."
    elif (run / ADAPTER).exists():
        trouble = "an adapter; `petune eval` scores it, --overwrite trains it anew."
    else:
        return
    raise PetuneError(f"output {run}: holds {trouble}")


def write_recipe(run: Path, recipe: Recipe) -> None:
    """The resolved recipe, every default included."""
    text = yaml.safe_dump(
        recipe.resolved().model_dump(), sort_keys=False, allow_unicode=True
    )
    write_text(run / RECIPE, text)


def _check_same(recipe: Recipe, old: Recipe, path: Path) -> None:
    """Refuse to go on with a run by another recipe; the message names the keys that differ."""
    new, was = recipe.resolved().model_dump(), old.model_dump()
    training, trained = new.pop("training"), was.pop("training")
    changed = [key for key in new if key != "output" and new[key] != was[key]]
    for key, value in training.items():
        if key not in _FREE and value != trained[key]:
            changed.append(f"training.{key}")
    if changed:
        raise PetuneError(
            f"{path}: the run was begun with another {', '.join(changed)}; put it back, or --overwrite."
        )
