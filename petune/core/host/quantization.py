"""What transformers notes on a quantized model beside its weights."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from petune.core.host.seam import Seams

SEAMS = Seams()
NOTES = (
    "hf_quantizer",
    "quantization_method",
    "is_quantized",
    "is_loaded_in_4bit",
    "is_loaded_in_8bit",
)
"""Attributes of a model whose weights a quantizer stores; its configuration has `quantization_config` besides."""


@SEAMS.lean(
    "transformers",
    "the attribute hf_quantizer of a quantized model",
    since="4.38",
    why="save and move a model as a dense one once nothing in it is quantized",
)
def _quantized_models_hold_their_quantizer() -> bool:
    return "hf_quantizer" in inspect.getsource(PreTrainedModel.save_pretrained)


def forget_quantization(model: Any) -> None:
    """Nothing quantized is left in the model: transformers saves and moves it as any other."""
    vars(model.config).pop("quantization_config", None)
    for note in NOTES:
        vars(model).pop(note, None)


def was_transposed(layer: nn.Module) -> bool:
    """Whether a quantizer has made the layer of a Conv1D, whose weight is (in, out): transformers notes it."""
    return getattr(layer, "source_cls", None) is Conv1D
