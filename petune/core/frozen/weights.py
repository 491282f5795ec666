"""What a layer computes, read off its values: W = f(I) - f(0), b = f(0), whatever stores its weights.

So the same lines serve every method and every quantizer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from petune.core.frozen.modules import base_class, base_forward, features

ROWS = 1024
"""How many rows of the identity go through a layer at a time: the memory that probing takes."""


def compute_dtype(module: nn.Module) -> torch.dtype:
    """The dtype of a layer's activations: its weight's, or what a quantized layer was told to compute in."""
    weight = module.weight
    if isinstance(weight, Tensor) and weight.is_floating_point():
        return weight.dtype
    told = getattr(module, "compute_dtype", None)
    return told if isinstance(told, torch.dtype) else torch.float32


@torch.no_grad()
def probe(
    f: Callable[[Tensor], Tensor], module: Any, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """(W, b) in float32 of an affine map f over a linear layer's inputs: W (out, in), b (out)."""
    width, device = (features(module) or (0, 0))[0], module.weight.device
    dtype = dtype or compute_dtype(module)
    b = f(torch.zeros(1, width, dtype=dtype, device=device))[0].float()
    columns = []
    for start in range(0, width, ROWS):
        rows = torch.zeros(min(ROWS, width - start), width, dtype=dtype, device=device)
        rows[:, start:].fill_diagonal_(1)
        columns.append(f(rows).float() - b)
    return torch.cat(columns).T.contiguous(), b


def is_dense(module: nn.Module) -> bool:
    """A layer of the plain classes, whose weight can be written."""
    return base_class(module) in (nn.Linear, Conv1D, nn.Embedding) and not is_quantized(module)


def is_quantized(module: nn.Module) -> bool:
    """A linear layer whose weight is stored in codes: no floating point, or a tensor that knows how to become one."""
    weight = getattr(module, "weight", None)
    if features(module) is None or not isinstance(weight, Tensor):
        return False
    return not weight.is_floating_point() or type(weight).dequantize is not Tensor.dequantize


def stored(layer: Any) -> tuple[Tensor, Tensor]:
    """(W, b) of a linear layer in float32: read where it is dense, probed elsewhere. Not to be written to."""
    if (
        not is_dense(layer) or layer.weight.is_meta
    ):  # accelerate brings an offloaded weight when the layer runs
        return probe(base_forward(layer), layer)
    weight = (layer.weight.T if isinstance(layer, Conv1D) else layer.weight).detach().float()
    return weight, weight.new_zeros(
        len(weight)
    ) if layer.bias is None else layer.bias.detach().float()


def dense(module: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The layer that a (quantized) linear layer is, with its own weights."""
    weight, bias = stored(module)
    return linear(module, weight, bias if module.bias is not None else None, dtype)


def linear(old: nn.Module, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> nn.Module:
    """A dense layer of the class that the architecture has there, so that a saved model loads again."""
    transposed = (
        isinstance(old, Conv1D) or getattr(old, "source_cls", None) is Conv1D
    )  # as transformers notes it
    kind: Any = Conv1D
    out, into = weight.shape
    with torch.device("meta"):
        layer: nn.Module = (
            kind(out, into) if transposed else nn.Linear(into, out, bias=bias is not None)
        )
    layer.weight = nn.Parameter(
        (weight.T if transposed else weight).to(dtype).contiguous(), requires_grad=False
    )
    if transposed and bias is None:
        bias = weight.new_zeros(out)
    if bias is not None:
        layer.bias = nn.Parameter(bias.to(dtype), requires_grad=False)
    return layer
