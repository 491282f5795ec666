"""A run's folder: what lies where, and when training may write into it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import yaml

from petune.errors import PetuneError, listed
from petune.files import write_text, writing
from petune.training import fingerprint, plugin_files
from petune.training.recipe import Recipe, load_recipe

RECIPE = "recipe.yaml"
TASK = "task.json"
ADAPTER = "adapter"
METRICS = "metrics.jsonl"
RESULT = "result.json"
CHECKPOINTS = "checkpoints"

_NOTES = (TASK, fingerprint.FILE, plugin_files.FILE)
_FREE = {"steps", "epochs", "checkpoint_every", "log_every", "eval_every", "eval_rows", "eval_batch_size",
         "max_new_tokens"}  # fmt: skip
"""Keys of `training` that may change between the sessions of one run."""


@contextmanager
def room(run: Path, recipe: Recipe, *, resume: bool, overwrite: bool) -> Iterator[None]:
    """Within the context `run` is a folder that training may write into. Folders that were made for it and stayed empty
    are gone afterwards.

    Raises:
        PetuneError: something is there already that neither `resume` nor `overwrite` allows for, or there can be no
            such folder.
    """
    with writing(run):
        if run.exists():
            _check_free(run, recipe, resume, overwrite)
        missing = [path for path in (run, *run.parents) if not path.exists()]
        check_can_be_made(run)
        run.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        for path in (run / CHECKPOINTS, *missing):
            with suppress(OSError):  # it is not empty, or not there
                path.rmdir()


def check_can_be_made(folder: Path) -> None:
    """See that a folder can be made, or written into.

    Raises:
        PetuneError: a file or a missing permission is in the way.
    """
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    if not nearest.is_dir():
        raise PetuneError(f"output {folder}: {nearest} is a file; name another folder.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise PetuneError(f"output {folder}: {nearest} can't be written to.")


def _check_free(run: Path, recipe: Recipe, resume: bool, overwrite: bool) -> None:
    """See that a folder which is there may be used."""
    if not run.is_dir():
        raise PetuneError(f"output {run}: is a file; name a folder.")
    if not (run / RECIPE).exists():
        if any(run.iterdir()):
            raise PetuneError(
                f"output {run}: holds other files than a run; name a new folder."
            )
        return
    if resume:
        _check_same(recipe, load_recipe(run / RECIPE), run / RECIPE)
    elif not overwrite:
        _check_not_begun(run)


def is_done(run: Path, recipe: Recipe) -> bool:
    """Whether the run is finished and the recipe asks for nothing beyond it."""
    if not (run / RESULT).exists():
        return False
    return load_recipe(run / RECIPE).training == recipe.training


def clear(run: Path) -> None:
    """Remove what petune has written, and nothing else that someone put there."""
    for name in (*_NOTES, RESULT, RECIPE, METRICS, ADAPTER, CHECKPOINTS):
        path = run / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _check_not_begun(run: Path) -> None:
    """Refuse a folder in which a run was finished or begun, and say what the user can do about it."""
    if (run / RESULT).exists():
        trouble = "a finished run; --overwrite trains it anew, or name another folder."
    elif (run / ADAPTER).exists():
        trouble = "an adapter; `petune eval` scores it, --resume goes on, --overwrite trains it anew."
    elif any((run / CHECKPOINTS).glob("checkpoint-*")):
        trouble = "an unfinished run; --resume goes on, --overwrite starts anew."
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
            f"{path}: the run was begun with another {listed(changed)}; put it back, or --overwrite."
        )
