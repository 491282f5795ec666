"""What training and a finished run set up alike: the task, its rows, the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from petune.core.registry.plugins import registry
from petune.training.data import load_splits
from petune.training.recipe import Recipe
from petune.training.remarks import remark

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedModel

    from petune.training.tasks import Task


def make_task(recipe: Recipe, state: Mapping[str, Any] | None = None) -> Task:
    """The recipe's task with the model's tokenizer.

    Raises:
        PetuneError: no such task or model.
    """
    from petune.loading.models import load_tokenizer

    kind: type[Task] = registry().get("petune_tasks", recipe.task)
    task = kind(load_tokenizer(recipe.model), recipe)
    if state is not None:
        task.restore(state)
    return task


def make_splits(recipe: Recipe) -> dict[str, datasets.Dataset]:
    """The recipe's rows by split, columns by role.

    Raises:
        PetuneError: the data can't be read, or a role has no column in it.
    """
    kind: type[Task] = registry().get("petune_tasks", recipe.task)
    needed = (*kind.inputs, *kind.targets)
    return load_splits(recipe.data, recipe.columns, needed, kind.optional, kind.reads)


def make_model(recipe: Recipe, task: Task) -> PreTrainedModel:
    """The base model with the task's head, on the device.

    Raises:
        PetuneError: no such model or precision.
    """
    import torch

    from petune.loading.models import from_pretrained

    head = recipe.head or task.head
    seed = recipe.training.seed
    model: Any = from_pretrained(
        recipe.model,
        precision=recipe.precision,
        head=head,
        seed=seed,
        **task.model_args(),
    )
    places_itself = getattr(model, "is_quantized", False)
    if torch.cuda.is_available() and not places_itself:
        model.to("cuda")
    task.bind(model)
    task.embeddings = getattr(model.get_input_embeddings(), "num_embeddings", None)
    return model


def sample(rows: datasets.Dataset, most: int | None, what: str) -> datasets.Dataset:
    """At most so many rows, evenly spaced, after a word on those left out of what they are scored for."""
    if most is None or len(rows) <= most:
        return rows
    remark(
        f"{what}: {most} of {len(rows)} rows are scored, evenly spaced; training.eval_rows says how many."
    )
    return rows.select([i * len(rows) // most for i in range(most)])


@contextmanager
def quietly() -> Iterator[None]:
    """Within the context transformers and datasets show no progress bars and no warnings."""
    import datasets
    from transformers.utils import logging as untyped

    logging: Any = untyped
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        datasets.enable_progress_bars()
        if bars:
            logging.enable_progress_bar()
