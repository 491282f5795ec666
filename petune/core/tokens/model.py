"""Virtual tokens: ids past the vocabulary, which the embedding answers with learned rows. Positions, masks, caches
and `generate` see ordinary tokens, so they need no code.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from transformers import LogitsProcessorList

from petune.core.forward.chain import Call
from petune.core.graft.board import _asked, prompts, rows_of, table_of
from petune.core.graft.module import Grafted, graft_of
from petune.core.method.batch import SKIP
from petune.core.tokens.layout import Layout
from petune.core.tokens.positions import batches, given_of
from petune.core.tokens.prompts import _columns, _PastPrompt


class Prompted(Grafted):
    """The mixin of the model itself: virtual tokens go in before the forward and their results are taken out."""

    config: Any

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        graft = graft_of(self)
        base = graft.hooked or super(Grafted, self).forward
        board = graft.board
        asked = _asked(board)
        if not (asked or board.plan or prompts(board)):
            return base(*args, **kwargs)
        kwargs.update(zip(graft.parameters, args, strict=False))
        if board.plan is not None and (given := given_of(kwargs)) is not None:
            board.plan.repeated(
                given.shape[0]
            )  # refuses a batch that does not fit, before anything runs
        run = partial(self._telling, base) if asked else base
        layout = self._layout(kwargs, left=False) if board.inserted is None else None
        if layout is None:
            return run(**kwargs)
        return self._without(run(**self._with(kwargs, layout)), layout)

    def _telling(self, base: Call, *args: Any, **kwargs: Any) -> Any:
        """`base`, while adapters that ask for the batch get it; again in the backward of what comes out, where
        gradient checkpointing runs them once more.
        """
        board = graft_of(self).board
        board.batch = batch = batches(self, board, kwargs, bool(prompts(board)))
        try:
            out = base(*args, **kwargs)
        finally:
            board.batch = {}
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            for tensor in tree_leaves(out):
                if isinstance(tensor, Tensor) and tensor.requires_grad:
                    tensor.register_hook(lambda _: setattr(board, "batch", batch))  # type: ignore[no-untyped-call]
        return out

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        board = graft_of(self).board
        if inputs is not None:
            kwargs["input_ids"] = inputs
        layout = self._layout(kwargs, left=True)
        has_ids = kwargs.get("input_ids") is not None and not self.config.is_encoder_decoder
        try:
            if layout is not None:
                kwargs = self._with(kwargs, layout)
                board.inserted = layout.added if has_ids else 0
                if has_ids and kwargs.get("max_length") is not None:
                    kwargs["max_length"] += board.inserted
            board.prompted = _columns(self, kwargs)
            out = super().generate(*args, **kwargs)  # type: ignore[misc]
            if board.inserted and isinstance(out, Tensor):
                return out[:, board.inserted :]
            if board.inserted:
                out.sequences = out.sequences[:, board.inserted :]
            return out
        finally:
            board.inserted = board.prompted = board.mask = None

    def _maybe_prepare_encoder_kwargs_for_generation(
        self, inputs: Tensor, kwargs: dict[str, Any], *rest: Any
    ) -> Any:
        """Before the first forward of `generate`, whose mask may have four dimensions and tell no tokens any more."""
        board = graft_of(self).board
        board.mask = kwargs.get("attention_mask")
        if self.config.is_encoder_decoder and _asked(board):  # `generate` runs an encoder by itself
            board.batch = batches(
                self, board, {**kwargs, "input_ids": inputs}, bool(prompts(board))
            )
        return super()._maybe_prepare_encoder_kwargs_for_generation(inputs, kwargs, *rest)  # type: ignore[misc]

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> LogitsProcessorList:
        found = super()._get_logits_processor(*args, **kwargs)  # type: ignore[misc]
        columns = graft_of(self).board.inserted
        return LogitsProcessorList([_PastPrompt(p, columns) for p in found]) if columns else found

    def _layout(self, kwargs: dict[str, Any], left: bool) -> Layout | None:
        """The layout for this call, None where nothing is to be put in: decoding goes on from a cache that has it."""
        board = graft_of(self).board
        given = given_of(kwargs)
        if given is None or not prompts(board):
            return None
        at = 0 if self.config.is_encoder_decoder or board.causal else 1
        layout = Layout.of(rows_of(board, given.shape[0]), given.shape[1], at, left, given.device)
        past = kwargs.get("past_key_values")
        if past is not None and past.get_seq_length() > 0:
            mask = kwargs.get("attention_mask")
            if mask is not None and mask.shape[-1] < past.get_seq_length() + given.shape[1]:
                kwargs["attention_mask"] = torch.cat(
                    [mask.new_ones(mask.shape[0], layout.added), mask], 1
                )
            return None
        return layout

    def _with(self, kwargs: dict[str, Any], layout: Layout) -> dict[str, Any]:
        pad = getattr(self.config, "pad_token_id", None) or 0
        out = dict(kwargs, attention_mask=layout.mask(kwargs.get("attention_mask")))
        shape = (layout.source.shape[0], layout.tokens)
        for key, value in kwargs.items():
            if key == "attention_mask" or not isinstance(value, Tensor):
                continue
            if key == "input_ids":
                out[key] = layout.spread(
                    value, layout.virtual + graft_of(self).board.vocabulary, pad
                )
            elif key == "inputs_embeds":
                rows = table_of(graft_of(self).board).to(value)
                out[key] = layout.spread(value, rows[layout.virtual.clamp(min=0)], 0)
            elif key == "position_ids":
                token = torch.arange(layout.tokens, device=value.device)
                moved = value + torch.where(token < layout.at, 0, layout.count)
                out[key] = layout.spread(moved, layout.at + layout.virtual - layout.start, 0)
            elif key in ("start_positions", "end_positions"):
                out[key] = torch.where(value >= layout.at, value + layout.count[:, 0], value)
            elif key == "labels" and value.shape == shape and not self.config.is_encoder_decoder:
                out[key] = layout.spread(value, SKIP, SKIP)
            elif key == "token_type_ids":
                out[key] = layout.spread(value, value[:, :1], 0)
            elif (
                value.shape[:2] == shape and not self.config.is_encoder_decoder
            ):  # boxes of a layout, logits to keep
                out[key] = layout.spread(value, 0, 0)
        return out

    def _without(self, out: Any, layout: Layout) -> Any:
        length = layout.source.shape[1]
        fields = {"start_logits": 2, "end_logits": 2, "encoder_last_hidden_state": 3}
        if not self.config.is_encoder_decoder or not self.can_generate():  # type: ignore[operator]
            fields |= {"logits": 3, "last_hidden_state": 3}
        for key, dims in fields.items():
            value = out.get(key) if hasattr(out, "get") else None
            if value is not None and value.dim() == dims and value.shape[1] == length:
                out[key] = layout.gather(value)
        return out

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """The base's own: transformers would look for adapters of PEFT behind the flag that Trainer needs."""
        flag = self.__dict__.pop("_hf_peft_config_loaded", None)
        try:
            return super().save_pretrained(*args, **kwargs)  # type: ignore[misc]
        finally:
            if flag is not None:
                self._hf_peft_config_loaded = flag
