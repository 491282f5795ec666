"""Where a model's forward takes and gives its cache of keys and values."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
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
    return any(name in parameters for name in NAMES) and hasattr(Cache, "get_seq_length")


def cache_of(arguments: Mapping[str, Any]) -> Any:
    """The cache among the arguments of a model's forward, under whichever name; None if there is none.

    Raises:
        MovedError: a cache stands under a name that petune does not know.
    """
    for name in NAMES:
        if arguments.get(name) is not None:
            return arguments[name]
    for name, value in arguments.items():
        if isinstance(value, Cache):
            raise MovedError(
                f"transformers {installed('transformers')}: a cache is given as {name!r}, which petune does not "
                f"know; it knows {', '.join(NAMES)}. Give it by one of these, or install a newer petune."
            )
    return None


def seen_tokens(arguments: Mapping[str, Any]) -> int:
    """How many columns the cache among the arguments of a model's forward holds, 0 without one."""
    cache = cache_of(arguments)
    length = getattr(cache, "get_seq_length", None)
    return int(length()) if length is not None else 0
