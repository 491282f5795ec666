"""How PEFT names modules and tensors: its prefix, ends of names in place of whole ones, regular expressions."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from petune.core.frozen.modules import walk

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WHOLE_KEY = "prompt_embeddings"
"""The name of the one tensor of a prompt or of prefixes."""
TASK_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""PEFT's name of a task -> how the names of heads end that PEFT trains along, whether asked to or not."""
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
OUTER = "base_model."
PREFIX = OUTER + "model."
"""What stands before the name of a module in a saved tensor's name; before a prompt's heads it is `OUTER` alone."""
INSERTED = BASE_LAYER, TOKENS = ".base_layer.", ".token_adapter."
"""Modules of PEFT's inside the name of a saved tensor: around an adapted layer, and around a table of tokens."""
BESIDE = {"trainable_token_indices": TOKENS}
"""Option -> the module of PEFT's that holds what the option trains; for all others it is the layer adapted."""
WRAPPED = (".original_module.", ".modules_to_save.")


def in_model(key: str) -> str:
    """The name of a saved tensor as the model itself would call it, without PEFT's modules around its own."""
    for prefix in (PREFIX, OUTER):
        if key.startswith(prefix):
            key = key.removeprefix(prefix)
            break
    for inserted in INSERTED:
        key = key.replace(inserted, ".")
    return key


def is_wrapped(key: str) -> bool:
    """Whether a saved tensor is there a second time: where PEFT saves all biases it saves a head's under the names of
    its wrapper too.
    """
    return any(map(key.count, WRAPPED))


def outermost(key: str, ends: tuple[str, ...]) -> str:
    """The outermost module in the name of a tensor, or of a module inside it, whose own name ends so; "" where none
    does.
    """
    words = key.split(".")
    for count in range(1, len(words)):
        path = ".".join(words[:count])
        if path.endswith(ends):
            return path
    return ""


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
