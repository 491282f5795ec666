"""Float32 copies of the base's modules, which train in their places."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from itertools import filterfalse
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
    everything = dict(walk(model))
    owners = _Owners()
    for name in names:
        if name not in everything:
            known = dict(children(model))
            raise PetuneError(unknown("module to train:", name, known))
        owners.add(everything[name], name)
    shared: dict[int, Any] = {}  # one for all, so that tied weights stay tied
    found = owners.found.items()
    return [_copied(path, module, shared) for path, module in found]


class _Owners:
    """The modules to copy: those with parameters of their own, and none inside one that is
    copied whole.
    """

    def __init__(self) -> None:
        self.found: dict[str, nn.Module] = {}
        self.whole: tuple[str, ...] = ()

    def add(self, module: nn.Module, name: str) -> None:
        """Add those in a module that goes by `name`."""
        for path, inner in walk(module, name):
            is_held = path.startswith(self.whole) and not is_quantized(inner)
            own = list(inner.parameters(recurse=False))
            if is_held or not own:
                continue
            if _reads_inside(inner):
                self.whole = (*self.whole, f"{path}.")
            self.found.setdefault(path, inner)


def _reads_inside(module: nn.Module) -> bool:
    """Whether a module with parameters of its own holds modules, whose parameters it may
    read too.
    """
    return features(module) is None and any(children(module))


def _copied(path: str, module: nn.Module, shared: dict[int, Any]) -> Copied:
    into, out = features(module) or (0, 0)
    site = Site(path, "module", "parameters", None, into, out, module)
    if _reads_inside(module):
        dense_ones = filterfalse(lambda named: is_quantized(named[1]), walk(module))
        return TrainedParameters(dict(dense_ones)), site
    own = dense(module) if is_quantized(module) else _plain_copy(module, shared)
    dtype = next(own.parameters()).dtype
    own = own.to(torch.promote_types(torch.float32, dtype))
    return TrainedCopy(own.requires_grad_(True)), site


def _plain_copy(module: nn.Module, shared: dict[int, Any]) -> nn.Module:
    """The module without what petune has put on it."""
    if "petune_graft" not in vars(module):
        return copy.deepcopy(module, shared)
    state = _without_petune(vars(module))
    state["_modules"] = _without_petune(children_of(module))
    plain: nn.Module = object.__new__(base_class(module))
    plain.__dict__.update(copy.deepcopy(state, shared))
    return plain


def _without_petune(named: Mapping[str, Any]) -> dict[str, Any]:
    """What does not go by a name of petune's."""
    return {key: value for key, value in named.items() if not key.startswith("petune")}
