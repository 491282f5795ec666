"""Fine-tuning on top of the core: recipes, data, tasks, the training loop, runs and what they cost."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from petune.tune.dataset import Dataset
    from petune.tune.logits import labelled_logits
    from petune.tune.loop import train
    from petune.tune.recipe import Recipe, Training, load_recipe
    from petune.tune.result import Result
    from petune.tune.run import Run, evaluate, export_run, load_run, merge_run, predict
    from petune.tune.tasks import Task

__all__ = [
    "Dataset",
    "Recipe",
    "Result",
    "Run",
    "Task",
    "Training",
    "evaluate",
    "export_run",
    "labelled_logits",
    "load_recipe",
    "load_run",
    "merge_run",
    "predict",
    "train",
]

_HOME = {
    "dataset": ("Dataset",),
    "recipe": ("Recipe", "Training", "load_recipe"),
    "result": ("Result",),
    "run": ("Run", "evaluate", "export_run", "load_run", "merge_run", "predict"),
    "tasks": ("Task",),
    "logits": ("labelled_logits",),
    "loop": ("train",),
}


def __getattr__(name: str) -> Any:
    # plugins import Task and Dataset from here, and `petune --help` loads every plugin: torch must stay out of it
    for module, names in _HOME.items():
        if name in names:
            value = getattr(import_module(f"petune.tune.{module}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
