"""What stands around the frozen model's forward: virtual tokens, and what adapters are told of the batch."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch

from petune.core.forward.forward_pass import ForwardPass, run
from petune.core.forward.link import Call
from petune.core.graft.board import Board
from petune.core.graft.generation import Generation
from petune.core.host.cache import cache_of, seen_tokens
from petune.core.tokens.cached import mask_beyond, note_virtual_tokens, noted_layout
from petune.core.tokens.insert import Insertion
from petune.core.tokens.layout import Layout, first_tokens
from petune.core.tokens.positions import batches, given_of
from petune.core.tokens.table import rows_of, spans_of

Arguments = dict[str, Any]
"""What the model is called with, by name."""


class ModelCall:
    """One call of an adapted model.

    Args:
        base: the frozen model's forward.
        forward: what its modules go by.
    """

    def __init__(
        self, model: Any, board: Board, base: Call, forward: ForwardPass
    ) -> None:
        self.model, self.board, self.base, self.forward = model, board, base, forward

    def by_itself(self, arguments: Arguments) -> Any:
        """The model is called by a user: with a batch, or with the next tokens of a decoding by hand."""
        given, plan = given_of(arguments), self.forward.plan
        if plan is not None and given is not None:
            plan.check(
                given.shape[0]
            )  # a batch that does not fit is refused before anything runs
        if given is None or not self.board.prompts(self.forward):
            return self._run(arguments)
        goes_on = (
            seen_tokens(arguments) > 0 and not self.model.config.is_encoder_decoder
        )
        return self._going_on(arguments) if goes_on else self._beginning(arguments)

    def _beginning(self, arguments: Arguments) -> Any:
        """Virtual tokens go in, and their results are taken out."""
        layout = layout_for(self.model, self.board, self.forward, arguments, left=False)
        insertion = insertion_of(self.model, self.board, self.forward, layout)
        out = self._run(insertion.into(arguments), layout)
        if not torch.compiler.is_compiling():
            cache = cache_of(out if isinstance(out, dict) else arguments)
            note_virtual_tokens(
                cache, layout, spans_of(self.board, self.forward, layout.rows)
            )
        return insertion.out_of(out)

    def _going_on(self, arguments: Arguments) -> Any:
        """The cache has them already."""
        given, cache = given_of(arguments), cache_of(arguments)
        assert given is not None
        layout = noted_layout(cache, spans_of(self.board, self.forward, given.shape[0]))
        columns = seen_tokens(arguments) + given.shape[1]
        mask = mask_beyond(layout, arguments.get("attention_mask"), columns)
        self.forward = replace(self.forward, may_have_virtual=False)
        return self._run({**arguments, "attention_mask": mask}, layout)

    def in_generation(self, generation: Generation, arguments: Arguments) -> Any:
        """A step of `generate`, which has put the virtual tokens in."""
        given = given_of(arguments)
        given = given_of(arguments, "decoder_") if given is None else given
        if given is not None:
            self.forward = generation.at_step(
                self.forward, given, seen_tokens(arguments)
            )
        return self._run(arguments, generation.layout, generation)

    def _run(
        self,
        arguments: Arguments,
        layout: Layout | None = None,
        generation: Generation | None = None,
    ) -> Any:
        """The frozen model's forward, and what its adapters ask for of the batch."""
        forward = told(
            self.model, self.board, self.forward, arguments, layout, generation
        )
        with run(forward):
            return self.base(**arguments)


def told(
    model: Any,
    board: Board,
    forward: ForwardPass,
    arguments: Arguments,
    layout: Layout | None,
    generation: Generation | None,
) -> ForwardPass:
    """A fresh forward pass, which is told of the batch if an adapter that acts in it asks."""
    fresh = replace(forward, inputs={}, notes={})
    if not board.reads_batch(forward):
        return fresh
    virtual = layout.virtual >= 0 if layout is not None else None
    found = batches(model, arguments, virtual=virtual, generation=generation)
    return replace(fresh, batches=found)


def layout_for(
    model: Any, board: Board, forward: ForwardPass, arguments: Arguments, *, left: bool
) -> Layout:
    """Where virtual tokens go in: before the first token, behind the first in an encoder, whose class is read from
    that.
    """
    given = given_of(arguments)
    assert given is not None
    rows, tokens = given.shape[:2]
    at = first_tokens(arguments.get("attention_mask"))
    is_encoder = not board.causal and not model.config.is_encoder_decoder
    spans = spans_of(board, forward, rows)
    return Layout.of(spans, tokens, given.device, at=at + is_encoder, left=left)


def insertion_of(
    model: Any, board: Board, forward: ForwardPass, layout: Layout
) -> Insertion:
    """What puts the virtual tokens of a forward in."""
    rows = partial(rows_of, board.prompts(forward))
    return Insertion(model, layout, board.vocabulary, rows)
