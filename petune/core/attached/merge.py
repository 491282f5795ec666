"""Folding adapters into the base: what a layer computes with them is read off its values and written into it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from petune.core.attached.cost import Merged
from petune.core.attached.quantized import forget_if_dense
from petune.core.attached.sharded import check_mergeable
from petune.core.attached.targets import target_of
from petune.core.forward.link import Acting, Link
from petune.core.frozen.modules import is_norm
from petune.core.graft.placing import remove
from petune.core.method.copies import TrainedCopy
from petune.errors import UnmergeableError


@torch.no_grad()
def merge(model: Any, tuning: Acting, quantize: bool = False) -> Merged:
    """Fold a tuning into the base, which changes nothing that the model computes but for what `Merged` says.

    All layers are tried before the first is written. Then they are written one by one, so that no second copy of the
    model is held, and each gives up its adapter: an interruption leaves a model that computes the same.

    Raises:
        UnmergeableError: the method is no affine change of a layer.
        UnsupportedError: `quantize`, and no installed quantizer knows a layer's storage.
        PetuneError: the merged weights would not be finite, or another tuning stands inside this one at a site
            and the two do not commute. Nothing is changed then.
    """
    check_mergeable(model)
    for link in tuning.links:
        _check_mergeable(tuning, link)
    links_of: dict[nn.Module, list[Link]] = {}
    for link in tuning.links:
        links_of.setdefault(link.site.module, []).append(link)
    targets = [target_of(model, tuning, links, quantize) for links in links_of.values()]
    merged = Merged()
    with _in_evaluation(tuning.links):
        for target in targets:
            target.check()
        for target in targets:
            target.write(merged)
            for link in target.links:
                remove(link)
                tuning.links.remove(link)
    forget_if_dense(model)
    return merged


def _check_mergeable(tuning: Acting, link: Link) -> None:
    site = link.site
    is_affine = link.adapter.mergeable and (
        site.kind != "block" or is_norm(site.module)
    )
    if not is_affine:
        raise UnmergeableError(
            f"{tuning.method!r} has no merged form: it is no affine change of a linear layer."
        )
    if isinstance(link.adapter, TrainedCopy) and tuning.weight != 1:
        raise UnmergeableError(
            f"{tuning.method!r} trains {site.name} itself, which merges at weight 1 alone."
        )


@contextmanager
def _in_evaluation(links: list[Link]) -> Iterator[None]:
    """Within the context the adapters draw nothing at random."""
    modes = [(link.adapter, link.adapter.training) for link in links]
    for adapter, _ in modes:
        adapter.eval()
    try:
        yield
    finally:
        for adapter, mode in modes:
            adapter.train(mode)
