"""A language model's loss with logits only where there is a label, and of those only a few rows at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from petune.core.frozen.modules import base_forward
from petune.core.graft.board import board_of
from petune.core.method.batch import SKIP
from petune.errors import PetuneError, UnsupportedError
from petune.training.chunked_loss import ChunkedLoss, chunks, token_loss
from petune.training.host_model import (
    LOSSES,
    has_token_loss,
    loss_as,
    predicts_next_token,
)
from petune.training.swap import forward_as

ROWS = 128
"""How many rows of logits exist at a time."""


@contextmanager
def labelled_logits(model: nn.Module, rows: int = ROWS) -> Iterator[None]:
    """Within the context `model(**batch, labels=…).loss` is what it is otherwise, and its `logits` are left out.

    The model's forward runs as it is, but what it gets from its decoder is one row. When it comes to its loss, the
    head and whatever the model does behind it (soft-capping, a scale, an adapter) are applied to the labelled rows
    in chunks, each of which gives its gradients at once. Models that compute their loss without transformers' loss
    functions for causal and masked language models are left alone.

    Args:
        rows: how many rows of logits, each as long as the vocabulary, exist at a time.

    Raises:
        MovedError: transformers computes losses in another way than petune knows.
    """
    LOSSES.require()
    if not applies(model):
        yield
        return
    labelled = _Labelled(model, rows)
    with forward_as(labelled.decoder, labelled.run), loss_as(model, labelled.loss):
        yield


def applies(model: Any) -> bool:
    """The model has a decoder, a head behind it, and a loss that transformers computes from labels at every token."""
    if not isinstance(model, PreTrainedModel) or model.config.is_encoder_decoder:
        return False
    if model.base_model is model:
        return False
    head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    return head is not None and has_token_loss(model)


def is_routed(model: nn.Module) -> bool:
    """Whether the rows of a batch go to tunings of their own."""
    board = board_of(model)
    return board is not None and board.begin().plan is not None


class LabelledDecoder:
    """A model whose decoder tells its caller of one row alone, and whose head is applied to chosen rows.

    Args:
        rows: how many rows of logits exist at a time.
    """

    def __init__(self, model: Any, rows: int = ROWS) -> None:
        decoder = model.get_decoder()
        is_inside = decoder in set(model.base_model.modules())
        self.model, self.rows = model, rows
        self.decoder = decoder if is_inside else model.base_model
        self.encoder = getattr(model, "encoder", None)
        self.inner = self.decoder.forward
        self.out: Any = None

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The decoder's forward; the caller sees one row of what it found."""
        self.out = self.inner(*args, **kwargs)
        return self.answer(self.out[0][:1, :1].detach())

    def answer(self, hidden: Tensor) -> Any:
        """The decoder's last output with other hidden states in it."""
        if isinstance(self.out, tuple):
            return hidden, *self.out[1:]
        return type(self.out)(**{**self.out, "last_hidden_state": hidden})

    def summed(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, int]:
        """The summed loss of the labelled tokens, and how many there are.

        Args:
            hidden: (batch, length, hidden).
            targets: (batch, length), `SKIP` where there is no label.
        """
        labels = targets.flatten()
        rows = (labels != SKIP).nonzero().squeeze(1)
        picked = hidden.flatten(0, 1).index_select(0, rows)  # (labelled, hidden)
        return self._summed(picked, labels.index_select(0, rows)), len(rows)

    def head(self, hidden: Tensor) -> Tensor:
        """(n, hidden) -> (n, vocabulary): what the model does behind its decoder."""
        ids = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
        with forward_as(self.decoder, lambda *_, **__: self.answer(hidden[None])):
            logits: Tensor = base_forward(self.model)(**self.head_inputs(ids)).logits
        return logits[0]

    def head_inputs(self, ids: Tensor) -> dict[str, Any]:
        """What the model is called with where its head alone is wanted."""
        return {"input_ids": ids}

    def _summed(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """The sum of the losses of hidden states (labelled, hidden) with targets (labelled,)."""
        if torch.is_grad_enabled():
            total: Tensor = ChunkedLoss.apply(  # type: ignore[no-untyped-call]
                self.head, self.rows, targets, hidden, *self._trained()
            )
            return total
        total = hidden.new_zeros((), dtype=torch.float32)
        for here in chunks(len(targets), self.rows):
            total += token_loss(self.head(hidden[here]), targets[here])
        return total

    def _trained(self) -> Iterable[nn.Parameter]:
        """The parameters outside the base model that train, each once."""
        found: dict[int, nn.Parameter] = {}
        for child in self.model.children():
            inside = {*child.modules(), child}
            if self.decoder not in inside and child is not self.encoder:
                found |= {id(p): p for p in child.parameters() if p.requires_grad}
        return found.values()


class _Labelled(LabelledDecoder):
    """One model's decoder and loss, as they are within `labelled_logits`."""

    def __init__(self, model: Any, rows: int) -> None:
        super().__init__(model, rows)
        self.shifted = predicts_next_token(model)

    def loss(
        self,
        logits: Tensor,
        labels: Tensor,
        *_: Any,
        num_items_in_batch: Tensor | int | None = None,
        **__: Any,
    ) -> Tensor:
        """Takes the place of the model's loss function; the logits are those of the one row."""
        hidden = self._hidden(labels)  # (batch, length, hidden)
        targets = F.pad(labels, (0, 1), value=SKIP)[:, 1:] if self.shifted else labels
        total, count = self.summed(hidden, targets)
        self.out = None
        return total / (count if num_items_in_batch is None else num_items_in_batch)

    def _hidden(self, labels: Tensor) -> Tensor:
        """What the decoder has found.

        Raises:
            UnsupportedError: the batch is routed.
            PetuneError: it does not belong to the labels.
        """
        if is_routed(self.model):
            raise UnsupportedError(
                "labelled_logits(): not within route(), which counts on whole rows."
            )
        hidden: Tensor | None = self.out and self.out[0]
        if hidden is None or labels.shape != hidden.shape[:2]:
            raise PetuneError(
                "training.labelled_logits: this model reads its labels otherwise; set it to false."
            )
        return hidden
