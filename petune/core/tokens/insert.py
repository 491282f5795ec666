"""Virtual tokens go into what a model is called with, and their results come out of what it gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from petune.core.method.batch import SKIP
from petune.core.tokens.layout import Layout

Spread = Callable[[Tensor], Tensor]
BY_TOKEN = {"start_logits": 2, "end_logits": 2, "encoder_last_hidden_state": 3}
"""The fields of a model's output that have an entry for each token of its input, and how many dimensions."""
BY_TOKEN_OF_ONE_STACK = {"logits": 3, "last_hidden_state": 3}


class Insertion:
    """The virtual tokens of one call.

    Args:
        rows: the rows of the table of all prompts, (virtual tokens, hidden), asked for where embeddings are given.
    """

    def __init__(
        self, model: Any, layout: Layout, vocabulary: int, rows: Callable[[], Tensor]
    ) -> None:
        self.model, self.layout, self.vocabulary, self.rows = (
            model,
            layout,
            vocabulary,
            rows,
        )
        self.one_stack = not model.config.is_encoder_decoder
        self.shape = (layout.source.shape[0], layout.tokens)

    def into(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """What the model is to be called with."""
        out = dict(
            arguments, attention_mask=self.layout.mask(arguments.get("attention_mask"))
        )
        for name, value in arguments.items():
            if isinstance(value, Tensor) and name != "attention_mask":
                spread = self._spread(name, value)
                out[name] = value if spread is None else spread(value)
        return out

    def _spread(self, name: str, value: Tensor) -> Spread | None:
        """How an argument follows the columns; None for one that has no entry for each token."""
        layout = self.layout
        known: dict[str, Spread] = {
            "input_ids": self._ids,
            "inputs_embeds": self._embeddings,
            "position_ids": layout.positions,
            "start_positions": self._moved,
            "end_positions": self._moved,
            "token_type_ids": lambda types: layout.spread(types, types[:, :1], 0),
        }
        if name in known:
            return known[name]
        if not self.one_stack or value.shape[:2] != self.shape:
            return None
        if name == "labels":
            return (
                (lambda labels: layout.spread(labels, SKIP, SKIP))
                if value.dim() == 2
                else None
            )
        return lambda other: layout.spread(
            other, 0, 0
        )  # boxes of a layout, logits to keep

    def _ids(self, ids: Tensor) -> Tensor:
        pad = getattr(self.model.config, "pad_token_id", None) or 0
        return self.layout.spread(ids, self.layout.virtual + self.vocabulary, pad)

    def _embeddings(self, embeddings: Tensor) -> Tensor:
        rows = self.rows().to(embeddings)
        return self.layout.spread(embeddings, rows[self.layout.virtual.clamp(min=0)], 0)

    def _moved(self, columns: Tensor) -> Tensor:
        """Columns of the input, (batch,), where they are now."""
        at, count = self.layout.at[:, 0], self.layout.count[:, 0]
        return torch.where(columns >= at, columns + count, columns)

    def out_of(self, out: Any) -> Any:
        """What the model gives, without the results at virtual tokens."""
        fields = dict(BY_TOKEN)
        if self.one_stack or not self.model.can_generate():
            fields |= BY_TOKEN_OF_ONE_STACK
        get = getattr(out, "get", lambda name: None)
        for name, dims in fields.items():
            value = get(name)
            if (
                value is not None
                and value.dim() == dims
                and value.shape[1] == self.layout.length
            ):
                out[name] = self.layout.gather(value)
        return out
