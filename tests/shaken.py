"""Tunings moved off their start, so that they act, and how near two results must be."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from transformers import DynamicCache

import petune
from petune.testing import tiny_model


def close(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(
        one, other, rtol=1e-5, atol=1e-5 * float(other.abs().max())
    )


@torch.no_grad()
def shake(parameters: Iterable[torch.Tensor], seed: int = 0) -> None:
    torch.manual_seed(seed)
    for p in parameters:
        p.add_(torch.randn_like(p) * 0.1)


def shaken(
    model: Any, method: Any, name: str = "default", **arguments: Any
) -> petune.Tuning:
    """A tuning that acts; several on one model act in ways of their own."""
    tuning = petune.attach(model, method, name=name, **arguments)
    shake(tuning.parameters(), seed=len(petune.tunings(model)))
    return tuning


def moved(method: Any, **arguments: Any) -> tuple[Any, petune.Tuning]:
    """A tiny model with a tuning that acts."""
    model = tiny_model("llama")
    return model, shaken(model, method, **arguments)


def cache_of(tuning: petune.Tuning, rows: int) -> DynamicCache:
    """The prefixes of a tuning as transformers' own cache."""
    cache = DynamicCache()
    for link in tuning.links:
        adapter: Any = link.adapter
        cache.update(
            *(
                t.expand(rows, -1, -1, -1).clone()
                for t in (adapter.keys, adapter.values)
            ),
            link.site.layer,
        )
    return cache


def checkpoints(model, options=None):
    """Turn gradient checkpointing on, by the name that this version of transformers has for it."""
    newer = getattr(model, "activation_checkpointing_enable", None)
    (newer or model.gradient_checkpointing_enable)(options)
