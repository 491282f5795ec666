"""A language model's loss with logits only where there is a label, and of those only a few rows at a time."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss, ForMaskedLMLoss

from petune.core.frozen.modules import base_class, base_forward
from petune.core.graft.board import board_of
from petune.errors import PetuneError, UnsupportedError
from petune.training.swap import forward_as

ROWS = 128
"""How many rows of logits exist at a time."""
SKIP = -100
"""The label that a loss leaves out."""

Head = Callable[[Tensor], Tensor]


@contextmanager
def labelled_logits(model: nn.Module, rows: int = ROWS) -> Iterator[None]:
    """Within the context `model(**batch, labels=…).loss` is what it is otherwise, and its `logits` are left out.

    The model's forward runs as it is, but what it gets from its decoder is one row. When it comes to its loss, the
    head and whatever the model does behind it (soft-capping, a scale, an adapter) are applied to the labelled rows
    in chunks, each of which gives its gradients at once. Models that compute their loss without transformers' loss
    functions for causal and masked language models are left alone.
    """
    if not applies(model):
        yield
        return
    labelled = _Labelled(model, rows)
    before = vars(model).get("_loss_function")
    with forward_as(labelled.decoder, labelled.run):
        replaced: Any = model
        replaced.loss_function = labelled.loss
        try:
            yield
        finally:
            del replaced._loss_function
            if before is not None:
                replaced.loss_function = before


def applies(model: Any) -> bool:
    """The model has a decoder, a head behind it, and a loss that transformers computes from labels at every token."""
    if (
        not isinstance(model, PreTrainedModel)
        or model.config.is_encoder_decoder
        or model.base_model is model
    ):
        return False
    head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    known = (
        "loss_function" in inspect.unwrap(base_class(model).forward).__code__.co_names
    )
    return (
        head is not None
        and known
        and model.loss_function in (ForCausalLMLoss, ForMaskedLMLoss)
    )


class _Labelled:
    def __init__(self, model: Any, rows: int) -> None:
        decoder = model.get_decoder()
        self.model, self.rows = model, rows
        self.decoder = (
            decoder if decoder in set(model.base_model.modules()) else model.base_model
        )
        self.next = (
            model.loss_function is ForCausalLMLoss
        )  # a token is the label of the one before it
        self.inner = self.decoder.forward
        self.out: Any = None

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The decoder's forward; the caller sees one row of what it found."""
        self.out = self.inner(*args, **kwargs)
        return self._answer(self.out[0][:1, :1].detach())

    def loss(
        self,
        logits: Tensor,
        labels: Tensor,
        *_: Any,
        num_items_in_batch: Tensor | int | None = None,
        **__: Any,
    ) -> Tensor:
        """Takes the place of the model's loss function; the logits are those of the one row."""
        board = board_of(self.model)
        if board is not None and board.begin().plan is not None:
            raise UnsupportedError(
                "labelled_logits(): not within route(), which counts on whole rows."
            )
        hidden: Tensor | None = self.out and self.out[0]  # (batch, length, hidden)
        if hidden is None or labels.shape != hidden.shape[:2]:
            raise PetuneError(
                "training.labelled_logits: this model reads its labels otherwise; set it to false."
            )
        wanted = F.pad(labels, (0, 1), value=SKIP)[:, 1:] if self.next else labels
        rows = (wanted.flatten() != SKIP).nonzero().squeeze(1)
        picked = hidden.flatten(0, 1).index_select(0, rows)  # (labelled, hidden)
        targets = wanted.flatten().index_select(0, rows)
        outside = [c for c in self.model.children() if c is not self.model.base_model]
        params = {id(p): p for c in outside for p in c.parameters() if p.requires_grad}
        total: Tensor
        if torch.is_grad_enabled():
            total = _Chunked.apply(
                self.head, self.rows, targets, picked, *params.values()
            )  # type: ignore[no-untyped-call]
        else:
            total = picked.new_zeros((), dtype=torch.float32)
            for start in range(0, len(rows), self.rows):
                here = slice(start, start + self.rows)
                total += _loss(self.head(picked[here]), targets[here])
        self.out = None
        return total / (len(rows) if num_items_in_batch is None else num_items_in_batch)

    def head(self, hidden: Tensor) -> Tensor:
        """(n, hidden) -> (n, vocabulary): what the model does behind its decoder."""
        ids = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
        with forward_as(self.decoder, lambda *_, **__: self._answer(hidden[None])):
            logits: Tensor = base_forward(self.model)(input_ids=ids).logits
        return logits[0]

    def _answer(self, hidden: Tensor) -> Any:
        if isinstance(self.out, tuple):
            return hidden, *self.out[1:]
        return type(self.out)(**{**self.out, "last_hidden_state": hidden})


def _loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), targets, reduction="sum")


class _Chunked(torch.autograd.Function):
    """The summed loss of all rows. The gradient of a sum is known up to a factor when the sum is, so that every chunk
    computes its own in forward and its logits are gone before the next.
    """

    @staticmethod
    def forward(
        ctx: Any,
        head: Head,
        rows: int,
        targets: Tensor,
        hidden: Tensor,
        *params: Tensor,
    ) -> Tensor:
        ctx.wanted = [t.requires_grad for t in (hidden, *params)]
        sums = [torch.zeros_like(t) for t in (hidden, *params) if t.requires_grad]
        total = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, len(targets), rows):
            here = slice(start, start + rows)
            chunk = hidden[here].detach().requires_grad_(hidden.requires_grad)
            with torch.enable_grad():
                loss = _loss(head(chunk), targets[here])
            total += loss.detach()
            inputs = [t for t in (chunk, *params) if t.requires_grad]
            grads = (
                torch.autograd.grad(loss, inputs, allow_unused=True) if inputs else ()
            )
            for t, kept, grad in zip(inputs, sums, grads, strict=True):
                if grad is not None:
                    (kept[here] if t is chunk else kept).add_(grad)
        ctx.save_for_backward(*sums)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        sums = iter(ctx.saved_tensors)
        return (
            None,
            None,
            None,
            *(next(sums) * grad if wanted else None for wanted in ctx.wanted),
        )
