"""The MLPs of a block: the linear layers that are in none of its attentions, by the module around them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from torch import nn

from petune.core.frozen.block import Block
from petune.core.frozen.mlp import mlp_roles
from petune.core.frozen.modules import linears
from petune.core.frozen.site import Site


def mlp_sites(block: Block, layers: Sequence[str], attentions: set[str]) -> Iterator[Site]:
    """The sites of a block's MLPs. A mixture of experts is one MLP, whatever it is made of.

    Args:
        layers: the linear layers in none of the block's attentions.
        attentions: the modules that hold an attention and its output.
    """
    mixtures = {name for name in _mixtures(block) if not _within(block, name, attentions)}
    for name in mixtures:
        yield block.site(f"{name}#mlp", "mlp", block.hidden)
    for around, group in _groups(block, layers).items():
        roles = mlp_roles(group, [block.size(layer) for layer in group], block.hidden)
        found = [block.linear(layer, role) for layer, role in zip(group, roles, strict=True)]
        yield from found
        downs = [site for site in found if site.role == "down"]
        if downs and not _within(block, around, mixtures):
            yield block.sublayer("mlp", around, downs[0], block.modules[group[0]])


def _within(block: Block, name: str, others: set[str]) -> bool:
    """Whether a module is one of the others or stands in one."""
    return not others.isdisjoint((name, *block.around(name)))


def _mixtures(block: Block) -> Iterator[str]:
    """Modules around experts."""
    for name, module in block.modules.items():
        around = name.rpartition(".")[0]
        in_block = around.startswith(f"{block.name}.")
        if in_block and _are_experts(module):
            yield around


def _are_experts(module: nn.Module) -> bool:
    """A list of MLPs, or weights with an expert for their first dimension."""
    if isinstance(module, nn.ModuleList):
        sizes = [len(linears(each, "")) for each in module]
        return len(sizes) > 1 and min(sizes) > 1
    if isinstance(module, nn.Conv1d):
        return False
    return any(parameter.dim() > 2 for parameter in module.parameters(recurse=False))


def _groups(block: Block, layers: Sequence[str]) -> dict[str, list[str]]:
    """Linear layers by the smallest module around two or more of them."""
    shared = Counter(around for layer in layers for around in block.around(layer))
    groups: dict[str, list[str]] = {}
    for layer in layers:
        several = (name for name in block.around(layer) if shared[name] > 1)
        groups.setdefault(next(several, block.name), []).append(layer)
    return groups
