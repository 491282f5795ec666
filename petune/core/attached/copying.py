"""Float32 copies of the base's modules, which train in their places."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from petune.core.frozen.modules import base_class, children, features, walk
from petune.core.frozen.site import Site
from petune.core.frozen.weights import dense, is_quantized
from petune.core.host.torch_modules import children_of
from petune.core.method.copies import TrainedCopy, TrainedParameters
from petune.errors import PetuneError, unknown

Copied = tuple[TrainedCopy, Site]


def trained_copies(model: nn.Module, names: Sequence[str]) -> list[Copied]:
    """Copies of all the modules with parameters of their own in the modules named.

    Raises:
        PetuneError: the model has no module of such a name.
    """
    everything = dict(walk(model)) if names else {}
    shared: dict[int, Any] = {}  # one for all, so that tied weights stay tied
    found: dict[str, Copied] = {}
    whole: list[str] = []
    for name in names:
        if name not in everything:
            raise PetuneError(
                unknown("module to train:", name, [n for n, _ in children(model)])
            )
        for path, module in _owners(everything[name], name, whole):
            if path not in found:
                found[path] = _copied(path, module, shared)
    return list(found.values())


def _owners(
    module: nn.Module, name: str, whole: list[str]
) -> Iterator[tuple[str, nn.Module]]:
    """The modules in it to copy: those with parameters of their own, and none inside one that is copied whole, the
    names of which are noted in `whole`.
    """
    for path, inner in walk(module, name):
        is_held = path.startswith(tuple(whole)) and not is_quantized(inner)
        if is_held or not list(inner.parameters(recurse=False)):
            continue
        if _reads_inside(inner):
            whole.append(f"{path}.")
        yield path, inner


def _reads_inside(module: nn.Module) -> bool:
    """Whether a module with parameters of its own holds modules, whose parameters it may read too."""
    return features(module) is None and bool(list(children(module)))


def _copied(path: str, module: nn.Module, shared: dict[int, Any]) -> Copied:
    into, out = features(module) or (0, 0)
    site = Site(path, "module", "parameters", None, into, out, module)
    if _reads_inside(module):
        owners = {
            name: inner for name, inner in walk(module) if not is_quantized(inner)
        }
        return TrainedParameters(owners), site
    own = dense(module) if is_quantized(module) else _plain_copy(module, shared)
    dtype = next(own.parameters()).dtype
    own = own.to(torch.promote_types(torch.float32, dtype))
    return TrainedCopy(own.requires_grad_(True)), site


def _plain_copy(module: nn.Module, shared: dict[int, Any]) -> nn.Module:
    """The module without what petune has put on it."""
    if "petune_graft" not in vars(module):
        return copy.deepcopy(module, shared)
    state = {
        key: value
        for key, value in vars(module).items()
        if not key.startswith("petune_")
    }
    state["_modules"] = {
        key: inner for key, inner in children_of(module).items() if key != "petune"
    }
    plain: nn.Module = object.__new__(base_class(module))
    plain.__dict__.update(copy.deepcopy(state, shared))
    return plain
