"""Virtual tokens: ids past the vocabulary, which the embedding answers with learned rows. Positions, masks, caches
and `generate` see ordinary tokens, so they need no code.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import LogitsProcessor, LogitsProcessorList

from petune.batch import SKIP, batches, given_of
from petune.graft import Board, Call, Grafted, Link, graft_of

if TYPE_CHECKING:
    from petune.tuning import Tuning


@dataclass
class Layout:
    """Where a batch's tokens go when virtual tokens come in at column `at`.

    `source` (batch, length) is the token that a column holds and -1 if none; `virtual` is the row of the prompt
    table and -1 if none; where both are -1 there is padding. `columns` (batch, tokens) says where the tokens went.
    """

    at: int
    tokens: int
    padded: bool
    start: Tensor
    count: Tensor
    source: Tensor
    virtual: Tensor
    columns: Tensor

    @classmethod
    def of(cls, spans: list[tuple[int, int]], tokens: int, at: int, left: bool, device: torch.device) -> Layout:
        """Row i gets the rows of the table that `spans[i]` says, (start, count). Shorter rows are padded on the
        right, where positions stay what they are without the others; on the left for generation.
        """
        start, count = torch.tensor(spans, device=device)[..., None].unbind(1)  # (batch, 1) each
        least, most = min(n for _, n in spans), max(n for _, n in spans)
        shift = most - count if left else torch.zeros_like(count)
        column = torch.arange(most + tokens, device=device)[None] - shift
        is_virtual = (column >= at) & (column < at + count)
        source = torch.where(column < at, column, column - count)
        source = torch.where(is_virtual | (column < 0) | (source >= tokens), -1, source)
        token = torch.arange(tokens, device=device)[None]
        columns = token + torch.where(token < at, 0, count) + shift
        virtual = torch.where(is_virtual, start + column - at, -1)
        return cls(at, tokens, least < most, start, count, source, virtual, columns)

    @property
    def added(self) -> int:
        """How many columns come in."""
        return self.source.shape[1] - self.tokens

    def spread(self, tensor: Tensor, virtual: Tensor | float, padding: float) -> Tensor:
        """(batch, tokens, …) -> (batch, length, …), with values for the new columns."""
        shape = (*self.source.shape, *(1,) * (tensor.dim() - 2))
        rows = torch.arange(tensor.shape[0], device=tensor.device)[:, None]
        out = tensor[rows, self.source.clamp(min=0)]
        fill = torch.as_tensor(virtual, device=tensor.device, dtype=tensor.dtype)
        out = torch.where((self.virtual >= 0).view(shape), fill, out)
        empty = torch.as_tensor(padding, device=tensor.device, dtype=tensor.dtype)
        return torch.where(((self.virtual < 0) & (self.source < 0)).view(shape), empty, out)

    def gather(self, tensor: Tensor) -> Tensor:
        """(batch, length, …) -> (batch, tokens, …): the results at the tokens."""
        if self.at == 0 and not self.padded:
            return tensor[:, tensor.shape[1] - self.tokens :]
        rows = torch.arange(tensor.shape[0], device=tensor.device)[:, None]
        return tensor[rows, self.columns]

    def mask(self, mask: Tensor | None) -> Tensor | None:
        """The attention mask, (batch, tokens) or (batch, 1, queries, keys), with the virtual tokens seen by all."""
        if mask is None:
            return (self.source.ge(0) | self.virtual.ge(0)).long() if self.padded else None
        if mask.dim() == 2:
            return self.spread(mask, 1, 0)
        seen, hidden = (True, False) if mask.dtype == torch.bool else (0.0, torch.finfo(mask.dtype).min)
        by_key = self.spread(mask.permute(0, 3, 2, 1), seen, hidden).permute(0, 3, 2, 1)
        own = torch.where(self.virtual >= 0, 1.0, 0.0)[:, None, None, :]  # a virtual token sees those up to itself
        own = own * torch.ones_like(own).expand(-1, -1, own.shape[-1], -1).tril()
        rows = own.bool() if mask.dtype == torch.bool else torch.where(own.bool(), seen, hidden).to(mask.dtype)
        out = self.spread(by_key.transpose(1, 2), 0, 0).transpose(1, 2)
        return torch.where((self.source >= 0)[:, None, :, None], out, rows)


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
            board.plan.repeated(given.shape[0])  # refuses a batch that does not fit, before anything runs
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

    def _maybe_prepare_encoder_kwargs_for_generation(self, inputs: Tensor, kwargs: dict[str, Any], *rest: Any) -> Any:
        """Before the first forward of `generate`, whose mask may have four dimensions and tell no tokens any more."""
        board = graft_of(self).board
        board.mask = kwargs.get("attention_mask")
        if self.config.is_encoder_decoder and _asked(board):  # `generate` runs an encoder by itself
            board.batch = batches(self, board, {**kwargs, "input_ids": inputs}, bool(prompts(board)))
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
                kwargs["attention_mask"] = torch.cat([mask.new_ones(mask.shape[0], layout.added), mask], 1)
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
                out[key] = layout.spread(value, layout.virtual + graft_of(self).board.vocabulary, pad)
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
            elif value.shape[:2] == shape and not self.config.is_encoder_decoder:  # boxes of a layout, logits to keep
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


def _serving(board: Board) -> list[Tuning]:
    """The tunings that act now."""
    return [t for t in board.tunings.values() if (t.name in board.plan.names if board.plan else t.enabled)]


def _asked(board: Board) -> bool:
    """An adapter that acts now wants to know the batch."""
    return any(tuning.reads for tuning in _serving(board))


def prompts(board: Board) -> list[Link]:
    """The prompts that act now."""
    return [link for tuning in _serving(board) for link in tuning.prompts]


def table_of(board: Board) -> Tensor:
    """The rows of all serving prompts, (virtual tokens, hidden)."""
    return torch.cat([link.adapter() for link in prompts(board)])


def rows_of(board: Board, batch: int) -> list[tuple[int, int]]:
    """For each row of the batch where its virtual tokens start in the table, and how many they are."""
    spans: dict[str | None, tuple[int, int]] = {}
    end = 0
    for link in prompts(board):
        length = int(link.adapter.length)  # type: ignore[arg-type]
        start, count = spans.get(link.tuning.name, (end, 0))
        spans[link.tuning.name] = start, count + length
        end += length
    if board.plan is None:
        return [(0, end)] * batch
    return [spans.get(name, (0, 0)) for name in board.plan.repeated(batch)]


def is_causal(model: nn.Module) -> bool:
    """A decoder reads left to right; an encoder's first token is the one that its classes are read from."""
    flags = [m.is_causal for m in model.modules() if isinstance(getattr(m, "is_causal", None), bool)]
    return any(flags) if flags else bool(model.can_generate())  # type: ignore[operator]
