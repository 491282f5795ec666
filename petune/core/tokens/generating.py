"""What of a `generate` must not see virtual tokens: processors, criteria and streamers get the sequences that the user
knows, and lengths that count them.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from petune.core.graft.board import Board
from petune.core.graft.generation import Generation
from petune.core.tokens.layout import Layout


class _Thread(threading.local):
    def __init__(self) -> None:
        self.generation: Generation | None = None


_thread = _Thread()


def generation_of(board: Board) -> Generation | None:
    """The `generate` of the board's model that runs in this thread."""
    found = _thread.generation
    return found if found is not None and found.board is board else None


@contextmanager
def generate_as(generation: Generation) -> Iterator[None]:
    """Within the context `generation` is what runs in this thread."""
    before, _thread.generation = _thread.generation, generation
    try:
        yield
    finally:
        _thread.generation = before


class PlainProcessor(LogitsProcessor):
    """A logits processor that does not see the virtual tokens, whose ids it could not look up."""

    def __init__(self, inner: LogitsProcessor, layout: Layout) -> None:
        self.inner, self.layout = inner, layout

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        found: Tensor = self.inner(self.layout.without_virtual(input_ids), scores)
        return found


class PlainCriterion(StoppingCriteria):
    """A stopping criterion that does not see the virtual tokens."""

    def __init__(self, inner: Any, layout: Layout) -> None:
        self.inner, self.layout = inner, layout

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        return self.inner(self.layout.without_virtual(input_ids), scores, **kwargs)


class PlainStreamer:
    """A streamer that gets the prompt as the user gave it."""

    def __init__(self, inner: Any, layout: Layout) -> None:
        self.inner, self.layout, self.begun = inner, layout, False

    def put(self, value: Tensor) -> None:
        """The prompts first, (batch, length), and then the new token of each row."""
        self.inner.put(value if self.begun else self.layout.without_virtual(value))
        self.begun = True

    def end(self) -> None:
        """No more tokens come."""
        self.inner.end()


def plain_processors(processors: Any, layout: Layout) -> LogitsProcessorList:
    """The list, none of which sees virtual tokens."""
    return LogitsProcessorList([PlainProcessor(each, layout) for each in processors])


def plain_criteria(criteria: Any, layout: Layout) -> StoppingCriteriaList:
    """The list, none of which sees virtual tokens."""
    return StoppingCriteriaList([PlainCriterion(each, layout) for each in criteria])


def without_virtual_ids(made: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    """What processors that count the prompt's tokens are made from, as the user gave it: `encoder_input_ids`."""
    ids = made.get("encoder_input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        return {}
    return {"encoder_input_ids": layout.without_virtual(ids)}


def plain_lengths(config: Any, inserted: int) -> Any:
    """A generation's configuration whose lengths count what the user knows, for processors and criteria."""
    plain = copy.copy(config)
    if plain.max_length is not None:
        plain.max_length -= inserted
    if (
        plain.min_length and plain.min_new_tokens is not None
    ):  # it follows from the prompt's length then
        plain.min_length -= inserted
    return plain


def longer(arguments: dict[str, Any], inserted: int) -> dict[str, Any]:
    """The arguments of `generate`, whose `max_length` counts the virtual tokens too."""
    out = dict(arguments)
    if out.get("max_length") is not None:
        out["max_length"] += inserted
    config = out.get("generation_config")
    if (
        config is not None
        and config.max_length is not None
        and config.max_new_tokens is None
    ):
        out["generation_config"] = copy.deepcopy(config)
        out["generation_config"].max_length += inserted
    return out
