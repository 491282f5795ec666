"""The mixin of the model itself: what a forward and a `generate` begin and end with."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor

from petune.core.forward.forward_pass import ForwardPass, run
from petune.core.graft.board import Board
from petune.core.graft.module import Grafted, graft_of
from petune.core.graft.remembering import check_checkpointing, remember
from petune.core.host.cache import under_its_name
from petune.core.host.checkpointing import Checkpointing
from petune.core.host.generation import Generating
from petune.core.host.trainer import plain_for_a_while
from petune.core.method.derived import parameters_stay
from petune.core.tokens.beginning import answer_of, arguments_of, begin
from petune.core.tokens.calling import ModelCall, told
from petune.core.tokens.generating import (
    generate_as,
    generation_of,
    plain_criteria,
    plain_lengths,
    plain_processors,
    without_virtual_ids,
)
from petune.core.tokens.layout import Layout
from petune.core.tokens.resize import check_replaceable, resizing


class AdaptedModel(Generating, Checkpointing, Grafted):
    """The mixin of the model itself. A forward begins with the settings of its context and keeps them; virtual tokens
    go in before it, and their results are taken out behind it.
    """

    signed: ClassVar[dict[str, str]] = {
        "forward": "forward",
        "prepare_inputs_for_generation": "prepare_inputs",  # transformers takes who has it for a generative model
    }
    config: Any

    @property
    def petune_board(self) -> Board:
        """What petune keeps of the model."""
        return graft_of(self).board

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        board, parameters = self.petune_board, graft_of(self).parameters
        base = self.petune_hooked or super(Grafted, self).forward
        kwargs = under_its_name(kwargs, parameters)
        with _inside(board):
            generation = generation_of(board)
            forward = board.begin() if generation is None else generation.begin()
            if _is_plain(board, forward):
                with run(forward):
                    return base(*args, **kwargs)
            call = ModelCall(self, board, base, forward)
            kwargs.update(zip(parameters, args, strict=False))
            if generation is None:
                return call.by_itself(kwargs)
            return call.in_generation(generation, kwargs)

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        board = self.petune_board
        if inputs is not None:
            kwargs["input_ids"] = inputs
        with board.gate.inside():
            generation = begin(self, board, board.begin(), kwargs)
            arguments = arguments_of(self, generation, kwargs)
            with parameters_stay(), generate_as(generation):
                out = super().generate(*args, **arguments)  # type: ignore[misc]
            return answer_of(generation, kwargs, out)

    def prepare_inputs(self, input_ids: Any, *args: Any, **kwargs: Any) -> Any:
        """The mask is seen here, before a static cache makes four dimensions of it that tell no tokens any more."""
        generation = generation_of(self.petune_board)
        if generation is not None:
            generation.see(input_ids, kwargs.get("attention_mask"))
        return super().prepare_inputs_for_generation(input_ids, *args, **kwargs)  # type: ignore[misc]

    def around_the_encoder(
        self, inputs: Tensor, arguments: dict[str, Any]
    ) -> AbstractContextManager[None]:
        """`generate` runs an encoder by itself, outside the model's forward."""
        generation = generation_of(self.petune_board)
        assert generation is not None, "only `generate` runs an encoder by itself"
        given = {**arguments, "input_ids": inputs}
        forward = generation.forward
        return run(
            told(
                self, self.petune_board, forward, given, generation.inserted, generation
            )
        )

    def as_the_user_counts(self, config: Any, made: dict[str, Any]) -> Any:
        generation = generation_of(self.petune_board)
        if generation is not None and generation.inserted is not None:
            made.update(without_virtual_ids(made, generation.inserted))
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
        generation = generation_of(self.petune_board)
        return None if generation is None else generation.layout

    def checkpointing_was_set(self) -> None:
        check_checkpointing(self, self.petune_board.tunings.values())
        remember(self)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """The base's own, unless a tuning acts at the tables of tokens."""
        resize = super().resize_token_embeddings  # type: ignore[misc]
        given = (*args, *kwargs.values())
        if given.count(None) == len(given):  # it only asks for the table
            return resize(*args, **kwargs)
        with resizing(self, self.petune_board):
            return resize(*args, **kwargs)

    def set_input_embeddings(self, value: Any) -> None:
        """The base's own, unless a tuning acts at the table or answers there for its virtual tokens."""
        check_replaceable(self.petune_board, self.get_input_embeddings(), value)  # type: ignore[operator]
        super().set_input_embeddings(value)  # type: ignore[misc]

    def set_output_embeddings(self, value: Any) -> None:
        """The base's own, unless a tuning acts at the head."""
        check_replaceable(self.petune_board, self.get_output_embeddings(), value)  # type: ignore[operator]
        super().set_output_embeddings(value)  # type: ignore[misc]

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """The base's own."""
        with plain_for_a_while(self):
            return super().save_pretrained(*args, **kwargs)  # type: ignore[misc]


def _inside(board: Board) -> AbstractContextManager[None]:
    """A forward's way through the gate; torch.compile can't trace a lock."""
    return nullcontext() if torch.compiler.is_compiling() else board.gate.inside()


def _is_plain(board: Board, forward: ForwardPass) -> bool:
    """Nothing has to be known of the batch, and nothing goes into it."""
    return (
        forward.plan is None
        and not board.prompts(forward)
        and not board.reads_batch(forward)
    )
