"""Where a model's forward takes and gives its cache of keys and values."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import Cache, LlamaForCausalLM

from petune.core.host.seam import Seams, installed
from petune.errors import MovedError

SEAMS = Seams()
NAMES = ("cache", "past_key_values", "cache_params")
"""The names of the argument: transformers 5.24 calls it `cache`, earlier ones `past_key_values`; models of
recurrent state said `cache_params`."""


@SEAMS.lean(
    "transformers",
    "the argument `cache` (before 5.24 `past_key_values`) of a model's forward",
    since="4.36",
    why="see whether a decoding goes on from tokens that were seen before",
)
def _forward_takes_a_cache() -> bool:
    parameters = inspect.signature(inspect.unwrap(LlamaForCausalLM.forward)).parameters
    return any(name in parameters for name in NAMES) and hasattr(
        Cache, "get_seq_length"
    )


def cache_of(arguments: Mapping[str, Any]) -> Any:
    """The cache among the arguments of a model's forward, under whichever name; None if there is none.

    Raises:
        MovedError: a cache stands under a name that petune does not know.
    """
    known = filter(None, map(arguments.get, NAMES))
    found = next(known, None)
    others = [name for name, value in arguments.items() if isinstance(value, Cache)]
    strange = set(others).difference(NAMES)
    if found is None and strange:
        here = f"transformers {installed('transformers')}"
        what = f"a cache is given as {strange.pop()!r}, which petune does not know"
        remedy = f"give it as {NAMES[0]} or {NAMES[1]}, or install a newer petune"
        raise MovedError(f"{here}: {what}: {remedy}.")
    return found


def under_its_name(
    arguments: dict[str, Any], parameters: Sequence[str]
) -> dict[str, Any]:
    """The arguments of a forward, its cache under the name that this version's forward takes.

    Args:
        parameters: the names of the forward's arguments.
    """
    given = next(filter(arguments.__contains__, NAMES), None)
    taken = next(filter(parameters.__contains__, NAMES), None)
    if given is None or taken is None or given in parameters:
        return arguments
    renamed = dict(arguments)
    renamed[taken] = renamed.pop(given)
    return renamed


def seen_tokens(arguments: Mapping[str, Any]) -> int:
    """How many columns the cache among the arguments of a model's forward holds: 0 without one, and 1 for a recurrent
    state, which does not tell how many have gone into it, unless it is empty.
    """
    cache = cache_of(arguments)
    length = getattr(cache, "get_seq_length", None)
    if length is None:
        return 0
    try:
        return int(length())
    except ValueError:  # transformers' answer for a cache of recurrent states alone
        return int(_has_state(cache))


def _has_state(cache: Any) -> bool:
    asked = getattr(cache, "has_previous_state", False)
    return bool(asked() if callable(asked) else asked)
