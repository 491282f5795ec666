"""What a merged model has to tell transformers, so that it saves as it is and loads again."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import nn

from petune.core.frozen.modules import base_class

STACKLEVEL = 4
"""From a warning here up to whoever called `tuning.merge`."""


def declare(model: Any) -> None:
    """Make the configuration say what the merged weights are: untied heads, biases that
    were not there.
    """
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and head.weight is not table.weight:
        model.config.tie_word_embeddings = False
    lost = unplaced(model)
    if lost:
        _declare_biases(model, lost)


def _declare_biases(model: Any, lost: list[str]) -> None:
    """Turn on what in the configuration gives a place to the biases that were lost; warn
    where nothing does.
    """
    flags = _needed(model)
    if unplaced(model, **flags):
        kind, first = model.config.model_type, lost[0]
        more = f" and {len(lost) - 1} more".removesuffix(" and 0 more")
        what = f"a saved {kind} has no place for {first}{more}."
        warnings.warn(what, stacklevel=STACKLEVEL)
        return
    vars(model.config).update(flags)
    _fill_places(model)


def _needed(model: Any) -> dict[str, bool]:
    """Of the configuration's switches for biases those without which something is lost."""
    switches = model.config.to_dict()
    biases = filter(lambda key: key.endswith("bias"), switches)
    off = [key for key in biases if switches[key] is False]
    flags = dict.fromkeys(off, True)
    for key in off:
        others = {**flags}
        del others[key]
        if not unplaced(model, **others):
            flags = others
    return flags


def _fill_places(model: Any) -> None:
    """Put zeros where the configuration now has a place for a bias: transformers would
    draw one anew.
    """
    present = dict(model.named_parameters(remove_duplicate=False))
    for name in _places(model) - present.keys():
        owner = model.get_submodule(name.rpartition(".")[0])
        zeros = torch.zeros(owner.out_features, device=owner.weight.device)
        owner.bias = nn.Parameter(zeros, requires_grad=False)


def unplaced(model: Any, **changed: Any) -> list[str]:
    """The parameters that transformers would drop, since the architecture has no place
    for them.

    Args:
        changed: keys of the configuration that have another value meanwhile.
    """
    places = _places(model, **changed)
    own = dict(model.named_parameters())
    return [name for name in own if name not in places and ".petune." not in name]


def _places(model: Any, **changed: Any) -> set[str]:
    """The names of the parameters that the architecture has by its configuration."""
    config = copy.deepcopy(model.config)
    vars(config).update(changed)
    with torch.device("meta"):
        made = base_class(model)(config)
    return set(dict(made.named_parameters(remove_duplicate=False)))
