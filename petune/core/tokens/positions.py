"""What a method may know of the batch that the model was called with, beyond the tensor at its site."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from petune.core.method.batch import SKIP, Batch
from petune.errors import UnsupportedError

if TYPE_CHECKING:
    from petune.core.graft.board import Board


def given_of(kwargs: dict[str, Any], stack: str = "") -> Tensor | None:
    """What a model is called with: ids, or the embeddings that stand for them."""
    ids = kwargs.get(f"{stack}input_ids")
    return kwargs.get(f"{stack}inputs_embeds") if ids is None else ids


def batches(model: Any, board: Board, kwargs: dict[str, Any], prompts: bool) -> dict[str, Batch]:
    """The batch by stack, "encoder" or "decoder", for what the model is called with.

    Args:
        prompts: there are virtual tokens in it.

    Raises:
        UnsupportedError: what it is called with does not tell the rows' tokens.
    """
    past = kwargs.get("past_key_values")
    seen = int(past.get_seq_length()) if past is not None else 0
    given = given_of(kwargs)
    if prompts and given is not None and (given.dim() > 2 or 0 < seen < (board.prompted or 0)):
        raise UnsupportedError(
            "beside virtual tokens, a method that acts by position needs input ids, not in chunks."
        )
    if not model.config.is_encoder_decoder:
        return {} if given is None else {"decoder": _decoder(model, board, kwargs, given, seen)}
    vocabulary, generates = model.get_input_embeddings().num_embeddings, model.can_generate()
    mask, decoder_mask = kwargs.get("attention_mask"), kwargs.get("decoder_attention_mask")
    found = {} if given is None else {"encoder": _prompt(_tokens(mask, given, vocabulary), 0)}
    answer = given_of(kwargs, "decoder_")
    if not generates:  # a classifier, whose decoder reads what its encoder does
        answer, decoder_mask = (
            given if answer is None else answer,
            mask if decoder_mask is None else decoder_mask,
        )
    elif answer is None:
        answer = kwargs.get("labels")
    if board.prompted is not None and decoder_mask is not None and decoder_mask.dim() != 2:
        decoder_mask = None  # that of a static cache
    if answer is not None:
        tokens = _tokens(decoder_mask, answer, vocabulary, seen)
        found["decoder"] = _prompt(tokens, seen, board.prompted or 1 if generates else None)
    return found


def _decoder(model: Any, board: Board, kwargs: dict[str, Any], given: Tensor, seen: int) -> Batch:
    """The batch of a model of one stack."""
    generating = board.prompted is not None
    mask = board.mask if generating else kwargs.get("attention_mask")
    if (
        generating and mask is not None
    ):  # as many rows as there are beams, and all that was added is tokens
        mask = mask.repeat_interleave(given.shape[0] // mask.shape[0], 0)
        mask = F.pad(mask, (0, max(0, seen + given.shape[1] - mask.shape[1])), value=1)
    tokens = _tokens(mask, given, model.get_input_embeddings().num_embeddings, seen)
    if generating or seen:
        return _prompt(tokens, seen, board.prompted or 0)
    positions = kwargs.get("position_ids")
    starts = (
        (positions == 0).expand_as(tokens)
        if positions is not None and positions.dim() == 2
        else None
    )
    return _prompt(tokens, 0, None, _answers(kwargs) if model.can_generate() else None, starts)


def _answers(kwargs: dict[str, Any]) -> Tensor | None:
    """(batch, length) bool: the tokens that a language model is to predict, where it is told."""
    labels, kept = kwargs.get("labels"), kwargs.get("logits_to_keep")
    if labels is not None and labels.dim() == 2:
        return labels != SKIP
    return F.pad(kept, (1, 0))[:, :-1] if isinstance(kept, Tensor) and kept.dim() == 2 else None


def _tokens(mask: Tensor | None, given: Tensor, vocabulary: int, seen: int = 0) -> Tensor:
    """(batch, seen + length) bool: the columns that hold tokens, `seen` of them cached and not in `given`. Ids past the
    vocabulary are virtual tokens.
    """
    if mask is not None and mask.dim() != 2:
        raise UnsupportedError(
            "a method that acts by position needs an attention mask of (batch, length), or none."
        )
    rows, length = given.shape[:2]
    width = seen + length
    tokens = (
        given.new_ones((rows, width), dtype=torch.bool) if mask is None else mask[:, :width].bool()
    )
    return tokens & F.pad(given < vocabulary, (seen, 0), value=True) if given.dim() == 2 else tokens


def _prompt(
    tokens: Tensor,
    seen: int,
    prompted: int | None = None,
    answers: Tensor | None = None,
    starts: Tensor | None = None,
) -> Batch:
    """The batch without its first `seen` columns.

    Args:
        prompted: how many columns are the prompt's, None if all up to the first of the answers are.
        starts: (batch, length) bool, where the sequences begin that are packed into a row.
    """
    column = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    if prompted is not None and seen >= prompted:
        return Batch(
            torch.full_like(column, -1)[:, seen:], torch.zeros_like(column)[:, seen:], True
        )
    if prompted is not None:
        tokens = tokens & (column < prompted)
    starts = column == 0 if starts is None else starts | (column == 0)
    sequence = starts.cumsum(1) - 1
    if answers is not None:
        first = tokens & (
            _so_far(tokens, starts) == 1
        )  # nothing comes before it, so that its own label says nothing
        answers = torch.where(first, F.pad(answers, (0, 1))[:, 1:], answers)
        before = tokens & (_so_far(answers, starts) == 0)
        tokens = torch.where(_total(before, sequence) > 0, before, tokens)
    place = torch.where(tokens, _so_far(tokens, starts) - 1, -1)
    return Batch(place[:, seen:], _total(tokens, sequence)[:, seen:])


def _so_far(hits: Tensor, starts: Tensor) -> Tensor:
    """How many hits there are in a sequence up to each column."""
    count = hits.cumsum(1)
    return count - torch.where(starts, count - hits.long(), 0).cummax(1).values


def _total(hits: Tensor, sequence: Tensor) -> Tensor:
    """How many hits there are in the sequence of each column."""
    return torch.zeros_like(sequence).scatter_add(1, sequence, hits.long()).gather(1, sequence)
