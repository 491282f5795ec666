"""Frozen norms, activations and gated MLPs that keep no more for backward than what goes into them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from petune.core.frozen.blocks import blocks
from petune.core.frozen.modules import (
    base_forward,
    children,
    features,
    hooked_forward,
    is_norm,
    set_hooked_forward,
    walk,
)
from petune.core.frozen.weights import compute_dtype
from petune.core.ops import recompute
from petune.core.registry.sites import find_sites
from petune.training.swap import evaluating

ACTIVATIONS = ("transformers.activations", "torch.nn.modules.activation")
"""Where the modules without parameters come from that map element by element."""


@contextmanager
def recomputed(model: Any) -> Iterator[None]:
    """Within the context the cheap parts of a model's blocks compute again in backward what they would have kept.

    A module is left alone if a trial shows that it keeps no more than its input anyway: which do depends on the model
    and on its dtype (a norm that computes in float32 keeps a float32 copy of a 16-bit input).
    """
    lean: dict[nn.Module, Callable[..., Any]] = {}
    for mlp, (gate, up, down) in _gated(model):
        others = [
            m for _, m in children(mlp) if m not in (gate, up, down)
        ]  # a dropout between them is not made again
        if (
            len(others) == 1
            and _is_activation(others[0])
            and _is_product(mlp, gate, up, down, others[0])
        ):
            lean[mlp] = partial(_gated_forward, gate, up, down, others[0])
    inside = {m for mlp in lean for m in mlp.modules()}
    for _, _, block in blocks(model):
        for _, module in walk(block):
            if (
                module not in inside
                and _is_cheap(module)
                and _keeps_more_than_its_input(module, model.dtype)
            ):
                lean[module] = partial(recompute, base_forward(module))
    before = {module: _put(module, forward) for module, forward in lean.items()}
    try:
        yield
    finally:
        for module, forward in before.items():
            _put(module, forward)


@contextmanager
def plain_input(model: Any) -> Iterator[None]:
    """Within the context transformers does not make the embedding's output ask for a gradient when it turns gradient
    checkpointing on. The reentrant kind alone needs that, and with it blocks below all adapters would have a graph.
    """
    model.enable_input_require_grads = lambda: None
    try:
        yield
    finally:
        del model.enable_input_require_grads


def _gated_forward(
    gate: nn.Module, up: nn.Module, down: nn.Module, act: nn.Module, x: Tensor
) -> Tensor:
    """down(act(gate(x)) · up(x))."""
    out: Tensor = down(recompute(lambda g, u: act(g) * u, gate(x), up(x)))
    return out


def _gated(model: Any) -> Iterator[tuple[nn.Module, list[nn.Module]]]:
    """The modules that hold a gate, an up and a down projection, and those."""
    found: dict[str, dict[str, nn.Module]] = {}
    for site in find_sites(model):
        if site.role in ("gate", "up", "down"):
            found.setdefault(site.name.rpartition(".")[0], {})[site.role] = site.module
    for name, parts in found.items():
        if len(parts) == 3:
            yield model.get_submodule(name), [parts["gate"], parts["up"], parts["down"]]


@torch.no_grad()
def _is_product(
    mlp: nn.Module, gate: nn.Module, up: nn.Module, down: nn.Module, act: nn.Module
) -> bool:
    """The module computes what `_gated_forward` does, as a trial shows."""
    width = (features(gate) or (0, 0))[0]
    x = torch.randn(2, 3, width, device=next(mlp.parameters()).device).to(
        compute_dtype(gate)
    )
    with evaluating(mlp):
        try:
            return torch.equal(
                base_forward(mlp)(x), _gated_forward(gate, up, down, act, x)
            )
        except (
            RuntimeError,
            TypeError,
            AttributeError,
        ):  # it takes something else, or more
            return False


def _is_activation(module: nn.Module) -> bool:
    plain = not list(children(module)) and not list(module.parameters())
    return plain and type(module).__module__ in ACTIVATIONS


def _is_cheap(module: nn.Module) -> bool:
    frozen = not any(p.requires_grad for p in module.parameters(recurse=False))
    return frozen and (is_norm(module) or _is_activation(module))


def _keeps_more_than_its_input(module: Any, dtype: torch.dtype) -> bool:
    own = list(module.parameters())
    weight = getattr(module, "weight", None)
    x = torch.randn(
        2, 3, len(weight) if weight is not None else 64, dtype=dtype, requires_grad=True
    )
    x = x.to(own[0].device) if own else x
    kept = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in own}
    known = sum(kept.values())

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
        return t

    with (
        torch.enable_grad(),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
    ):
        out = base_forward(module)(x)
    del out
    return (
        sum(kept.values()) - known > 1.25 * x.nbytes
    )  # more than a statistic for each row


def _put(
    module: nn.Module, forward: Callable[..., Any] | None
) -> Callable[..., Any] | None:
    """Set what a module computes without its adapters, None for what its class says; returns what was set before."""
    if "petune_graft" in vars(module):
        before = hooked_forward(module)
        set_hooked_forward(module, forward)
        return before
    before = vars(module).pop("forward", None)
    if forward is not None:
        module.forward = forward
    return before
