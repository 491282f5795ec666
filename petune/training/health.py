"""Whether a training that came to its end, with finite weights, has still spoilt its model."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from petune.training.tasks import Example, Task

RISEN, WORSE = 3, 10
"""By how many times a loss, in training and on the test split, is above the first batch's in no healthy run; a first
loss below 1 counts as 1.
"""
LOOKED_AT, ASKED = 100, 8
"""Among how many rows those are that a model is tried on, and how many."""


def trouble(
    model: nn.Module,
    task: Task,
    examples: Sequence[Example],
    losses: tuple[float | None, float, float | None],
) -> str | None:
    """What is wrong with a model after its training, None if nothing shows.

    Args:
        examples: what it was trained on.
        losses: the first batch's, that of the last logging interval, and the test split's; None where there is none.
    """
    first, last, test = losses
    if first is not None:
        least = max(first, 1.0)
        if last > RISEN * least:
            return f"the loss has risen from {first:.3g} to {last:.3g}"
        if test is not None and test > WORSE * least:
            return f"the loss on the test split is {test:.3g}, where the first batch had {first:.3g}"
    if _answers_alike(model, task, examples):
        return "the model answers every row alike"
    return None


@torch.no_grad()
def _answers_alike(model: nn.Module, task: Task, examples: Sequence[Example]) -> bool:
    """Whether rows that differ get the same logits to the last bit, as where hidden states have overflown."""
    some = islice(examples, LOOKED_AT)
    distinct = {tuple(example["input_ids"]): example for example in some}
    rows = list(distinct.values())[:ASKED]
    was_training = model.training
    model.eval()
    try:
        found = [_logits(model, task, row) for row in rows]
    finally:
        model.train(was_training)
    first, *others = found
    return bool(others) and all(
        first is not None and other is not None and torch.equal(first, other)
        for other in others
    )


def _logits(model: nn.Module, task: Task, row: Example) -> Tensor | None:
    """Those of a row, or of its last token, (outputs,); None of a model that has none."""
    device = next(model.parameters()).device
    batch = {key: value.to(device) for key, value in task.collate([row]).items()}
    logits: Any = getattr(model(**batch), "logits", None)
    return logits.flatten(0, -2)[-1] if isinstance(logits, Tensor) else None
