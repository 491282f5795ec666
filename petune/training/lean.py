"""Frozen norms, activations and gated MLPs that keep no more for backward than what goes into them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from petune.core.frozen.blocks import blocks
from petune.core.frozen.modules import base_forward, children, features, is_norm, walk
from petune.core.frozen.weights import compute_dtype
from petune.core.ops import recompute
from petune.core.registry.sites import find_sites
from petune.training.host_model import is_activation
from petune.training.host_torch import storage_key
from petune.training.swap import base_forward_as, evaluating

NEXT_TO_NOTHING = 1.25
"""A module that keeps at most so many times its input keeps that, and a number or two for each row beside it."""


@contextmanager
def recomputed(model: Any) -> Iterator[None]:
    """Within the context the cheap parts of a model's blocks compute again in backward what they would have kept.

    A module is left alone if a trial shows that it keeps no more than its input anyway: which do depends on the model
    and on its dtype (a norm that computes in float32 keeps a float32 copy of a 16-bit input).
    """
    lean: dict[nn.Module, Callable[..., Any]] = {}
    inside: set[nn.Module] = set()
    for gated in _gated(model):
        if gated.is_as_expected():
            lean[gated.mlp] = gated.forward
            inside |= set(gated.mlp.modules())
    for module in _cheap(model):
        if module not in inside and _keeps_more_than_its_input(module, model.dtype):
            lean[module] = partial(recompute, base_forward(module))
    with ExitStack() as stack:
        for module, forward in lean.items():
            stack.enter_context(base_forward_as(module, forward))
        yield


@dataclass(eq=False)
class Projections:
    """The projections of a gated MLP."""

    gate: nn.Module
    up: nn.Module
    down: nn.Module


@dataclass(eq=False)
class Gated:
    """An MLP that computes down(act(gate(x)) · up(x)), if it is what it looks like."""

    mlp: nn.Module
    projections: Projections
    act: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """(…, hidden) -> (…, hidden); act(gate(x)) · up(x), which is wider, is computed again in backward."""
        p, act = self.projections, self.act
        out: Tensor = p.down(recompute(lambda g, u: act(g) * u, p.gate(x), p.up(x)))
        return out

    @torch.no_grad()
    def is_as_expected(self) -> bool:
        """The module computes what `forward` does, as a trial shows."""
        gate = self.projections.gate
        width, _ = features(gate) or (0, 0)
        device = next(self.mlp.parameters()).device
        x = torch.randn(2, 3, width, device=device).to(compute_dtype(gate))
        with evaluating(self.mlp):
            try:
                return torch.equal(base_forward(self.mlp)(x), self.forward(x))
            except (RuntimeError, TypeError, AttributeError):
                return False  # it takes something else, or more


def _gated(model: Any) -> Iterator[Gated]:
    """The modules that hold a gate, an up and a down projection, and beside them an activation alone: a dropout
    between them could not be computed again.
    """
    roles = {field.name for field in fields(Projections)}
    found: dict[str, dict[str, nn.Module]] = {}
    for site in find_sites(model):
        if site.role in roles:
            parent = site.name.rpartition(".")[0]
            found.setdefault(parent, {})[site.role] = site.module
    for name, held in found.items():
        if held.keys() != roles:
            continue
        mlp = model.get_submodule(name)
        others = [child for _, child in children(mlp) if child not in held.values()]
        if len(others) == 1 and is_activation(others[0]):
            yield Gated(mlp, Projections(**held), others[0])


def _cheap(model: Any) -> Iterator[nn.Module]:
    """The frozen norms and the activations in a model's blocks."""
    for _, _, block in blocks(model):
        for _, module in walk(block):
            trains = any(p.requires_grad for p in module.parameters(recurse=False))
            if not trains and (is_norm(module) or is_activation(module)):
                yield module


def _keeps_more_than_its_input(module: Any, dtype: torch.dtype) -> bool:
    """Whether a norm or an activation keeps more for backward than what goes into it, as a trial shows."""
    own = list(module.parameters())
    weight = getattr(module, "weight", None)
    width = len(weight) if weight is not None else 64
    x = torch.randn(2, 3, width, dtype=dtype, requires_grad=True)
    if own:
        x = x.to(own[0].device)
    kept = {storage_key(p): 0 for p in own}  # its parameters are there anyway

    def pack(tensor: Tensor) -> Tensor:
        kept.setdefault(storage_key(tensor), tensor.untyped_storage().nbytes())
        return tensor

    with (
        torch.enable_grad(),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
    ):
        out = base_forward(module)(x)
    del out
    return sum(kept.values()) > NEXT_TO_NOTHING * x.nbytes
