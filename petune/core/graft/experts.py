"""Stacked experts: whatever function a mixture asks transformers for, its adapters act around the projections in it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from petune.core.forward.chain import chain
from petune.core.forward.experts import FrozenProjection
from petune.core.forward.forward_pass import ForwardPass
from petune.core.forward.link import Link
from petune.core.graft.module import attention_links
from petune.core.host.experts import Run, behind, between, stacks, wrap_interface


def install() -> None:
    """Make the interface answer with wrapped functions; they pass modules without such adapters through."""
    wrap_interface(lambda answer: partial(run, answer))


def run(
    base: Run,
    module: nn.Module,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
) -> Tensor:
    """`base(module, …)`, with the module's adapters around its projections.

    Args:
        base: the model's own function.
        hidden_states: (tokens, hidden).
        top_k_index: (tokens, k), the experts of each token; one beyond the last is none.
        top_k_weights: (tokens, k).
    """
    acting = attention_links(module)
    inputs = hidden_states, top_k_index, top_k_weights
    if acting is None:
        return base(module, *inputs)
    forward, links = acting
    if forward.plan is None:
        return _mixed(module, forward, links, *inputs)
    split = forward.plan.split(links, len(hidden_states), hidden_states.device)
    results = []
    for group in split.groups:
        rows = [value[group.index] for value in inputs]
        results.append(_mixed(module, forward, group.links, *rows))
    return split.joined(results)


def _mixed(
    module: Any,
    forward: ForwardPass,
    links: Sequence[Link],
    hidden: Tensor,
    index: Tensor,
    weights: Tensor,
) -> Tensor:
    """For each token the weighted sum of what its experts make of it, (tokens, hidden)."""
    up, down = stacks(module)
    experts, order = index.reshape(-1).sort(stable=True)
    total = len(module.get_parameter(down))
    counts = experts.bincount(minlength=total)[:total].tolist()
    order = order[: sum(counts)]
    token = order // index.shape[1]
    projected = _projected(module, forward, links, up, hidden[token], counts)
    activated = between(module, projected)
    out = _projected(module, forward, links, down, activated, counts)
    weighted = behind(module, out) * weights.reshape(-1)[order, None]
    return torch.zeros_like(hidden).index_add(0, token, weighted.to(hidden.dtype))


def _projected(
    module: nn.Module,
    forward: ForwardPass,
    links: Sequence[Link],
    parameter: str,
    x: Tensor,
    counts: Sequence[int],
) -> Tensor:
    """One projection of all experts with its adapters, for rows sorted by expert."""
    own = [link for link in links if link.site.parameter == parameter]
    call = FrozenProjection(forward, stacks(module)[parameter], x, counts)
    found: Tensor = chain(own, call)(x)
    return found
