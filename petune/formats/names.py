"""How PEFT names modules and tensors: its prefix, ends of names in place of whole ones, regular expressions."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from petune.core.frozen.modules import walk

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
OUTER = "base_model."
PREFIX = OUTER + "model."
"""What stands before the name of a module in a saved tensor's name; before a prompt's heads it is `OUTER` alone."""


def without_prefix(key: str) -> str:
    """The name of a saved tensor as the model itself would call it."""
    if key.startswith(PREFIX):
        return key.removeprefix(PREFIX)
    return key.removeprefix(OUTER)


def input_embedding(model: PreTrainedModel) -> str:
    """The name of the table that PEFT takes as the input embedding."""
    table = model.get_input_embeddings()
    return next(name for name, module in walk(model) if module is table)


def short_names(model: PreTrainedModel, names: set[str]) -> list[str]:
    """The last words of the names (`q_proj`), which serving engines expect, if no other module of the model ends in
    one of them; otherwise the whole names.
    """
    ends = {_last_word(name) for name in names}
    meant = {name for name, _ in walk(model) if _last_word(name) in ends}
    return sorted(ends if meant == names else names)


def _last_word(name: str) -> str:
    return name.rpartition(".")[2]


def is_listed(name: str, listing: str | Sequence[str]) -> bool:
    """Whether a list of PEFT's means this module. The list holds ends of names, or is one regular expression."""
    if isinstance(listing, str):
        return re.fullmatch(listing, name) is not None
    return f".{name}".endswith(tuple(listing))


def exceptions_by_module(
    pattern: Mapping[str, Any] | None, names: Iterable[str]
) -> dict[str, Any] | None:
    """PEFT's values for single modules (`rank_pattern`), by the whole names of the modules that they mean.

    PEFT's own keys are ends of names or regular expressions. None stands for no exception at all.
    """
    found = {}
    for name in names:
        value = _first_match(pattern or {}, name)
        if value is not None:
            found[name] = value
    return found or None


def _first_match(pattern: Mapping[str, Any], name: str) -> Any:
    for end, value in pattern.items():
        if re.match(rf"(.*\.)?({end})$", name):
            return value
    return None
