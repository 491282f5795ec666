"""What a merged model has to tell transformers, so that it saves as it is and loads again."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import nn

from petune.core.frozen.modules import base_class


def settle(model: Any) -> None:
    """Make the configuration say what the merged weights are: untied heads, biases that were not there."""
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    if model.config.tie_word_embeddings and head is not None and head.weight is not table.weight:
        model.config.tie_word_embeddings = False
    _declare_biases(model)


def _declare_biases(model: Any) -> None:
    lost = unplaced(model)
    if not lost:
        return
    flags = {
        key: True
        for key, value in model.config.to_dict().items()
        if key.endswith("bias") and value is False
    }
    for key in list(flags):  # only those that it takes
        if not unplaced(model, **{other: True for other in flags if other != key}):
            del flags[key]
    if unplaced(model, **flags):
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        warnings.warn(
            f"a saved {model.config.model_type} has no place for {lost[0]}{more}.", stacklevel=6
        )
        return
    for key in flags:
        setattr(model.config, key, True)
    for name in _places(model) - {n for n, _ in model.named_parameters(remove_duplicate=False)}:
        owner = model.get_submodule(name.rpartition(".")[0])  # transformers would draw it anew
        owner.bias = nn.Parameter(
            torch.zeros(owner.out_features, device=owner.weight.device), requires_grad=False
        )


def unplaced(model: Any, **changed: Any) -> list[str]:
    """The parameters that transformers would drop, since the architecture has no place for them."""
    places = _places(model, **changed)
    return [n for n, _ in model.named_parameters() if n not in places and ".petune." not in n]


def _places(model: Any, **changed: Any) -> set[str]:
    config = copy.deepcopy(model.config)
    for key, value in changed.items():
        setattr(config, key, value)
    with torch.device("meta"):
        return {n for n, _ in base_class(model)(config).named_parameters(remove_duplicate=False)}


def forget_quantization(model: Any) -> None:
    """Nothing quantized is left: transformers saves and moves the model as any other."""
    vars(model.config).pop("quantization_config", None)
    for key in (
        "hf_quantizer",
        "quantization_method",
        "is_quantized",
        "is_loaded_in_4bit",
        "is_loaded_in_8bit",
    ):
        vars(model).pop(key, None)
