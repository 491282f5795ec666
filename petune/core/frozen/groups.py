"""Which of a block's linear layers belong together, and what they are for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from itertools import chain, filterfalse

from petune.core.frozen.block import Block
from petune.core.frozen.mlp import mlp_roles
from petune.core.frozen.roles import are_projections, attention_roles

Groups = dict[str, list[str]]
"""The names of linear layers, by that of the module around them."""


def grouped(block: Block, layers: Sequence[str]) -> Groups:
    """Linear layers by the module around them. Those that make no MLP alone are one with the next such group around
    them: an MLP may keep its first layers in a module of their own.
    """
    groups = _by_module(block, layers)
    alone = list(filterfalse(partial(_has_output, block, groups), groups))
    order = list(block.modules)
    for name in sorted(alone, key=order.index, reverse=True):
        outer = next(filter(alone.__contains__, block.around(name)), None)
        if outer is not None:
            together = groups.pop(name) + groups[outer]
            groups[outer] = sorted(together, key=order.index)
    return groups


def _by_module(block: Block, layers: Sequence[str]) -> Groups:
    """Linear layers by the smallest module around two or more of them."""
    around_each = [list(block.around(layer)) for layer in layers]
    shared = Counter(chain.from_iterable(around_each))
    groups: Groups = {}
    for layer, around in zip(layers, around_each, strict=True):
        several = filter(lambda name: shared[name] > 1, around)
        groups.setdefault(next(several, block.name), []).append(layer)
    return groups


def _has_output(block: Block, groups: Groups, name: str) -> bool:
    """Whether a group has a layer that gives back what others of it take."""
    return not {"o", "down"}.isdisjoint(roles_of(block, groups[name]))


def roles_of(block: Block, group: Sequence[str]) -> list[str]:
    """The roles of layers that stand together: names that say queries, keys and values decide before sizes do."""
    inside = [name.rpartition(".")[2] for name in group]
    if are_projections(inside):
        return attention_roles(inside)
    return mlp_roles(group, list(map(block.size, group)), block.hidden)
