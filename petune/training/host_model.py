"""What the training leans on in transformers' models that has no public name, each with a check that it still holds."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from petune.core.frozen.modules import base_class
from petune.core.host.seam import Seams
from petune.core.method.batch import SKIP
from petune.errors import UnsupportedError
from petune.training.bytecode import mentions, used_names

Loss = Callable[..., Tensor]

LOSSES = Seams()
"""The seams that `labelled_logits` needs."""


@LOSSES.lean(
    "transformers",
    "PreTrainedModel.loss_function, set as _loss_function",
    since="4.51",
    why="compute a loss without all logits",
)
def _loss_can_be_set() -> bool:
    from transformers import LlamaForCausalLM

    model: Any = object.__new__(PreTrainedModel)  # without weights
    nn.Module.__init__(model)
    loss = F.cross_entropy
    with loss_as(model, loss):
        replaced = model.loss_function is loss
    return (
        replaced
        and "_loss_function" not in vars(model)
        and _asks_for_loss(LlamaForCausalLM)
    )


@contextmanager
def loss_as(model: Any, loss: Loss) -> Iterator[None]:
    """Within the context the model computes its loss by another function."""
    before = vars(model).get("_loss_function")
    model.loss_function = loss
    try:
        yield
    finally:
        del model._loss_function
        if before is not None:
            model.loss_function = before


@LOSSES.lean(
    "transformers",
    "transformers.loss.loss_utils.ForCausalLMLoss and ForMaskedLMLoss",
    since="4.50",
    why="compute the same loss from the labelled tokens alone",
)
def _losses_are_cross_entropies() -> bool:
    from transformers.loss.loss_utils import ForCausalLMLoss, ForMaskedLMLoss

    logits = torch.arange(16.0).view(1, 4, 4).sin()  # (batch, length, vocabulary)
    labels = torch.tensor([[3, SKIP, 1, 2]])
    for loss, expected in (
        (
            ForCausalLMLoss,
            F.cross_entropy(logits[0, 1:3], labels[0, 2:], reduction="sum"),
        ),
        (ForMaskedLMLoss, F.cross_entropy(logits[0], labels[0], reduction="sum")),
    ):
        found = loss(logits, labels, vocab_size=4, num_items_in_batch=torch.tensor(5))
        if not torch.allclose(found, expected / 5):
            return False
    return True


def predicts_next_token(model: Any) -> bool:
    """Whether the model's loss takes a token for the label of the one before it."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    return model.loss_function is ForCausalLMLoss


def has_token_loss(model: Any) -> bool:
    """Whether the model computes its loss by transformers' function for causal or for masked language models."""
    from transformers.loss.loss_utils import ForCausalLMLoss, ForMaskedLMLoss

    known = (ForCausalLMLoss, ForMaskedLMLoss)
    return _asks_for_loss(base_class(model)) and model.loss_function in known


def _asks_for_loss(cls: Any) -> bool:
    return "loss_function" in used_names(inspect.unwrap(cls.forward).__code__)


SEAMS = Seams()


@SEAMS.lean(
    "transformers",
    "activation_checkpointing (before 5.23 gradient_checkpointing) of TrainingArguments and models",
    since="4.35",
    why="compute blocks again in backward",
)
def _checkpointing_has_a_name() -> bool:
    from transformers import Trainer, TrainingArguments

    word = _checkpointing()
    names = {field.name for field in fields(TrainingArguments)}
    known = {word, f"{word}_kwargs"} <= names and mentions(Trainer, word)
    return (
        known
        and f"{word}_kwargs" in inspect.signature(_enabling(PreTrainedModel)).parameters
    )


def _checkpointing() -> str:
    """What the installed transformers calls it."""
    new, old = "activation_checkpointing", "gradient_checkpointing"
    return new if hasattr(PreTrainedModel, f"{new}_enable") else old


def _enabling(model: Any) -> Callable[..., None]:
    """The method that turns checkpointing on."""
    enable: Callable[..., None] = getattr(model, f"{_checkpointing()}_enable")
    return enable


def _takes_every() -> bool:
    """Whether transformers can leave blocks out: since 5.16."""
    return "every_n_layers" in inspect.signature(_enabling(PreTrainedModel)).parameters


def check_every(count: int) -> None:
    """See that the installed transformers can checkpoint every so many-th block.

    Raises:
        UnsupportedError: it checkpoints all blocks or none.
    """
    if count > 1 and not _takes_every():
        raise UnsupportedError(
            f"training.gradient_checkpointing: {count} leaves blocks out, which needs transformers 5.16; say true."
        )


def _every(count: int) -> dict[str, int]:
    check_every(count)
    return {"every_n_layers": count} if _takes_every() else {}


def checkpointing_arguments(every: int) -> dict[str, Any]:
    """What TrainingArguments take to compute every so many-th block again in backward; 0 is none.

    Raises:
        UnsupportedError: the installed transformers does it for all blocks or none.
    """
    word = _checkpointing()
    options = {"use_reentrant": False, **_every(every)} if every else None
    return {word: bool(every), f"{word}_kwargs": options}


def checkpoint_blocks(model: Any, every: int = 1) -> None:
    """Let a model compute every so many-th block again in backward.

    Raises:
        UnsupportedError: the installed transformers does it for all blocks or none.
    """
    options = {f"{_checkpointing()}_kwargs": {"use_reentrant": False}}
    _enabling(model)(**options, **_every(every))


@SEAMS.lean(
    "transformers",
    "PreTrainedModel.enable_input_require_grads, called where checkpointing is turned on",
    since="4.35",
    why="spare blocks below all adapters a backward",
)
def _checkpointing_asks_for_gradients() -> bool:
    return mentions(PreTrainedModel, "enable_input_require_grads")


@contextmanager
def plain_input(model: Any) -> Iterator[None]:
    """Within the context the embedding's output does not ask for a gradient where checkpointing is turned on. Only
    the reentrant kind needs that, and with it blocks below all adapters would have a graph.
    """
    model.enable_input_require_grads = lambda: None
    try:
        yield
    finally:
        del model.enable_input_require_grads


@SEAMS.lean(
    "transformers",
    "the attribute hf_quantizer of a quantized model, with is_serializable()",
    since="4.38",
    why="say before anything is written that quantized weights can't be saved",
)
def _quantizers_know_what_they_can_save() -> bool:
    from transformers.quantizers.base import HfQuantizer

    _, *others = inspect.signature(HfQuantizer.is_serializable).parameters.values()
    needs_nothing = all(
        parameter.default is not parameter.empty for parameter in others
    )
    used = used_names(inspect.unwrap(PreTrainedModel.save_pretrained).__code__)
    return needs_nothing and "is_serializable" in used


def can_save_quantized(model: Any) -> bool:
    """Whether transformers can save the quantized weights of a model as they are stored."""
    quantizer = getattr(model, "hf_quantizer", None)
    return quantizer is not None and bool(quantizer.is_serializable())
