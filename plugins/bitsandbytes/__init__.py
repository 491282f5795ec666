"""4-bit and 8-bit bases by bitsandbytes, on a GPU or a CPU (Dettmers et al. 2023, arXiv:2305.14314; 2208.07339)."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import petune

if TYPE_CHECKING:
    import torch
    from torch import nn

# it warns of kernels that training has no use for, and at each int8 layer's forward that it casts the input
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


@dataclass(frozen=True)
class FourBit:
    """Blocks of 64 weights with a float32 scale each; `nested` quantizes the scales once more."""

    code: str
    nested: bool

    @property
    def bits(self) -> float:
        """4 for the code; the scales add 32 bits a block, or 8 and 32 for every 256 blocks."""
        return 4 + ((8 + 32 / 256) if self.nested else 32) / 64

    def arguments(self, skip: Sequence[str], dtype: torch.dtype) -> Mapping[str, Any]:
        """The modules in `skip` stay in `dtype`, in which the others compute."""
        return _config(
            skip,
            load_in_4bit=True,
            bnb_4bit_quant_type=self.code,
            bnb_4bit_use_double_quant=self.nested,
            bnb_4bit_compute_dtype=dtype,
        )

    def prepare(self, model: nn.Module) -> None:
        """Keep the weights as they are.

        On a CPU with AVX512-BF16 a forward in evaluation mode without gradients packs them for inference, and nothing
        packs them back: the next training step would read them wrong. Packing rounds the scales, so that of weights
        packed already the stored ones can't be had again.

        Raises:
            UnsupportedError: the weights are packed.
        """
        if "bitsandbytes" not in sys.modules:
            return  # none of its layers can be here
        kind = _layers().Linear4bit
        layers = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, kind)
        }
        for name, layer in layers.items():
            if _is_packed(layer):
                what = f"{name}: an evaluation has packed its 4-bit weights for inference alone"
                remedy = "load the model anew, and attach before it is evaluated"
                raise petune.UnsupportedError(f"{what}; {remedy}.")
        for layer in layers.values():
            layer.support_avx512bf16_for_cpu = False

    def requantize(
        self, module: Any, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> nn.Module | None:
        """The same code and blocks."""
        bnb = _layers()
        if not isinstance(module, bnb.Linear4bit):
            return None
        old: Any = module.weight
        how = {
            key: getattr(old, key)
            for key in ("quant_type", "compress_statistics", "quant_storage")
        }
        new = bnb.Linear4bit(
            *weight.T.shape,
            bias=False,
            compute_dtype=module.compute_dtype,
            device="meta",
            **how,
        )
        new.weight = bnb.Params4bit(
            weight.to(old.quant_state.dtype), blocksize=old.blocksize, module=new, **how
        )
        new.support_avx512bf16_for_cpu = False
        return _dressed(new, module, bias, weight.device)


@dataclass(frozen=True)
class EightBit:
    """LLM.int8(): a scale for each row of a weight; activations beyond a threshold go at full precision."""

    bits: float = 8.0

    def arguments(self, skip: Sequence[str], dtype: torch.dtype) -> Mapping[str, Any]:
        """The modules in `skip` stay in `dtype`."""
        return _config(skip, load_in_8bit=True)

    def prepare(self, model: nn.Module) -> None:
        """Nothing is left to be done."""

    def requantize(
        self, module: Any, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> nn.Module | None:
        """Row by row, with the same threshold for activations."""
        bnb = _layers()
        if not isinstance(module, bnb.Linear8bitLt):
            return None
        threshold = module.state.threshold
        new = bnb.Linear8bitLt(
            *weight.T.shape,
            bias=False,
            has_fp16_weights=False,
            threshold=threshold,
            device="meta",
        )
        new.weight = bnb.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        return _dressed(new, module, bias, weight.device)


@petune.hookimpl
def petune_quantizers() -> Mapping[str, petune.Quantizer]:
    """QLoRA's nf4, its ablations, and int8."""
    return {
        "nf4": FourBit("nf4", nested=True),
        "nf4-single": FourBit("nf4", nested=False),
        "fp4": FourBit("fp4", nested=True),
        "int8": EightBit(),
    }


def _layers() -> Any:
    from bitsandbytes import nn

    return nn


def _is_packed(layer: Any) -> bool:
    state = getattr(layer.weight, "quant_state", None)
    return bool(getattr(state, "packing_format_for_cpu", False))


def _dressed(
    new: Any, old: Any, bias: torch.Tensor | None, device: torch.device
) -> nn.Module:
    """Moving the layer to its device quantizes it."""
    from torch import nn

    new.bias = nn.Parameter(bias, requires_grad=False) if bias is not None else None
    if hasattr(
        old, "source_cls"
    ):  # the architecture's class, by which transformers and petune know the layout
        new.source_cls = old.source_cls
    return new.to(device)


def _config(skip: Sequence[str], **options: Any) -> Mapping[str, Any]:
    if find_spec("bitsandbytes") is None:
        raise petune.PetuneError(
            "this precision needs bitsandbytes: pip install bitsandbytes accelerate"
        )
    from transformers import BitsAndBytesConfig

    config: Any = BitsAndBytesConfig
    return {"quantization_config": config(llm_int8_skip_modules=list(skip), **options)}
