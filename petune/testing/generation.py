"""Whether a tuned model writes the same text whichever cache holds what it has seen."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from petune.core.host.cache import NAMES
from petune.testing.case import Case

NEW = 6
GENERATION: dict[str, Any] = {
    "max_new_tokens": NEW,
    "min_new_tokens": NEW,
    "do_sample": False,
    "pad_token_id": 0,
}
CACHES: dict[str, dict[str, Any]] = {
    "cached": {"use_cache": True},
    "cached in a static cache": {
        "cache_implementation": "static",
        "disable_compile": True,
    },
}
"""What an error says -> the options of `generate`."""


def generates_cached(case: Case) -> None:
    """Every cache gives the logits that no cache gives, token by token, from a batch padded on the left; so does a
    cache that the caller feeds back. Beams run, and the prompt comes back as it was.

    Logits are compared, since a fault that does not change the most probable token within a few steps is one too.
    """
    model, _ = case.tuned()
    prompt = _prompt(case, model)
    plain = _generate(model, prompt, use_cache=False)
    for what, options in CACHES.items():
        found = _generate(model, prompt, **options)
        steps = _steps_on_one_text(found.sequences, plain.sequences)
        _compare(case, found.logits[:steps], plain.logits[:steps], what)
    if not model.config.is_encoder_decoder:
        returned = plain.sequences[:, :-NEW]
        assert torch.equal(returned, prompt["input_ids"]), "the prompt was changed"
    last_row = [logits[-1:] for logits in plain.logits]
    by_hand = _decode_by_hand(model, prompt["input_ids"][-1:], plain.sequences[-1:])
    _compare(case, by_hand, last_row, "decoded by hand")
    beams = _generate(model, prompt, num_beams=2, repetition_penalty=1.2)
    assert beams.sequences.shape == plain.sequences.shape, "beams have another shape"


def _prompt(case: Case, model: Any) -> dict[str, Tensor]:
    """The batch without its labels; its padding goes to the left, where decoders need it."""
    inputs = {key: value for key, value in case.batch.items() if key != "labels"}
    if model.config.is_encoder_decoder:
        return inputs
    return {key: value.flip(1) for key, value in inputs.items()}


def _generate(model: Any, prompt: dict[str, Tensor], **options: Any) -> Any:
    return model.generate(
        **prompt,
        **GENERATION,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )


def _steps_on_one_text(one: Tensor, other: Tensor) -> int:
    """How many steps saw the same tokens before them. Rounding may choose another token where two are as probable,
    and from there on the texts are two.
    """
    same = (one == other).all(0)[-NEW:]
    before_the_first_other = int(same.long().cumprod(0).sum())
    return min(before_the_first_other + 1, NEW)


@torch.no_grad()
def _decode_by_hand(model: Any, row: Tensor, text: Tensor) -> list[Tensor]:
    """The logits of each new token of a text, one forward a token, as a loop around `model(...)` gets them.

    Args:
        row: the ids of a prompt without padding, (1, length).
        text: what was generated from it, (1, …), its new tokens at the end.
    """
    name = _cache_name(model)
    two_stacks = model.config.is_encoder_decoder
    given = {"input_ids": row}
    if two_stacks:
        given["decoder_input_ids"] = text[:, :1]
    found = []
    cache: dict[str, Any] = {}
    for token in torch.split(text[:, -NEW:], 1, 1):
        out = model(**given, **cache, use_cache=True)
        found.append(out.logits[:, -1])
        cache = {name: out[name]}
        given["decoder_input_ids" if two_stacks else "input_ids"] = token
    return found


def _cache_name(model: Any) -> str:
    """What this version of transformers calls the cache, among the arguments of a forward and in what it returns."""
    known = inspect.signature(model.forward).parameters
    return next(name for name in NAMES if name in known)


def _compare(case: Case, found: Any, plain: Any, what: str) -> None:
    """Of each step the logits, (rows, vocabulary).

    LLM.int8() rounds activations to 8 bits: where two ways to compute an input differ by 1e-7, one may be rounded up
    and the other down.
    """
    factor = 1000 if case.precision == "int8" else 10
    one, other = torch.stack(tuple(found)), torch.stack(tuple(plain))
    case.close(one, other, f"{what} differs from uncached", factor)
