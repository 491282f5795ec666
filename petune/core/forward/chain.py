"""The adapters of a site around its computation, the first innermost."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from petune.core.forward.computation import Computation, ModuleForward, SharedRows, once
from petune.core.forward.dtypes import apply
from petune.core.forward.link import Call, Link
from petune.core.frozen.site import Part, Site
from petune.errors import UnsupportedError


def chain(links: Iterable[Link], call: Computation) -> Call:
    """The computation with the adapters of `links` around it."""
    inner: Call = call
    for link in links:
        inner = _around(link, inner, call)
    return inner


def _around(link: Link, inner: Call, call: Computation) -> Call:
    adapter, site = bound(link, call), link.site
    if isinstance(site.module, nn.Embedding):
        return partial(_on_ids, adapter, inner, site.module)
    if site.part is not None:
        return partial(_on_part, adapter, inner, site.part)
    if site.entry is not None:
        return partial(_spanning, adapter, inner, site, call.input_at(site.entry))
    return partial(apply, adapter, inner)


def bound(link: Link, call: Computation) -> Call:
    """The adapter as it acts: with all that it asks for besides its input, and at its tuning's weight."""
    adapter: Call = link.adapter
    if link.site.kind == "module":
        adapter = _with_other_arguments(adapter, call)
    if link.site.kind == "experts":
        adapter = partial(adapter, experts=call.counts)
    if link.reads_batch:
        adapter = partial(adapter, batch=call.batch(link))
    if link.takes_notes:
        adapter = partial(adapter, notes=call.forward.notes_of(link.tuning.name))
    weight = call.forward.weights[link.tuning.name]
    return adapter if weight == 1 else partial(_weighted, adapter, weight)


def _weighted(adapter: Call, weight: float, inner: Call, *inputs: Any) -> Tensor:
    """Y + weight (adapter(inner, x) - y), y = inner(x) computed once."""
    y, again = once(inner, *inputs)
    return torch.lerp(y, adapter(again, *inputs).to(y.dtype), weight)


def _with_other_arguments(adapter: Call, call: Computation) -> Call:
    """The adapter that stands for a whole module, with all that the module is called with."""
    whole = call.all_rows if isinstance(call, SharedRows) else call
    assert isinstance(whole, ModuleForward)
    return lambda inner, x: adapter(inner, x, *whole.args, **whole.kwargs)


def _on_ids(adapter: Call, inner: Call, table: nn.Embedding, ids: Tensor) -> Tensor:
    """Adapt an embedding: ids have no dtype to follow, its rows have."""
    return adapter(inner, ids).to(table.weight.dtype)


def _on_part(adapter: Call, inner: Call, part: Part, x: Tensor) -> Tensor:
    """Adapt some outputs of a fused projection, which is computed once unless the adapter changes x."""
    whole, again = once(inner, x)
    if isinstance(part, Tensor):
        index = part.to(whole.device)
        out = apply(adapter, lambda h: again(h)[..., index], x)
        return whole.index_copy(-1, index, out)
    out = apply(adapter, lambda h: again(h)[..., part], x)
    return torch.cat([whole[..., : part.start], out, whole[..., part.stop :]], -1)


def _spanning(
    adapter: Call, inner: Call, site: Site, begin: Tensor, x: Tensor
) -> Tensor:
    """Adapt a computation that several modules share: it begins with `begin` at another one and ends here, with x."""

    def whole(h: Tensor) -> Tensor:
        if h is not begin:
            raise UnsupportedError(
                f"{site.name} is computed by several modules: its input can't be changed there."
            )
        return inner(x)

    return apply(adapter, whole, begin)
