"""Layers take each other's places: dense ones those of quantized ones, and back."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from petune.core.frozen.modules import base_class, walk
from petune.core.frozen.weights import compute_dtype, dense, is_quantized
from petune.core.graft.board import board_of
from petune.core.graft.module import Graft, grafted_class
from petune.core.host.quantization import forget_quantization
from petune.core.host.torch_modules import children_of
from petune.core.registry.plugins import registry
from petune.errors import UnsupportedError


def prepare(model: nn.Module) -> None:
    """Let the quantizers' plugins see to a model with quantized layers, which petune may not have loaded. A model that
    has a tuning was seen to when its first came, and what trains in it now is no layer of the base.

    Raises:
        PetuneError: the layers can't be trained through as they are.
    """
    if board_of(model) is None and _has_quantized(model):
        for quantizer in registry().all("petune_quantizers").values():
            quantizer.prepare(model)


def requantized(module: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A layer with this weight, (out, in) in float32, stored as `module` is, by whichever quantizer knows how.

    Raises:
        UnsupportedError: none does.
    """
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
            replace_module(model, name, module, dense(module, compute_dtype(module)))
    forget_quantization(model)


def forget_if_dense(model: nn.Module) -> None:
    """Let transformers take the model for a dense one if nothing in it is quantized any more."""
    if not _has_quantized(model):
        forget_quantization(model)


def _has_quantized(model: nn.Module) -> bool:
    return any(map(is_quantized, dict(walk(model)).values()))


def replace_module(model: nn.Module, name: str, old: nn.Module, new: nn.Module) -> None:
    """Put `new` in the place of `old`; the adapters on it move along."""
    parent, _, child = name.rpartition(".")
    new.train(old.training)
    here: Graft | None = vars(old).get("petune_graft")
    if here is not None:
        _move(here, old, new)
    setattr(model.get_submodule(parent), child, new)


def _move(here: Graft, old: nn.Module, new: nn.Module) -> None:
    vars(new)["petune_graft"] = here
    if "petune" in children_of(old):
        new.add_module("petune", children_of(old)["petune"])
    kind: Any = type(new)
    mixin: Any = type(old).__mro__[1]
    new.__class__ = grafted_class(kind, mixin)
    for link in (*here.links, *here.attention):
        object.__setattr__(link.site, "module", new)
