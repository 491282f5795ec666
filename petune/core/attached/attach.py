"""A tuning: the adapters of a method, or of several, on one model under one name."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from petune.core.attached.install import _install
from petune.core.attached.parts import Part, Where, parts
from petune.core.attached.tuning import Tuning
from petune.core.frozen.modules import base_class, children, features, walk
from petune.core.frozen.site import KIND_OF, Site
from petune.core.frozen.weights import dense, is_quantized
from petune.core.frozen.where import select
from petune.core.graft.board import board_of
from petune.core.method.adapter import Adapter, Unfreeze
from petune.core.method.copies import TrainedCopy, TrainedParameters
from petune.core.registry.methods import Method
from petune.core.registry.sites import find_sites
from petune.errors import PetuneError, UnsupportedError, unknown

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def attach(
    model: PreTrainedModel,
    method: str | Method | Sequence[str | Method],
    *,
    name: str = "default",
    where: Where = None,
    train: Sequence[str] | None = None,
    **arguments: Any,
) -> Tuning:
    """Adapt a model in place: the base is frozen, the method's adapters train.

    Args:
        method: a registered name (`petune.methods()`) or the class itself; a list of them is one tuning, whose
            methods act in that order, and then `where` and `arguments` go by the methods' names.
        name: the tuning's name on this model.
        where: the sites, in place of the method's own choice; see `petune.site.select`.
        train: modules of the base that train along, in a copy of the tuning's own; without it those that
            `from_pretrained` had to make anew (a classifier).
        arguments: the method's hyperparameters.

    Raises:
        PetuneError: an unknown name or argument, a `where` that matches nothing, a name already taken.
        UnsupportedError: the method can't act on this model.
    """
    wanted = parts(method, arguments, where)
    taken = tunings(model)
    if name in taken:
        raise PetuneError(
            f"a tuning named {name!r} is attached already; give this one another name=…"
        )
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise PetuneError(f"name={name!r}: letters, digits, '_' and '-' only.")
    heads = tuple(getattr(model, "petune_fresh", ()) if train is None else train)
    sites = find_sites(model)
    trained = [
        m
        for p in wanted
        if issubclass(p.cls, Unfreeze)
        for m in p.cls(**p.arguments).modules(sites)
    ]
    links: list[tuple[Adapter, Site, Part | None]] = []
    settled = []
    for part in wanted:
        own, part = _adapters(part, sites) if issubclass(part.cls, Adapter) else ([], part)
        links += [(adapter, site, part) for adapter, site in own]
        settled.append(part)
    copies = [(adapter, site, None) for adapter, site in _copies(model, [*trained, *heads])]
    if not links and not copies:
        raise UnsupportedError(
            f"method {settled[0].name!r}: this model has no blocks with linear layers."
        )
    return _install(
        model, Tuning(model, name, settled, heads, [*copies, *links])
    )  # what trains itself is innermost


def tunings(model: PreTrainedModel) -> dict[str, Tuning]:
    """The tunings attached to a model, in the order in which they act."""
    board = board_of(model)
    return dict(board.tunings) if board else {}


def _adapters(part: Part, sites: list[Site]) -> tuple[list[tuple[Adapter, Site]], Part]:
    """The adapters of a method at the sites picked, and the method with its arguments settled."""
    name, cls = part.name, part.cls
    assert issubclass(cls, Adapter)
    try:
        picked = select(sites, part.where or cls.where, strict=part.where is not None)
    except PetuneError as none:
        raise type(none)(f"method {name!r}: {none}") from None
    accepted = {KIND_OF[role] for role in cls.where.split() if role in KIND_OF}
    accepted |= {"linear", "block"} if accepted & {"linear", "block"} else set()
    wrong = [s for s in picked if accepted and s.kind not in accepted]
    if wrong:
        kinds = " and ".join(sorted(accepted))
        raise PetuneError(
            f"method {name!r} acts on {kinds} sites; where={part.where!r} picks {wrong[0].kind} sites."
        )
    pool: dict[Any, Any] = {}
    own: list[Site] = []
    own += [dataclasses.replace(site, peers=own, _pool=pool) for site in picked]
    part = dataclasses.replace(part, arguments=cls.settle(own, dict(part.arguments)))
    return [(cls(site, **part.arguments), site) for site in own], part


def _copies(model: PreTrainedModel, names: Sequence[str]) -> list[tuple[Adapter, Site]]:
    """Float32 copies, to be trained, of all the modules with parameters in the modules named."""
    everything = dict(walk(model)) if names else {}
    memo: dict[int, Any] = {}  # one for all, so that tied weights stay tied
    found: dict[str, tuple[Adapter, Site]] = {}
    whole: list[str] = []
    for name in names:
        if name not in everything:
            raise PetuneError(unknown("module to train:", name, [n for n, _ in children(model)]))
        for path, module in walk(everything[name], name):
            held = path.startswith(tuple(whole)) and not is_quantized(module)
            if path in found or held or not list(module.parameters(recurse=False)):
                continue
            size = features(module)
            if size is None and list(children(module)):
                whole.append(f"{path}.")
                adapter: TrainedCopy = TrainedParameters(
                    {n: m for n, m in walk(module) if not is_quantized(m)}
                )
            else:
                own = dense(module) if is_quantized(module) else _copy(module, memo)
                own = own.to(torch.promote_types(torch.float32, next(own.parameters()).dtype))
                adapter = TrainedCopy(own.requires_grad_(True))
            found[path] = (
                adapter,
                Site(path, "module", "parameters", None, *(size or (0, 0)), module),
            )
    return list(found.values())


def _copy(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """The module without what petune has put on it."""
    if "petune_graft" not in vars(module):
        return copy.deepcopy(module, memo)
    state = {k: v for k, v in vars(module).items() if k != "petune_graft"}
    own = {k: v for k, v in module._modules.items() if k != "petune"}
    plain: nn.Module = object.__new__(base_class(module))
    plain.__dict__.update(copy.deepcopy(dict(state, _modules=own), memo))
    return plain
