"""Virtual tokens: ids past the vocabulary, which the embedding answers with learned rows. Positions, masks, caches
and `generate` see ordinary tokens, so they need no code.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from petune.core.graft.board import prompts, table_of
from petune.core.graft.module import Grafted, graft_of


class Table(Grafted):
    """The mixin of the input embedding, which answers virtual ids."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        board = graft_of(self).board
        if not prompts(board):
            return super().forward(*args, **kwargs)
        ids = args[0] if args else kwargs["input"]
        virtual = ids >= board.vocabulary
        out = super().forward(ids.masked_fill(virtual, 0))
        rows = table_of(board).to(out)
        if rows.shape[-1] != out.shape[-1]:  # a second table that the model looks ids up in
            return out
        return torch.where(virtual[..., None], rows[(ids - board.vocabulary).clamp(min=0)], out)


class _PastPrompt(LogitsProcessor):
    """A logits processor that does not see the virtual tokens, whose ids it could not look up."""

    def __init__(self, inner: LogitsProcessor, columns: int) -> None:
        self.inner, self.columns = inner, columns

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return self.inner(input_ids[:, self.columns :], scores)


def _columns(model: Any, kwargs: dict[str, Any]) -> int:
    """How many columns the prompts take that `generate` is given: an encoder-decoder's are those it decodes from."""
    of = "decoder_" if model.config.is_encoder_decoder else ""
    found = (kwargs.get(of + key) for key in ("input_ids", "inputs_embeds", "attention_mask"))
    return max((tensor.shape[1] for tensor in found if tensor is not None), default=1)
