"""The MLPs of a block: the linear layers in none of its attentions, by the module around them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from torch import Tensor, nn

from petune.core.frozen.block import Block
from petune.core.frozen.groups import grouped, roles_of
from petune.core.frozen.modules import linears
from petune.core.frozen.site import Site, with_role


def mlp_sites(
    block: Block, layers: Sequence[str], attentions: set[str]
) -> Iterator[Site]:
    """The sites of a block's MLPs. A mixture of experts is one MLP, whatever it is made of.

    Args:
        layers: the linear layers in none of the block's attentions.
        attentions: the modules that hold an attention and its output.
    """
    experts = filter(lambda name: _are_experts(block.modules[name]), block.modules)
    around_experts = {name.rpartition(".")[0] for name in experts}
    mixtures = around_experts & (block.modules.keys() - {block.name})
    mixtures -= set(filter(partial(_is_within, block, attentions), mixtures))
    yield from map(partial(_mixture, block), mixtures)
    for around, group in grouped(block, layers).items():
        found = list(map(block.linear, group, roles_of(block, group)))
        yield from found
        down = with_role(found, "down")
        if down is not None and not _is_within(block, mixtures, around):
            yield block.sublayer("mlp", around, down, block.modules[group[0]])


def _mixture(block: Block, name: str) -> Site:
    return block.site(f"{name}#mlp", "mlp", block.hidden)


def _is_within(block: Block, others: set[str], name: str) -> bool:
    """Whether a module is one of the others or stands in one."""
    return not others.isdisjoint((name, *block.around(name)))


def _are_experts(module: nn.Module) -> bool:
    """A list of MLPs, or weights with an expert for their first dimension."""
    if isinstance(module, nn.ModuleList):
        sizes = [len(linears(each, "")) for each in module]
        return min(sizes, default=0) > 1 and len(sizes) > 1
    if isinstance(module, nn.Conv1d):
        return False
    dimensions = map(Tensor.dim, module.parameters(recurse=False))
    return max(dimensions, default=0) > 2
