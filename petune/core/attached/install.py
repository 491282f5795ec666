"""A tuning: the adapters of a method, or of several, on one model under one name."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from petune.core.attached.tuning import Tuning
from petune.core.frozen.modules import input_table, is_causal, tables, walk
from petune.core.frozen.weights import is_quantized
from petune.core.graft.attend import install
from petune.core.graft.board import Board, board_of
from petune.core.graft.module import Grafted, add, hold
from petune.core.tokens.model import Prompted
from petune.core.tokens.prompts import Table

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def _install(model: PreTrainedModel, tuning: Tuning) -> Tuning:
    """Nothing can fail from here on: the adapters are put in, the base is frozen."""
    board = board_of(model) or Board()
    if not board.tunings:
        board.flags = {n: p.requires_grad for n, p in model.named_parameters()}
        board.causal, table = is_causal(model), input_table(model)
        board.vocabulary = len(table.weight) if table is not None else 0
        model.requires_grad_(False)
        if any(is_quantized(m) for _, m in walk(model)):
            model._hf_peft_config_loaded = True  # Trainer refuses a quantized model without it
    hold(model, board, Prompted)
    board.tunings[tuning.name] = tuning
    least = torch.float64 if model.dtype == torch.float64 else torch.float32
    encoder_decoder = tuning.reads and model.config.is_encoder_decoder
    decoder = set(model.get_decoder().modules()) if encoder_decoder else None  # type: ignore[no-untyped-call]
    for link in tuning.links:
        link.stack = "decoder" if decoder is None or link.site.module in decoder else "encoder"
        anchor = next(link.site.module.parameters(), None)
        link.adapter.to(device=anchor.device if anchor is not None else None, dtype=least)
        link.adapter.train(model.training)
        add(link, board, Table if isinstance(link.site.module, nn.Embedding) else Grafted)
        if link.site.kind == "prompt":
            for embedding in tables(model):
                hold(embedding, board, Table)
        elif link.site.kind == "attention":
            install()
    return tuning
