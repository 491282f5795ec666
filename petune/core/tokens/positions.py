"""Which columns of a forward's batch are the prompts': what a method that acts by position is told."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from petune.core.graft.generation import Generation
from petune.core.host.cache import seen_tokens
from petune.core.method.batch import SKIP, Batch
from petune.errors import UnsupportedError

Arguments = Mapping[str, Any]
"""What a model is called with, by name."""


def given_of(arguments: Arguments, stack: str = "") -> Tensor | None:
    """Ids, or the embeddings that stand for them; for a decoder with `stack="decoder_"`."""
    ids: Tensor | None = arguments.get(f"{stack}input_ids")
    return arguments.get(f"{stack}inputs_embeds") if ids is None else ids


def batches(
    model: Any,
    arguments: Arguments,
    *,
    virtual: Tensor | None = None,
    generation: Generation | None = None,
) -> dict[str, Batch]:
    """The batch by stack, "encoder" or "decoder", for what the model is called with.

    Args:
        virtual: (batch, columns) bool, which columns hold virtual tokens, those in the cache included.

    Raises:
        UnsupportedError: what the model is called with does not tell the rows' tokens.
    """
    if model.config.is_encoder_decoder:
        return _of_two_stacks(model, arguments, virtual, generation)
    given = given_of(arguments)
    if given is None:
        return {}
    seen = seen_tokens(arguments)
    if generation is not None:
        seen = generation.seen(seen, given)
        return {
            "decoder": _in_generation(
                generation.mask, given, seen, virtual, generation.prompted
            )
        }
    if seen:  # a decoding by hand: the prompt was in the first forward
        return {"decoder": _decoding(given)}
    tokens = _tokens(arguments.get("attention_mask"), given, virtual)
    answers = _answers(arguments) if model.can_generate() else None
    return {"decoder": _by_sequence(tokens, answers, _starts(arguments, tokens))}


def _of_two_stacks(
    model: Any,
    arguments: Arguments,
    virtual: Tensor | None,
    generation: Generation | None,
) -> dict[str, Batch]:
    """The encoder's batch, and the decoder's."""
    found: dict[str, Batch] = {}
    given, mask = given_of(arguments), arguments.get("attention_mask")
    if given is not None:
        found["encoder"] = _numbered(_tokens(mask, given, virtual))
    answer = given_of(arguments, "decoder_")
    if model.can_generate():
        answer = arguments.get("labels") if answer is None else answer
        if answer is not None:
            found["decoder"] = _of_decoder(arguments, answer, generation)
        return found
    # a classifier, whose decoder reads what its encoder does
    answer = given if answer is None else answer
    if answer is not None:
        answer_mask = arguments.get("decoder_attention_mask")
        found["decoder"] = _numbered(
            _tokens(mask if answer_mask is None else answer_mask, answer)
        )
    return found


def _of_decoder(
    arguments: Arguments, answer: Tensor, generation: Generation | None
) -> Batch:
    """The batch of a decoder, whose prompt is what the decoding starts with."""
    mask, seen = arguments.get("decoder_attention_mask"), seen_tokens(arguments)
    if generation is None:
        return _in_generation(mask, answer, seen, None, 1)
    is_of_a_static_cache = mask is not None and mask.dim() != 2
    told = None if is_of_a_static_cache else mask
    return _in_generation(
        told, answer, generation.seen(seen, answer), None, generation.prompted
    )


def _starts(arguments: Arguments, tokens: Tensor) -> Tensor | None:
    """(batch, length) bool, where the sequences begin that are packed into a row; None if
    nothing tells.
    """
    positions: Tensor | None = arguments.get("position_ids")
    if positions is None or positions.dim() != 2:
        return None
    return positions.eq(0).expand_as(tokens)


def _answers(arguments: Arguments) -> Tensor | None:
    """(batch, length) bool: the tokens that a language model is to predict, where it is
    told.
    """
    labels: Tensor | None = arguments.get("labels")
    if labels is not None and labels.dim() == 2:
        return labels != SKIP
    kept: Any = arguments.get("logits_to_keep")
    by_token = isinstance(kept, Tensor) and kept.dim() == 2
    return F.pad(kept, (1, 0))[:, :-1] if by_token else None


def _tokens(
    mask: Tensor | None,
    given: Tensor,
    virtual: Tensor | None = None,
    width: int | None = None,
) -> Tensor:
    """(batch, width) bool: the columns that hold the user's tokens.

    Args:
        mask: (batch, columns so far), None if all hold tokens. What comes later does.
        virtual: the columns that hold virtual tokens, of the rows without their beams.
        width: how many columns, those of `given` if it is not said.
    """
    rows = given.shape[0]
    width = given.shape[1] if width is None else width
    if mask is None:
        tokens = given.new_ones((rows, width), dtype=torch.bool)
    elif mask.dim() == 2:
        tokens = mask[:, :width].bool()
        tokens = F.pad(tokens, (0, width - tokens.shape[1]), value=True)
    else:
        raise UnsupportedError(
            "a method that acts by position needs an attention mask of (batch, length), or none."
        )
    if virtual is None:
        return tokens
    inserted = virtual.repeat_interleave(rows // virtual.shape[0], 0)[:, :width]
    return tokens & ~F.pad(inserted, (0, width - inserted.shape[1]))


def _decoding(given: Tensor) -> Batch:
    """A batch of which no column belongs to a prompt."""
    column = torch.zeros(given.shape[:2], dtype=torch.long, device=given.device)
    return Batch(column - 1, column, True)


def _in_generation(
    mask: Tensor | None, given: Tensor, seen: int, virtual: Tensor | None, prompted: int
) -> Batch:
    """The batch of the columns `given` behind `seen` others, where the prompts take the first `prompted`: some of them
    may still be to come, where a long prompt is read in chunks.
    """
    if seen >= prompted:
        return _decoding(given)
    end = seen + given.shape[1]
    tokens = _tokens(mask, given, virtual, max(end, prompted))
    column = torch.arange(tokens.shape[1], device=tokens.device)
    batch = _numbered(tokens & (column < prompted))
    return Batch(batch.place[:, seen:end], batch.size[:, seen:end])


def _numbered(tokens: Tensor) -> Batch:
    """The batch of rows that are prompts as a whole."""
    place = torch.where(tokens, tokens.cumsum(1) - 1, -1)
    return Batch(place, tokens.sum(1, keepdim=True).expand_as(place))


def _by_sequence(
    tokens: Tensor, answers: Tensor | None, starts: Tensor | None
) -> Batch:
    """The batch of rows in which several sequences may stand. In each the prompt goes up to the first answer, or it
    is all of it where the answers begin with the second token: the first has none before it that could tell it.
    """
    first_column = (
        torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens) == 0
    )
    starts = first_column if starts is None else starts | first_column
    sequence = starts.cumsum(1) - 1
    if answers is not None:
        is_first = tokens & (_so_far(tokens, starts) == 1)
        next_answer = F.pad(answers, (0, 1))[:, 1:]
        answers = torch.where(is_first, next_answer, answers)
        before = tokens & (_so_far(answers, starts) == 0)
        tokens = torch.where(_total(before, sequence) > 0, before, tokens)
    place = torch.where(tokens, _so_far(tokens, starts) - 1, -1)
    return Batch(place, _total(tokens, sequence))


def _so_far(hits: Tensor, starts: Tensor) -> Tensor:
    """How many hits there are in a sequence up to each column."""
    count = hits.cumsum(1)
    before = torch.where(starts, count - hits.long(), 0)
    return count - before.cummax(1).values


def _total(hits: Tensor, sequence: Tensor) -> Tensor:
    """How many hits there are in the sequence of each column."""
    return (
        torch.zeros_like(sequence)
        .scatter_add(1, sequence, hits.long())
        .gather(1, sequence)
    )
