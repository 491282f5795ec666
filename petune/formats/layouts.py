"""How PEFT lays out a tensor that petune keeps in another shape, one layout a name, as `PeftTwin.layouts` says them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from petune.core.frozen.modules import base_class
from petune.errors import UnsupportedError
from petune.formats.shapes import side_of

if TYPE_CHECKING:
    from petune.core.frozen.site import Site

TensorsBySite = Mapping[str, Mapping[str, Tensor]]
"""A tuning's tensors, as `Adapter.plain` gives them, by the names of their sites."""


@dataclass(frozen=True)
class Surroundings:
    """What a layout needs to know besides the tensor itself.

    Args:
        site: the site that the tensor belongs to.
        listed: whether the site is among those that `PeftTwin.roles` lists.
        others: the site's other tensors, in petune's shape.
    """

    site: Site
    listed: bool
    others: Mapping[str, Tensor]


class TwoWay(NamedTuple):
    """A layout: from petune's shape to PEFT's, and back."""

    write: Callable[[Tensor, Surroundings], Tensor]
    read: Callable[[Tensor, Surroundings], Tensor]


def _write_column(ours: Tensor, around: Surroundings) -> Tensor:
    return ours[:, None]


def _read_column(theirs: Tensor, around: Surroundings) -> Tensor:
    return theirs.flatten()


def _write_vector(ours: Tensor, around: Surroundings) -> Tensor:
    """A row where the vector scales the layer's input, a column where it scales its output."""
    return ours.reshape((1, -1) if around.listed else (-1, 1))


def _read_vector(theirs: Tensor, around: Surroundings) -> Tensor:
    long_side = 1 if around.listed else 0
    if theirs.shape[long_side] != theirs.numel():
        raise UnsupportedError(
            f"{around.site.name}: PEFT's vector acts on the other side of the layer."
        )
    return theirs.flatten()


def _write_skew(ours: Tensor, around: Surroundings) -> Tensor:
    """The whole skew-symmetric matrix from the b (b - 1) / 2 entries above its diagonal.

    Shapes: (…, b (b - 1) / 2) -> (…, b, b).
    """
    block = side_of(ours.shape[-1])
    row, column = torch.triu_indices(block, block, 1)
    upper = ours.new_zeros(*ours.shape[:-1], block, block)
    upper[..., row, column] = ours
    return upper - upper.mT


def _read_skew(theirs: Tensor, around: Surroundings) -> Tensor:
    """The entries above the diagonal of the skew-symmetric part. Shapes: (…, b, b) -> (…, b (b - 1) / 2)."""
    row, column = torch.triu_indices(theirs.shape[-2], theirs.shape[-1], 1)
    twice = theirs - theirs.mT
    return twice[..., row, column] / 2


def _write_gain(ours: Tensor, around: Surroundings) -> Tensor:
    return ours * _base_gain(around)


def _read_gain(theirs: Tensor, around: Surroundings) -> Tensor:
    return theirs / _base_gain(around)


def _base_gain(around: Surroundings) -> Tensor:
    """The norm's weight, if it is what the norm multiplies by; Gemma's norm multiplies by one more than its weight."""
    module = around.site.module
    weight: Any = module.weight
    if _acts_without_weight(module) or not weight.all():
        raise UnsupportedError(
            f"{around.site.name}: its gain is not its weight, so that PEFT's can't be told from it."
        )
    return weight.detach().float().cpu()


def _acts_without_weight(module: Any) -> bool:
    """Whether a norm gives anything but zeros when all its own parameters are zero."""
    plain = copy.copy(module)
    plain.__class__ = base_class(module)
    zeros = {
        name: torch.zeros_like(p) for name, p in plain.named_parameters(recurse=False)
    }
    ones = torch.ones_like(module.weight)[None]
    return bool(torch.func.functional_call(plain, zeros, ones).any())


def _write_shift(ours: Tensor, around: Surroundings) -> Tensor:
    return ours + _scaled_base_bias(around)


def _read_shift(theirs: Tensor, around: Surroundings) -> Tensor:
    return theirs - _scaled_base_bias(around)


def _scaled_base_bias(around: Surroundings) -> Tensor:
    return _base_bias(around) * around.others["scale"].detach().cpu()


def _write_bias(ours: Tensor, around: Surroundings) -> Tensor:
    return ours + _base_bias(around)


def _read_bias(theirs: Tensor, around: Surroundings) -> Tensor:
    return theirs - _base_bias(around)


def _base_bias(around: Surroundings) -> Tensor:
    bias: Any = getattr(around.site.module, "bias", None)
    if not isinstance(bias, Tensor):
        raise UnsupportedError(
            f"{around.site.name} has no bias in this model, and PEFT trains only those that are there."
        )
    return bias.detach().float().cpu()


def _write_ranks(ours: Tensor, around: Surroundings) -> Tensor:
    """(experts, rank, in) -> (experts · rank, in)."""
    return ours.flatten(0, 1) if around.site.experts else ours


def _read_ranks(theirs: Tensor, around: Surroundings) -> Tensor:
    experts, into = around.site.experts, theirs.shape[-1]
    return theirs.reshape(experts, -1, into) if experts else theirs


def _write_ranks_last(ours: Tensor, around: Surroundings) -> Tensor:
    """(experts, out, rank) -> (out, rank · experts)."""
    return ours.permute(1, 2, 0).flatten(1) if around.site.experts else ours


def _read_ranks_last(theirs: Tensor, around: Surroundings) -> Tensor:
    experts, out = around.site.experts, len(theirs)
    return theirs.reshape(out, -1, experts).permute(2, 0, 1) if experts else theirs


LAYOUTS = {
    "column": TwoWay(_write_column, _read_column),
    "row or column": TwoWay(_write_vector, _read_vector),
    "skew": TwoWay(_write_skew, _read_skew),
    "gain": TwoWay(_write_gain, _read_gain),
    "shift": TwoWay(_write_shift, _read_shift),
    "bias": TwoWay(_write_bias, _read_bias),
    "ranks": TwoWay(_write_ranks, _read_ranks),
    "ranks last": TwoWay(_write_ranks_last, _read_ranks_last),
}
"""`gain`, `shift` and `bias`: ours are relative to the base's weight and bias (`scale`, and what is added), PEFT's
absolute; with `bias` nothing scales the base's. `ranks` and `ranks last`: PEFT keeps those of all experts in one
matrix."""
