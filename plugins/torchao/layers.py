"""Linear layers over int8 codes."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torchao.quantization import Int8Tensor
from torchao.quantization.granularity import PerAxis
from transformers.pytorch_utils import Conv1D


class _Map(torch.autograd.Function):
    """y = W x. Left to autograd, torchao's own would keep a dense copy of each layer's W for backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Any, transposed: bool) -> Tensor:
        ctx.weight, ctx.transposed = weight, transposed
        return x @ weight.dequantize(x.dtype) if transposed else F.linear(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        weight = ctx.weight.dequantize(grad.dtype)
        return grad @ (weight.T if ctx.transposed else weight), None, None


class QuantizedLinear(nn.Linear):
    """Codes and a scale for each row: weight (out, in)."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Map.apply(x, self.weight, False)  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias


class QuantizedConv1D(Conv1D):
    """Codes and a scale for each column: weight (in, out)."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Map.apply(x, self.weight, True)  # type: ignore[no-untyped-call]
        return y + self.bias


def adopt(module: nn.Module, convert: bool) -> None:
    """Make a layer that transformers has quantized one of these, and with `convert` one that it has no way to."""
    if type(module) is nn.Linear and isinstance(module.weight, Int8Tensor):
        module.__class__ = QuantizedLinear
        vars(module).pop(
            "extra_repr", None
        )  # torchao's is bound to the module: a copy would show the original's
    elif type(module) is Conv1D and (convert or isinstance(module.weight, Int8Tensor)):
        if not isinstance(module.weight, Int8Tensor):
            module.weight = _codes(module.weight, 1)
        module.__class__ = QuantizedConv1D


def remade(module: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module | None:
    """A layer of the same class that stores `weight`, (out, in); None for other classes."""
    if not isinstance(module, QuantizedLinear | QuantizedConv1D):
        return None
    out, into = weight.shape
    wide, dtype = isinstance(module, QuantizedConv1D), module.weight.dtype
    conv: Any = QuantizedConv1D
    with torch.device("meta"):
        new: Any = (
            conv(out, into)
            if wide
            else QuantizedLinear(into, out, bias=bias is not None)
        )
    new.weight = _codes(
        (weight.T if wide else weight).to(dtype).contiguous(), int(wide)
    )
    if bias is not None:
        new.bias = nn.Parameter(bias.to(dtype), requires_grad=False)
    return new


def _codes(weight: Tensor, axis: int) -> nn.Parameter:
    """int8 codes and a scale for each index of `axis`."""
    return nn.Parameter(
        Int8Tensor.from_hp(weight.detach(), granularity=PerAxis(axis)),
        requires_grad=False,
    )
