"""What a method reaches of a model, and what it leaves out, which is said when it begins."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from petune.core.attached.parts import Part
from petune.core.forward.link import Link, takes_experts
from petune.core.frozen.modules import walk
from petune.core.frozen.site import KIND_OF, Site
from petune.core.method.adapter import Adapter
from petune.core.method.copies import TrainedCopy
from petune.errors import UnsupportedError

LITTLE = 0.1
"""The share of the weights in a model's blocks that may be left out unsaid: position biases, routers."""
Sizes = Mapping[str, int]
"""How many numbers a parameter has, by its name in the model."""


def with_a_form(part: Part, picked: Sequence[Site]) -> list[Site]:
    """Those of the sites picked for which the method has a form: all but stacked experts, if it has none for them.

    Raises:
        UnsupportedError: it has a form for none of them.
    """
    if takes_experts(part.cls):
        return list(picked)
    kept = [site for site in picked if site.kind != "experts"]
    if kept:
        return kept
    raise UnsupportedError(
        f"method {part.name!r} has no form for stacked experts: {picked[0].name} is one parameter for all of them."
    )


def left_out(
    model: Any, parts: Iterable[Part], links: Sequence[Link], sites: Sequence[Site]
) -> Iterator[str]:
    """What the methods of a tuning leave out where the user would not expect it, in a line each.

    Args:
        links: the tuning's.
        sites: all sites of the model.
    """
    yield from _tied_to_copies(model, links)
    for part in parts:
        if not issubclass(part.cls, Adapter):
            continue
        words = set((part.where or part.cls.where).split())
        if "linear" in set(map(KIND_OF.get, words)):
            yield from _weights_left(model, part, words, sites)
        if part.where is None:
            picked = [link.site for link in links if link.method == part.name]
            yield from _layers_left(part, picked, sites)


def _weights_left(
    model: Any, part: Part, words: Collection[str], sites: Sequence[Site]
) -> Iterator[str]:
    """Of the weights in the blocks those that a method for linear layers does not reach: stacked experts that it has
    no form for, and, of its own choice of sites, what is of no role that it could act at.
    """
    weights = _weights_in_blocks(model, sites)
    stacked = [site for site in sites if site.kind == "experts"]
    wanted = [site.name for site in stacked if words & {site.role, *site.parts}]
    if wanted and not takes_experts(part.cls):
        what = "one parameter for all experts of a layer, for which it has no form"
        yield _share(part, {name: weights[name] for name in wanted}, weights, what)
    known = {site.name for site in stacked} | _weights_with_a_role(sites)
    unknown = {name: size for name, size in weights.items() if name not in known}
    if part.where is None and sum(unknown.values()) > LITTLE * sum(weights.values()):
        yield _share(part, unknown, weights, "no linear layer of a known role")


def _share(part: Part, left: Sizes, weights: Sizes, what: str) -> str:
    share = sum(left.values()) / sum(weights.values())
    largest = max(left, key=left.__getitem__)
    return (
        f"{part.name!r} leaves out {len(left)} of {len(weights)} weights, {share:.0%} of those in the layers: "
        f"{largest} is {what}."
    )


def _weights_with_a_role(sites: Iterable[Site]) -> set[str]:
    """The weights of the linear layers of which it is known what they are for."""
    linear = (s for s in sites if s.kind == "linear" and s.role != "other")
    return {f"{site.name}.weight" for site in linear}


def _weights_in_blocks(model: Any, sites: Sequence[Site]) -> dict[str, int]:
    """The sizes of the matrices in a model's blocks."""
    blocks = tuple(f"{site.name}." for site in sites if site.role == "layer")
    found = {}
    for name, module in walk(model):
        is_inside = f"{name}.".startswith(blocks)
        if not is_inside or isinstance(module, nn.Embedding):
            continue
        for parameter, value in module.named_parameters(recurse=False):
            if value.dim() > 1:
                found[f"{name}.{parameter}"] = math.prod(value.shape)
    return found


def _layers_left(
    part: Part, picked: Sequence[Site], sites: Sequence[Site]
) -> Iterator[str]:
    """The layers in which a method that acts in layers has no site."""
    reached, layers = _layers(picked), _layers(sites)
    if reached and reached != layers:
        first = min(layers - reached)
        yield (
            f"{part.name!r} acts in {len(reached)} of {len(layers)} layers: layer {first}, and any other, "
            f"has no site for {part.cls.where!r}."
        )


def _layers(sites: Iterable[Site]) -> set[int]:
    return {site.layer for site in sites if site.layer is not None}


def _tied_to_copies(model: Any, links: Sequence[Link]) -> Iterator[str]:
    """The modules that read the same table as one that trains in a copy, and have no copy themselves."""
    copied = {
        link.site.module: link.site.name
        for link in links
        if isinstance(link.adapter, TrainedCopy)
    }
    tables = {id(p): name for m, name in copied.items() for p in m.parameters(False)}
    for name, module in walk(model):
        shared = {tables.get(id(p), "") for p in module.parameters(recurse=False)}
        for trained in sorted(shared - {""}):
            if module not in copied:
                yield (
                    f"{trained} trains in a copy of its own, and {name}, which is tied to it, stays as it is: "
                    f"train={[trained, name]!r} keeps them one."
                )
