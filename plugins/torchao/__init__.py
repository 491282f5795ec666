"""Weight-only 8-bit bases by torchao, on a GPU or a CPU (https://github.com/pytorch/ao)."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from inspect import signature
from typing import TYPE_CHECKING, Any

import petune

if TYPE_CHECKING:
    import torch
    from torch import nn

# on import it names each kernel that it could not load, and torch its deprecated calls
logging.getLogger("torchao").setLevel(logging.ERROR)
logging.getLogger("torch.utils._pytree").addFilter(
    lambda record: "Enum subclass" not in record.getMessage()
)


@dataclass(frozen=True)
class WeightOnly:
    """W_ij = s_i c_ij with int8 codes c and a scale for each output; activations stay as they are, unlike LLM.int8()'s.

    What transformers leaves dense, GPT-2's transposed layers, is stored in the same way.
    """

    bits: float = 8.0

    def arguments(self, skip: Sequence[str], dtype: torch.dtype) -> Mapping[str, Any]:
        """The modules in `skip` stay in `dtype`, in which the others compute. On a GPU, if there is one."""
        if find_spec("torchao") is None:
            raise petune.PetuneError(
                "this precision needs torchao: pip install torchao"
            )
        import torch
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        kind: Any = Int8WeightOnlyConfig
        # version 2 stores an Int8Tensor; torchao before 0.18 has version 1 by default
        told = {"version": 2} if "version" in signature(kind).parameters else {}
        place = (
            {"device_map": {"": torch.cuda.current_device()}}
            if torch.cuda.is_available()
            else {}
        )
        return {
            "quantization_config": TorchAoConfig(
                kind(**told), modules_to_not_convert=list(skip)
            ),
            **place,
        }

    def prepare(self, model: Any) -> None:
        """Give the layers a forward that keeps codes alone for backward. The transposed layers that transformers
        leaves dense are stored in codes if petune has loaded the model; another's stays what it computes.
        """
        config: Any = getattr(model.config, "quantization_config", None)
        if getattr(config, "quant_method", None) != "torchao":
            return
        from petune_plugins.torchao.layers import adopt

        skip = config.modules_to_not_convert or ()
        ours = hasattr(model, "petune_fresh")
        for name, module in model.named_modules():
            if not any(name == kept or name.startswith(f"{kept}.") for kept in skip):
                adopt(module, convert=ours)

    def requantize(
        self, module: Any, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> nn.Module | None:
        """The same, with scales of its own."""
        if find_spec("torchao") is None:
            return None
        from petune_plugins.torchao.layers import remade

        return remade(module, weight, bias)


@petune.hookimpl
def petune_quantizers() -> Mapping[str, petune.Quantizer]:
    """The weights of linear layers in 8 bits."""
    return {"int8wo": WeightOnly()}
