"""Which of the optimizers that transformers' Trainer knows can train a tuning here."""

from __future__ import annotations

from dataclasses import fields
from types import SimpleNamespace
from typing import Any

from transformers import Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

from petune.errors import PetuneError, unknown

_PROJECTED = "projects the gradients of whole weights, which a tuning does not train"
_FUSED = "steps within the backward, where gradients can be neither added up nor cut"
UNFIT = {
    "galore": _PROJECTED,
    "apollo": _PROJECTED,
    "lomo": _FUSED,
    "adalomo": _FUSED,
    "schedule_free": "scores other weights than those that it trains",
}
"""The optimizers that petune does not train by, by how their names begin, and why."""


def check_optimizer(name: str) -> None:
    """See that there is such an optimizer, that it fits, and that its package is installed.

    Raises:
        PetuneError: one of them does not hold.
    """
    known = [optimizer.value for optimizer in OptimizerNames]
    if name not in known:
        raise PetuneError(f"training.optimizer: {unknown('value', name, known)}")
    for beginning, why in UNFIT.items():
        if name.startswith(beginning):
            raise PetuneError(
                f"training.optimizer: {name!r} {why}; take another, such as adamw_torch."
            )
    # no TrainingArguments: making them looks for devices and for other processes
    defaults = {field.name: field.default for field in fields(TrainingArguments)}
    arguments: Any = SimpleNamespace(**{**defaults, "optim": name})
    try:
        Trainer.get_optimizer_cls_and_kwargs(arguments)
    except (ImportError, RuntimeError, ValueError) as error:
        said = " ".join(str(error).split()).rstrip(".")
        raise PetuneError(
            f"training.optimizer: {name!r} can't be had here: {said}."
        ) from None
