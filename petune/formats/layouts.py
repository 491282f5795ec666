"""How PEFT lays out what petune keeps in another shape, under the names that a `PeftTwin` uses."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isqrt
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from petune.core.frozen.modules import base_class
from petune.core.frozen.tables import is_causal
from petune.errors import UnsupportedError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from petune.core.frozen.site import Site

Plain = Mapping[str, Mapping[str, Tensor]]
"""What `Adapter.plain` says, by site."""


@dataclass
class Place:
    """Where a tensor belongs: its site, whether `PeftTwin.roles` lists that, and the site's other tensors, as ours."""

    site: Site
    listed: bool
    others: Mapping[str, Tensor]


class Shape(NamedTuple):
    """Ours to PEFT's, and back."""

    write: Callable[[Tensor, Place], Tensor]
    read: Callable[[Tensor, Place], Tensor]


def _vector(theirs: Tensor, place: Place) -> Tensor:
    if theirs.shape[int(place.listed)] != theirs.numel():
        raise UnsupportedError(
            f"{place.site.name}: PEFT's vector acts on the other side of the layer."
        )
    return theirs.flatten()


def _to_skew(ours: Tensor, place: Place) -> Tensor:
    block = (
        1 + isqrt(1 + 8 * ours.shape[-1])
    ) // 2  # b (b - 1) / 2 entries stand above the diagonal
    row, column = torch.triu_indices(block, block, 1)
    out = ours.new_zeros(*ours.shape[:-1], block, block)
    out[..., row, column] = ours
    return out - out.mT


def _from_skew(theirs: Tensor, place: Place) -> Tensor:
    row, column = torch.triu_indices(theirs.shape[-2], theirs.shape[-1], 1)
    return (theirs - theirs.mT)[..., row, column] / 2


def _gain(place: Place) -> Tensor:
    """The base's weight, if it is what the norm multiplies by (Gemma's adds one)."""
    module = place.site.module
    plain = copy.copy(module)
    plain.__class__ = base_class(module)
    zeros = {
        name: torch.zeros_like(p) for name, p in plain.named_parameters(recurse=False)
    }
    weight: Any = module.weight
    if (
        torch.func.functional_call(plain, zeros, torch.ones_like(weight)[None]).any()
        or not weight.all()
    ):
        raise UnsupportedError(
            f"{place.site.name}: its gain is not its weight, so that PEFT's can't be told from it."
        )
    return weight.detach().float().cpu()


def _bias(place: Place) -> Tensor:
    bias: Any = place.site.module.bias
    return bias.detach().float().cpu() * place.others["scale"].detach().cpu()


SHAPES = {
    "column": Shape(
        lambda ours, place: ours[:, None], lambda theirs, place: theirs.flatten()
    ),
    "row or column": Shape(
        lambda ours, place: ours.reshape((1, -1) if place.listed else (-1, 1)), _vector
    ),
    "skew": Shape(_to_skew, _from_skew),
    "gain": Shape(
        lambda ours, place: ours * _gain(place),
        lambda theirs, place: theirs / _gain(place),
    ),
    "shift": Shape(
        lambda ours, place: ours + _bias(place),
        lambda theirs, place: theirs - _bias(place),
    ),
}
"""`gain` and `shift`: ours are relative to the base's weight and bias (`scale`, and what is added), PEFT's absolute."""


class Whole(NamedTuple):
    """All sites' tensors to the one of PEFT's, and back."""

    write: Callable[[PreTrainedModel, Plain, list[Site]], Tensor]
    read: Callable[[PreTrainedModel, Tensor, list[Site]], dict[str, Tensor]]


def _check_prompt(model: PreTrainedModel) -> None:
    if not is_causal(model) and not model.config.is_encoder_decoder:
        raise UnsupportedError(
            "PEFT puts a prompt before the first token of an encoder, from which it reads a class."
        )


def _write_prompt(model: PreTrainedModel, tensors: Plain, sites: list[Site]) -> Tensor:
    _check_prompt(model)
    return tensors[sites[0].name]["rows"]


def _read_prompt(
    model: PreTrainedModel, theirs: Tensor, sites: list[Site]
) -> dict[str, Tensor]:
    _check_prompt(model)
    return {f"{sites[0].name}.rows": theirs}


def _write_prefix(model: PreTrainedModel, tensors: Plain, sites: list[Site]) -> Tensor:
    _check_prefix(model, sites)
    rows = []
    for site in sites:
        keys, values = (
            tensors[site.name]["keys"],
            tensors[site.name]["values"],
        )  # (kv_heads, length, head_dim)
        rows += [_turned(model, site, keys, keys.shape[1]), values]
    return torch.cat(
        [t.transpose(0, 1).flatten(1) for t in rows], 1
    )  # (length, layers · 2 · kv_heads · head_dim)


def _read_prefix(
    model: PreTrainedModel, theirs: Tensor, sites: list[Site]
) -> dict[str, Tensor]:
    _check_prefix(model, sites)
    length, found = len(theirs), {}
    for site, pair in zip(sites, theirs.chunk(len(sites), 1), strict=True):
        keys, values = pair.reshape(length, 2, site.kv_heads, site.head_dim).permute(
            1, 2, 0, 3
        )
        found[f"{site.name}.keys"], found[f"{site.name}.values"] = (
            _turned(model, site, keys, -length),
            values,
        )
    return found


def _check_prefix(model: PreTrainedModel, sites: list[Site]) -> None:
    if [(s.role, s.layer) for s in sites] != [
        ("attention", i) for i in range(model.config.num_hidden_layers)
    ]:
        raise UnsupportedError(
            "PEFT's prefixes stand in the self-attention of every layer of a decoder alone."
        )


def _turned(model: PreTrainedModel, site: Site, keys: Tensor, by: int) -> Tensor:
    """Keys turned on by some positions. PEFT's prefix takes the first positions, so that its tokens stand behind it;
    ours has none. Where positions are rotations the two are one but for this turn.
    """
    turn = getattr(
        sys.modules[base_class(site.module).__module__], "apply_rotary_pos_emb", None
    )
    found = [m for m in model.modules() if hasattr(m, "inv_freq")]
    if turn is None or len(found) != 1 or not getattr(site.module, "use_rope", True):
        raise UnsupportedError(
            "PEFT's prefix moves the tokens' positions, which needs rotary positions to be undone."
        )
    rotary: Any = found[0]
    at = torch.full((1, keys.shape[1]), by, device=rotary.inv_freq.device)
    k = keys[None].detach().to(at.device, torch.float32)
    return (turn(k, k, *rotary(k, at))[1][0] / rotary.attention_scaling).to(keys.device)


WHOLES = {
    "prompt": Whole(_write_prompt, _read_prompt),
    "prefix": Whole(_write_prefix, _read_prefix),
}
