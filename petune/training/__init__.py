"""Fine-tuning on top of the core: recipes, data, tasks, the training loop, runs and what they cost."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from petune.training.dataset import Dataset
    from petune.training.logits import labelled_logits
    from petune.training.loop import train
    from petune.training.recipe import Recipe, load_recipe
    from petune.training.result import Result
    from petune.training.run import (
        Run,
        evaluate,
        export_run,
        load_run,
        merge_run,
        predict,
    )
    from petune.training.settings import Training
    from petune.training.tasks import Task
    from petune.training.values import as_label, as_text, as_texts

__all__ = [
    "Dataset",
    "Recipe",
    "Result",
    "Run",
    "Task",
    "Training",
    "as_label",
    "as_text",
    "as_texts",
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
    "recipe": ("Recipe", "load_recipe"),
    "result": ("Result",),
    "run": ("Run", "evaluate", "export_run", "load_run", "merge_run", "predict"),
    "settings": ("Training",),
    "tasks": ("Task",),
    "values": ("as_label", "as_text", "as_texts"),
    "logits": ("labelled_logits",),
    "loop": ("train",),
}


def __getattr__(name: str) -> Any:
    # plugins import Task and Dataset from here, and `petune --help` loads every plugin: torch must stay out of it
    for module, names in _HOME.items():
        if name in names:
            value = getattr(import_module(f"petune.training.{module}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
