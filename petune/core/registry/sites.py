"""Finding the hook points of a model from its structure: no table of architectures."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from petune.core.frozen.discovery import discover
from petune.core.frozen.site import Site
from petune.core.registry.plugins import registry


def find_sites(model: nn.Module) -> list[Site]:
    """Every site of a transformers model, in the order of its modules."""
    kind = getattr(getattr(model, "config", None), "model_type", "")
    plugin: Callable[[nn.Module], list[Site]] = (
        registry().all("petune_sites").get(kind, discover)
    )
    return list(plugin(model))
