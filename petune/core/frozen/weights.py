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
from petune.core.host.experts import stacks
from petune.core.host.quantization import was_transposed

ROWS = 1024
"""How many rows of the identity go through a layer at a time: the memory that probing takes."""
DENSE = (nn.Linear, Conv1D, nn.Embedding)
"""The plain classes, whose weight can be read and written."""

Pair = tuple[Tensor, Tensor]
"""The weight (out, in) and the bias (out,) of a linear layer, in float32."""


def is_quantized(module: nn.Module) -> bool:
    """A linear layer whose weight is stored in codes: no floating point, or a tensor that knows how to become one."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or features(module) is None:
        return False
    if not weight.is_floating_point():
        return True
    return type(weight).dequantize is not Tensor.dequantize


def is_dense(module: nn.Module) -> bool:
    """A layer of the plain classes, whose weight can be written."""
    return base_class(module) in DENSE and not is_quantized(module)


def compute_dtype(module: nn.Module) -> torch.dtype:
    """The dtype of a layer's activations: its weight's, or what a quantized layer was told to compute in."""
    weight = module.weight
    if isinstance(weight, Tensor) and weight.is_floating_point():
        return weight.dtype
    told: torch.dtype | None = getattr(module, "compute_dtype", None)
    return told or torch.float32


@torch.no_grad()
def probe(
    f: Callable[[Tensor], Tensor], module: Any, dtype: torch.dtype | None = None
) -> Pair:
    """(W, b) of an affine map f over a linear layer's inputs.

    Args:
        dtype: that of what goes into f; the layer's own unless given.
    """
    into, _ = _size(module)
    device = module.weight.device
    dtype = dtype or compute_dtype(module)
    b = _at_zero(f, into, dtype, device)
    columns = []
    for start in range(0, into, ROWS):
        rows = torch.zeros(min(ROWS, into - start), into, dtype=dtype, device=device)
        rows[:, start:].fill_diagonal_(1)
        columns.append(f(rows).float() - b)
    return torch.cat(columns).T.contiguous(), b


def _at_zero(
    f: Callable[[Tensor], Tensor], into: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """f(0) in float32, (out,)."""
    return f(torch.zeros(1, into, dtype=dtype, device=device))[0].float()


def stacked(module: Any, parameter: str) -> Pair:
    """(W, b) of a projection of stacked experts, (experts, out, in) and (experts, out). Not to be written to."""
    stack = stacks(module)[parameter]
    weight = stack.weight.detach().float()
    weight = weight.mT if stack.transposed else weight
    if stack.bias is None:
        return weight, weight.new_zeros(weight.shape[:2])
    return weight, stack.bias.detach().float()


def stored(layer: Any) -> Pair:
    """(W, b) of a linear layer: read where it is dense, probed elsewhere. Not to be written to."""
    if not _is_readable(layer):
        return probe(base_forward(layer), layer)
    weight = layer.weight.detach().float()
    return (weight.T if isinstance(layer, Conv1D) else weight), bias_of(layer)


@torch.no_grad()
def bias_of(layer: Any) -> Tensor:
    """The bias of a linear layer, (out,): read where it is dense, probed elsewhere; zeros where it has none."""
    if not _is_readable(layer):
        into, _ = _size(layer)
        return _at_zero(
            base_forward(layer), into, compute_dtype(layer), layer.weight.device
        )
    if layer.bias is not None:
        bias: Tensor = layer.bias.detach().float()
        return bias
    _, out = _size(layer)
    return torch.zeros(out, device=layer.weight.device)


def _size(layer: nn.Module) -> tuple[int, int]:
    """(in, out) of what is known to be a linear layer."""
    size = features(layer)
    assert size is not None, f"{type(layer).__name__} is no linear layer"
    return size


def _is_readable(layer: Any) -> bool:
    """Whether the weight is there to be read: accelerate brings an offloaded one when the layer runs."""
    return is_dense(layer) and not layer.weight.is_meta


def dense(module: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The layer that a (quantized) linear layer is, with its own weights."""
    weight, bias = stored(module)
    return linear(module, weight, bias if module.bias is not None else None, dtype)


def linear(
    old: nn.Module, weight: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> nn.Module:
    """A dense layer of the class that the architecture has there, so that a saved model loads again."""
    out, into = weight.shape
    layer: nn.Module
    is_conv = isinstance(old, Conv1D) or was_transposed(old)
    if is_conv:
        weight, bias = (
            weight.T,
            torch.zeros(out, device=weight.device) if bias is None else bias,
        )
        with torch.device("meta"):
            layer = Conv1D(out, into)  # type: ignore[no-untyped-call]
    else:
        with torch.device("meta"):
            layer = nn.Linear(into, out, bias=bias is not None)
    layer.weight = nn.Parameter(weight.to(dtype).contiguous(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.to(dtype), requires_grad=False)
    return layer
