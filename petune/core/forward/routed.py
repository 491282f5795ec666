"""The forward of an adapted computation where each row has a tuning of its own."""

from __future__ import annotations

import re

from torch import Tensor, nn

from petune.core.forward.attention import FrozenAttention
from petune.core.forward.chain import chain
from petune.core.forward.computation import ModuleForward, SharedRows
from petune.core.forward.link import Link
from petune.core.forward.plan import Group, Plan
from petune.core.method.copies import TrainedParameters
from petune.errors import UnsupportedError


def run_routed(plan: Plan, links: list[Link], call: ModuleForward) -> Tensor:
    """An adapted module's forward. The base runs once for all groups of rows that do not change its input."""
    for link in links:
        _check_routable(link)
    (x,) = call.inputs
    if x.shape[0] == 1:  # positions, say, which the rows share until now
        x = x.expand(len(plan.by_row), *x.shape[1:])
        call.inputs = (x,)
    split = plan.split(links, x.shape[0], x.device)
    if len(split.groups) == 1:
        return chain(split.groups[0].links, call)(x)
    shared = call.groups([group.index for group in split.groups])
    pairs = list(zip(split.groups, shared, strict=True))
    adapted = {id(rows): _result(group, rows) for group, rows in pairs if group.links}
    # the base's own rows last: another group may have computed them along
    results = [
        adapted[id(rows)] if group.links else rows.base() for group, rows in pairs
    ]
    return split.joined(results)


def _result(group: Group, rows: SharedRows) -> Tensor:
    out = chain(group.links, rows)(*rows.inputs)
    if not isinstance(out, Tensor):
        raise UnsupportedError(
            f"route(): {group.links[0].site.name} gives more than one tensor."
        )
    return out


def _check_routable(link: Link) -> None:
    in_a_block = re.search(r"\.\d+\.", link.site.name)
    if isinstance(link.site.module, nn.Embedding) and in_a_block:
        raise UnsupportedError(
            f"route(): {link.site.name} is looked up once for all rows."
        )
    if isinstance(link.adapter, TrainedParameters):
        raise UnsupportedError(
            f"route(): {link.site.name} runs once for all rows, with one set of parameters."
        )


def run_routed_attention(
    plan: Plan, links: list[Link], call: FrozenAttention
) -> Tensor:
    """An attention's forward: each group of rows attends on its own."""
    query = call.inputs[0]
    split = plan.split(links, query.shape[0], query.device)
    results = []
    for group in split.groups:
        rows = call.rows(group.index)
        results.append(chain(group.links, rows)(*rows.inputs))
    return split.joined(results)
