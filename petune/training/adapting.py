"""What makes a recipe's model trainable: its method, or what a caller brings in its place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from petune.core.attached.attach import attach
from petune.core.attached.load import load
from petune.errors import PetuneError
from petune.training.checkpoints import resume_schedule
from petune.training.recipe import Recipe
from petune.training.run_folder import ADAPTER

if TYPE_CHECKING:
    from torch import nn

    from petune.training.trainer import Adapted

Adapt = Callable[["nn.Module", Recipe], "Adapted"]
"""What a caller brings: it makes the model trainable and returns what is trained."""
Checkpoint = tuple[Path, int]
"""The folder of a checkpoint, and its step."""


def adapted(
    model: Any, recipe: Recipe, checkpoint: Checkpoint | None, adapt: Adapt | None
) -> Adapted:
    """What is trained on a model, as the checkpoint has it if there is one.

    Raises:
        PetuneError: the method can't work with its arguments on this model, or the checkpoint does not fit.
    """
    folder = checkpoint[0] if checkpoint else None
    if adapt is not None:
        return _brought(adapt(model, recipe), folder)
    if folder is None:
        return _attached(model, recipe)
    tuning = load(model, folder / ADAPTER)
    resume_schedule(tuning, folder)
    return tuning


def _attached(model: Any, r: Recipe) -> Adapted:
    """The recipe's tuning on the model."""
    try:
        return attach(model, r.method, where=r.where, **r.method_args)
    except (PetuneError, torch.OutOfMemoryError):
        raise
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        # a value of the right type that the method can't work with, such as a rank of 0
        raise PetuneError(
            f"method {r.method!r} with method_args {r.method_args}: {error}"
        ) from error


def _brought(brought: Any, folder: Path | None) -> Adapted:
    """What a caller has made trainable."""
    if folder is not None:
        if not hasattr(brought, "load"):
            raise PetuneError(
                f"{folder}: what `adapt` made can't load a checkpoint; start anew with overwrite."
            )
        brought.load(folder / ADAPTER)
    adapted: Adapted = brought
    return adapted
