"""Finding the hook points of a model from its structure: no table of architectures."""

from __future__ import annotations

from itertools import filterfalse
from operator import attrgetter

from torch import nn

from petune.core.frozen.attentions import Attentions, Known
from petune.core.frozen.block import Block
from petune.core.frozen.blocks import blocks
from petune.core.frozen.experts import expert_sites
from petune.core.frozen.mlps import mlp_sites
from petune.core.frozen.modules import is_norm, width_of
from petune.core.frozen.outside import Outside
from petune.core.frozen.roles import spelled
from petune.core.frozen.site import Site, with_role


def discover(model: nn.Module, attention: Known | None = None) -> list[Site]:
    """The sites that the structure shows.

    Args:
        attention: Classes of attention that do not ask transformers for their attention
            function, each with methods that do the same by `petune.attend`; they take the
            place of the class's own while an adapter is there.
    """
    repeated = list(blocks(model))
    outside = Outside(model, repeated)
    found = list(outside.sites())
    known = attention or {}
    for each in repeated:
        found += _in_block(Block(each, outside.hidden), known)
    return found


def _in_block(block: Block, known: Known) -> list[Site]:
    """The sites of a block, in the order of its modules."""
    attentions = Attentions(block, known)
    found = list(attentions.sites())
    output = with_role(found, "o")
    if output is not None:
        block.hidden = output.out_features
    taken = set(map(attrgetter("name"), found))
    rest = filterfalse(taken.__contains__, block.linears(block.name))
    found += mlp_sites(block, list(rest), {*attentions.wholes} - {block.name})
    found += expert_sites(block)
    for name, module in block.modules.items():
        if is_norm(module):
            role = _role_of_norm(name, attentions)
            found.append(block.site(name, role, width_of(module)))
    found.append(block.site(block.name, "layer", block.hidden))
    order = list(block.modules)
    return sorted(found, key=lambda site: order.index(site.module_name))


def _role_of_norm(name: str, attentions: Attentions) -> str:
    """Norms of queries and keys stand in an attention and are called so."""
    of_heads = attentions.holds(name) and spelled(name.rpartition(".")[2])
    return "qk-norm" if of_heads else "norm"
