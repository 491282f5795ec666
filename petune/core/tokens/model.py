"""The mixin of the model itself: what a forward and a `generate` begin and end with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from petune.core.forward.forward_pass import ForwardPass, Remembering, run
from petune.core.forward.link import Call
from petune.core.graft.board import Board
from petune.core.graft.generation import Generation
from petune.core.graft.module import Grafted, graft_of
from petune.core.host.cache import cache_of, seen_tokens, under_its_name
from petune.core.host.checkpointing import Checkpointing, checkpoint_with, checkpointed
from petune.core.host.generation import Generating
from petune.core.host.trainer import plain_for_a_while
from petune.core.method.derived import parameters_stay
from petune.core.tokens.cached import mask_beyond, note_virtual_tokens, noted_layout
from petune.core.tokens.generating import (
    PlainStreamer,
    generate_as,
    generation_of,
    longer,
    plain_criteria,
    plain_lengths,
    plain_processors,
)
from petune.core.tokens.insert import Insertion
from petune.core.tokens.layout import Layout, first_tokens
from petune.core.tokens.positions import batches, given_of
from petune.core.tokens.table import rows_of, spans_of
from petune.errors import UnsupportedError


class AdaptedModel(Generating, Checkpointing, Grafted):
    """The mixin of the model itself. A forward begins with the settings of its context and keeps them; virtual tokens
    go in before it, and their results are taken out behind it.
    """

    signed = ("forward", "prepare_inputs_for_generation")
    config: Any

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        graft = graft_of(self)
        base = self.petune_hooked or super(Grafted, self).forward
        with _inside(graft.board):
            generation = generation_of(graft.board)
            forward = graft.board.begin() if generation is None else generation.forward
            kwargs = under_its_name(kwargs, graft.parameters)
            if _is_plain(graft.board, forward):
                with run(forward):
                    return base(*args, **kwargs)
            kwargs.update(zip(graft.parameters, args, strict=False))
            if generation is None:
                return self._forward(base, forward, kwargs)
            return self._forward_in_generation(base, generation, kwargs)

    def _forward(self, base: Call, forward: ForwardPass, arguments: dict[str, Any]) -> Any:
        """A forward of its own, or a step of a decoding by hand."""
        board, given = graft_of(self).board, given_of(arguments)
        if forward.plan is not None and given is not None:
            forward.plan.check(
                given.shape[0]
            )  # refuses a batch that does not fit, before anything runs
        if given is None or not board.prompts(forward):
            return self._run(base, forward, arguments)
        spans = spans_of(board, forward, given.shape[0])
        cache, seen = cache_of(arguments), seen_tokens(arguments)
        goes_on = seen > 0 and not self.config.is_encoder_decoder
        if goes_on:
            layout = noted_layout(cache, spans)
            columns = seen + given.shape[1]
            arguments["attention_mask"] = mask_beyond(
                layout, arguments.get("attention_mask"), columns
            )
            return self._run(base, _without_virtual(forward), arguments, layout)
        layout = self._layout(arguments, forward, left=False)
        insertion = self._insertion(layout, forward)
        out = self._run(base, forward, insertion.into(arguments), layout)
        if not torch.compiler.is_compiling():
            note_virtual_tokens(cache_of(out) if isinstance(out, dict) else cache, layout, spans)
        return insertion.out_of(out)

    def _forward_in_generation(
        self, base: Call, generation: Generation, arguments: dict[str, Any]
    ) -> Any:
        """A step of `generate`, which has put the virtual tokens in."""
        forward, given = generation.forward, given_of(arguments)
        rows = given_of(arguments, "decoder_") if given is None else given
        if forward.plan is not None and rows is not None:
            beams = rows.shape[0] // len(forward.plan.names)
            forward = replace(forward, plan=forward.plan.with_beams(beams))
        if (
            rows is not None
            and generation.seen(seen_tokens(arguments), rows) >= generation.prompted
        ):
            forward = _without_virtual(forward)
        return self._run(base, forward, arguments, generation.layout, generation)

    def _run(
        self,
        base: Call,
        forward: ForwardPass,
        arguments: dict[str, Any],
        layout: Layout | None = None,
        generation: Generation | None = None,
    ) -> Any:
        """The frozen model's forward as `forward`, with what its adapters ask for of the batch."""
        with run(self._with_batches(forward, arguments, layout, generation)):
            return base(**arguments)

    def _with_batches(
        self,
        forward: ForwardPass,
        arguments: dict[str, Any],
        layout: Layout | None,
        generation: Generation | None,
    ) -> ForwardPass:
        fresh = replace(forward, inputs={}, notes={})
        if not graft_of(self).board.reads_batch(forward):
            return fresh
        virtual = layout.virtual >= 0 if layout is not None else None
        found = batches(self, arguments, virtual=virtual, generation=generation)
        return replace(fresh, batches=found)

    def _layout(self, arguments: dict[str, Any], forward: ForwardPass, *, left: bool) -> Layout:
        """Where virtual tokens go in: before the first token, behind the first in an encoder, whose class is read
        from that.
        """
        board, given = graft_of(self).board, given_of(arguments)
        assert given is not None
        spans = spans_of(board, forward, given.shape[0])
        at = first_tokens(arguments.get("attention_mask"))
        if not board.causal and not self.config.is_encoder_decoder:
            at = at + 1
        return Layout.of(spans, given.shape[1], given.device, at=at, left=left)

    def _insertion(self, layout: Layout, forward: ForwardPass) -> Insertion:
        board = graft_of(self).board
        rows = partial(rows_of, board.prompts(forward))
        return Insertion(self, layout, board.vocabulary, rows)

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        board = graft_of(self).board
        if inputs is not None:
            kwargs["input_ids"] = inputs
        with board.gate.inside():
            generation = self._generation(board.begin(), kwargs)
            arguments = self._arguments(generation, kwargs)
            with parameters_stay(), generate_as(generation):
                out = super().generate(*args, **arguments)  # type: ignore[misc]
            return self._answer(generation, kwargs, out)

    def _generation(self, forward: ForwardPass, arguments: dict[str, Any]) -> Generation:
        """How a `generate` begins, which it keeps to its end."""
        board, given = graft_of(self).board, given_of(arguments)
        layout = None
        if given is not None and board.prompts(forward):
            layout = self._layout(arguments, forward, left=True)
        one_stack = not self.config.is_encoder_decoder
        inserted = layout.added if layout is not None and one_stack else 0
        in_ids = arguments.get("input_ids") is not None
        columns = _columns("" if one_stack else "decoder_", arguments) + inserted
        return Generation(board, forward, columns, layout if one_stack and in_ids else None, layout)

    def _arguments(self, generation: Generation, arguments: dict[str, Any]) -> dict[str, Any]:
        """What transformers' `generate` is called with."""
        layout = generation.inserted
        if layout is None:
            return arguments
        cache = cache_of(arguments)
        if seen_tokens(arguments) and not self.config.is_encoder_decoder:
            noted_layout(
                cache, spans_of(generation.board, generation.forward, layout.source.shape[0])
            )
        if arguments.get("assistant_model") is not None:
            raise UnsupportedError(
                "an assistant model can't read virtual tokens; generate without it."
            )
        out = self._insertion(layout, generation.forward).into(arguments)
        if generation.layout is None:
            return out
        if out.get("streamer") is not None:
            out["streamer"] = PlainStreamer(out["streamer"], layout)
        return longer(out, layout.added)

    def _answer(self, generation: Generation, arguments: dict[str, Any], out: Any) -> Any:
        """What `generate` gives, without the virtual tokens; its cache notes that it holds them."""
        layout = generation.layout
        if layout is None:
            return out
        spans = spans_of(generation.board, generation.forward, layout.source.shape[0])
        is_tensor = isinstance(out, Tensor)
        note_virtual_tokens(cache_of(arguments if is_tensor else out), layout, spans)
        if is_tensor:
            return layout.without_virtual(out)
        out.sequences = layout.without_virtual(out.sequences)
        return out

    def prepare_inputs_for_generation(self, input_ids: Any, *args: Any, **kwargs: Any) -> Any:
        """The mask is seen here, before a static cache makes four dimensions of it that tell no tokens any more."""
        generation = generation_of(graft_of(self).board)
        if generation is not None:
            generation.see(input_ids, kwargs.get("attention_mask"))
        return super().prepare_inputs_for_generation(input_ids, *args, **kwargs)  # type: ignore[misc]

    @contextmanager
    def around_the_encoder(self, inputs: Tensor, arguments: dict[str, Any]) -> Iterator[None]:
        """`generate` runs an encoder by itself, outside the model's forward."""
        board = graft_of(self).board
        generation = generation_of(board)
        forward = board.begin() if generation is None else generation.forward
        given = {**arguments, "input_ids": inputs}
        layout = generation.inserted if generation is not None else None
        with run(self._with_batches(forward, given, layout, generation)):
            yield

    def as_the_user_counts(self, config: Any, made: dict[str, Any]) -> Any:
        layout = self._layout_in_ids()
        if layout is None:
            return config
        if made.get("input_ids_seq_length") is not None:
            made["input_ids_seq_length"] -= layout.added
        return plain_lengths(config, layout.added)

    def seen_by_processors(self, processors: Any) -> Any:
        layout = self._layout_in_ids()
        return processors if layout is None else plain_processors(processors, layout)

    def seen_by_criteria(self, criteria: Any) -> Any:
        layout = self._layout_in_ids()
        return criteria if layout is None else plain_criteria(criteria, layout)

    def _layout_in_ids(self) -> Layout | None:
        """The virtual tokens among the ids of the `generate` that runs."""
        generation = generation_of(graft_of(self).board)
        return None if generation is None else generation.layout

    def checkpointing_was_set(self) -> None:
        remember(self)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """The base's own."""
        with plain_for_a_while(self):
            return super().save_pretrained(*args, **kwargs)  # type: ignore[misc]


def remember(model: Any) -> None:
    """Let blocks that gradient checkpointing runs again do so as their forward ran them."""
    for module, function in checkpointed(model):
        if not isinstance(function, Remembering):
            checkpoint_with(module, Remembering(function))


def forget(model: Any) -> None:
    """The counterpart of `remember`."""
    for module, function in checkpointed(model):
        if isinstance(function, Remembering):
            checkpoint_with(module, function.checkpoint)


@contextmanager
def _inside(board: Board) -> Iterator[None]:
    if torch.compiler.is_compiling():  # which can't trace a lock
        yield
        return
    with board.gate.inside():
        yield


def _is_plain(board: Board, forward: ForwardPass) -> bool:
    """Nothing has to be known of the batch, and nothing goes into it."""
    return forward.plan is None and not board.prompts(forward) and not board.reads_batch(forward)


def _without_virtual(forward: ForwardPass) -> ForwardPass:
    """The same, where the ids are known to be the user's."""
    return replace(forward, may_have_virtual=False)


def _columns(stack: str, arguments: dict[str, Any]) -> int:
    """How many columns the prompts take that `generate` is given: an encoder-decoder's are those it decodes from."""
    names = (stack + name for name in ("input_ids", "inputs_embeds", "attention_mask"))
    found = [arguments[name].shape[1] for name in names if arguments.get(name) is not None]
    return max(found, default=1)
