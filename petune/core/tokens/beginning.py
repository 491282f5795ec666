"""How a `generate` begins, and what of its end the user gets."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from petune.core.forward.forward_pass import ForwardPass
from petune.core.graft.board import Board
from petune.core.graft.generation import Generation
from petune.core.host.cache import cache_of, seen_tokens
from petune.core.tokens.cached import note_virtual_tokens, noted_layout
from petune.core.tokens.calling import Arguments, insertion_of, layout_for
from petune.core.tokens.generating import PlainStreamer, longer
from petune.core.tokens.positions import given_of
from petune.core.tokens.table import spans_of
from petune.errors import UnsupportedError


def begin(
    model: Any, board: Board, forward: ForwardPass, arguments: Arguments
) -> Generation:
    """What a `generate` with these arguments goes by, to its end."""
    two_stacks = model.config.is_encoder_decoder
    columns = _columns("decoder_" if two_stacks else "", arguments)
    if given_of(arguments) is None or not board.prompts(forward):
        return Generation(board, forward, columns)
    inserted = layout_for(model, board, forward, arguments, left=True)
    if two_stacks:
        return Generation(board, forward, columns, inserted=inserted)
    columns += inserted.added
    if arguments.get("input_ids") is None:  # embeddings, which are not generated
        return Generation(board, forward, columns, inserted=inserted)
    return Generation(board, forward, columns, inserted=inserted, layout=inserted)


def arguments_of(model: Any, generation: Generation, arguments: Arguments) -> Arguments:
    """What transformers' `generate` is called with: the virtual tokens are in it.

    Raises:
        UnsupportedError: its cache was filled without them, or an assistant model would have to read them.
    """
    layout, board, forward = generation.inserted, generation.board, generation.forward
    if layout is None:
        return arguments
    two_stacks = model.config.is_encoder_decoder
    if seen_tokens(arguments) and not two_stacks:
        spans = spans_of(board, forward, layout.rows)
        noted_layout(cache_of(arguments), spans)
    if arguments.get("assistant_model") is not None:
        raise UnsupportedError(
            "an assistant model can't read virtual tokens; generate without it."
        )
    out = insertion_of(model, board, forward, layout).into(arguments)
    if generation.layout is None:
        return out
    if out.get("streamer") is not None:
        out["streamer"] = PlainStreamer(out["streamer"], layout)
    return longer(out, layout.added)


def answer_of(generation: Generation, arguments: Arguments, out: Any) -> Any:
    """What `generate` gives, without the virtual tokens; its cache notes that it holds them."""
    layout = generation.layout
    if layout is None:
        return out
    spans = spans_of(generation.board, generation.forward, layout.rows)
    if isinstance(out, Tensor):
        note_virtual_tokens(cache_of(arguments), layout, spans)
        return layout.without_virtual(out)
    note_virtual_tokens(cache_of(out), layout, spans)
    out.sequences = layout.without_virtual(out.sequences)
    return out


def _columns(stack: str, arguments: Arguments) -> int:
    """How many columns the prompts take that `generate` is given: an encoder-decoder's are those it decodes from."""
    ids, mask = given_of(arguments, stack), arguments.get(f"{stack}attention_mask")
    given = ids if mask is None else mask
    return 1 if given is None else int(given.shape[1])
