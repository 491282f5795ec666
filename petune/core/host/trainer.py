"""The flag by which transformers' Trainer knows a model with adapters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel

from petune.core.host.seam import Seams

SEAMS = Seams()
FLAG = "_hf_peft_config_loaded"


@SEAMS.lean(
    "transformers",
    f"PreTrainedModel.{FLAG}",
    since="4.33",
    why="let Trainer take a quantized base with adapters",
)
def _models_have_the_flag() -> bool:
    return getattr(PreTrainedModel, FLAG, None) is False


def say_adapted(model: Any) -> None:
    """Let Trainer take the model though its base is quantized."""
    setattr(model, FLAG, True)


def say_plain(model: Any) -> None:
    """Take back what `say_adapted` has said."""
    vars(model).pop(FLAG, None)


@contextmanager
def plain_for_a_while(model: Any) -> Iterator[None]:
    """Within the context the flag is off: `save_pretrained` would look for PEFT's adapters behind it."""
    flag = vars(model).pop(FLAG, None)
    try:
        yield
    finally:
        if flag is not None:
            setattr(model, FLAG, flag)
