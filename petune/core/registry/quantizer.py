"""Models and tokenizers, at any installed precision and with any head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel


class Quantizer(Protocol):
    """A precision that a plugin brings."""

    @property
    def bits(self) -> float:
        """What a weight takes, its share of the scales included."""

    def arguments(self, skip: Sequence[str], dtype: torch.dtype) -> Mapping[str, Any]:
        """What to tell transformers' `from_pretrained`: modules in `skip` stay in `dtype`, others compute in it.

        Raises:
            PetuneError: a package that this precision needs is missing.
        """

    def prepare(self, model: PreTrainedModel) -> None:
        """Do what is left to be done once the weights are there; with a model of another quantizer, nothing."""

    def requantize(
        self, module: nn.Module, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> nn.Module | None:
        """A layer that stores this weight, (out, in) in float32, as `module` stores its own; None if the module is
        none of this quantizer's.
        """
