"""Folding adapters into the base: what a layer computes with them is read off its values and written into it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from petune.core.frozen.config import forget_quantization
from petune.core.frozen.modules import base_class, walk
from petune.core.frozen.weights import compute_dtype, dense, is_quantized
from petune.core.graft.module import Graft, grafted_class
from petune.core.registry.plugins import registry
from petune.errors import UnsupportedError


def _requantized(module: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A layer stored as `module` is, by whichever quantizer knows how."""
    for quantizer in registry().all("petune_quantizers").values():
        made: nn.Module | None = quantizer.requantize(module, weight, bias)
        if made is not None:
            return made
    kind = base_class(module).__name__
    raise UnsupportedError(
        f"no installed quantizer can write a {kind} layer; merge into dense weights."
    )


def dequantize(model: nn.Module) -> None:
    """Replace every quantized linear layer by the dense one that it stands for, in place."""
    for name, module in list(walk(model)):
        if is_quantized(module):
            _replace(model, name, module, dense(module, compute_dtype(module)))
    forget_quantization(model)


def _replace(model: nn.Module, name: str, old: nn.Module, new: nn.Module) -> None:
    """Put `new` in the place of `old`; the adapters on it move along."""
    parent, _, child = name.rpartition(".")
    new.train(old.training)
    here: Graft | None = vars(old).get("petune_graft")
    if here is not None:
        vars(new)["petune_graft"] = here
        if "petune" in old._modules:
            new.add_module("petune", old._modules["petune"])
        kind: Any = type(new)
        mixin: Any = type(old).__mro__[1]
        new.__class__ = grafted_class(kind, mixin)
        for link in [*here.links, *here.attention]:
            object.__setattr__(link.site, "module", new)
    setattr(model.get_submodule(parent), child, new)
