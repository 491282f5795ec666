"""A method, or several, is put on a model."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

from torch import nn

from petune.core.attached.arguments import arguments_at
from petune.core.attached.copying import trained_copies
from petune.core.attached.install import install
from petune.core.attached.parts import Part, Where, parts
from petune.core.attached.quantized import prepare
from petune.core.attached.reach import left_out, with_a_form
from petune.core.attached.sharded import check_whole, whole
from petune.core.attached.tuning import Tuning, tunings
from petune.core.forward.link import Link, takes_experts
from petune.core.frozen.site import KIND_OF, Site
from petune.core.frozen.where import select
from petune.core.host.torch_modules import without_memory
from petune.core.method.adapter import Adapter, Unfreeze
from petune.core.registry.methods import Method
from petune.core.registry.sites import find_sites
from petune.errors import PetuneError, PetuneWarning, UnsupportedError

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
        where: the sites, in place of the method's own choice; see `petune.core.frozen.where.select`.
        train: modules of the base that train along, in a copy of the tuning's own; without it those that
            `from_pretrained` had to make anew (a classifier).
        arguments: the method's hyperparameters. For each there is another that ends in `_pattern`, a mapping from
            words of `where` to the values that it has there: `rank_pattern={"q": 4}`.

    Raises:
        PetuneError: an unknown name or argument, a `where` that matches nothing, a name already taken, another
            thread runs a forward of the model.
        UnsupportedError: the method can't act on this model.
    """
    wanted = parts(method, arguments, where)
    heads = getattr(model, "petune_fresh", ()) if train is None else train
    if isinstance(heads, str) or not isinstance(heads, Sequence):
        raise PetuneError(f"train={heads!r}: give a list of modules' names.")
    return attach_parts(model, wanted, name, heads)


def attach_parts(
    model: PreTrainedModel, wanted: Sequence[Part], name: str, heads: Sequence[str]
) -> Tuning:
    """Adapt a model in place by methods whose arguments have been checked; see `attach`."""
    check_name(model, name)
    check_whole(model)
    if not hasattr(model, "get_output_embeddings"):
        raise UnsupportedError(f"a {type(model).__name__} is no transformers model.")
    prepare(model)
    sites = find_sites(model)
    with whole(model):
        made = [_made(part, sites) for part in wanted]
        tuning = _linked(model, name, made, tuple(heads))
    install(model, tuning)
    for line in left_out(model, wanted, tuning.links, sites):
        warnings.warn(line, PetuneWarning, stacklevel=3)
    return tuning


def planned(model: PreTrainedModel, wanted: Sequence[Part]) -> Tuning:
    """The tuning that the methods would come to, without what trains of the base's: attached to nothing, and its
    tensors have shapes and no memory.
    """
    prepare(model)
    sites = find_sites(model)
    tuning = Tuning(model, "planned", wanted, ())
    with without_memory():
        for part in wanted:
            tuning.links += _made(part, sites).links(tuning)
    return tuning


def _linked(
    model: PreTrainedModel, name: str, made: Sequence[Made], heads: tuple[str, ...]
) -> Tuning:
    """A tuning with its links, none of which is in the model yet."""
    tuning = Tuning(model, name, [each.part for each in made], heads)
    to_train = chain.from_iterable(each.modules for each in made)
    copies = trained_copies(model, [*to_train, *heads])
    # what trains itself is innermost
    tuning.links += [Link(copy, site, tuning) for copy, site in copies]
    for each in made:
        tuning.links += each.links(tuning)
    if not tuning.links:
        what = f"method {made[0].part.name!r}"
        raise UnsupportedError(f"{what}: this model has no blocks with linear layers.")
    _check_apart(tuning)
    return tuning


def _check_apart(tuning: Tuning) -> None:
    """See that no module is both adapted and trained along: its state could not tell one from the other."""
    taken: set[tuple[nn.Module, str]] = set()
    for link in tuning.links:
        place = link.site.module, link.key
        if place in taken:
            what = "is adapted, and among what trains along"
            remedy = "leave it out of where=… or of train=…"
            raise PetuneError(f"{link.site.name} {what}; {remedy}.")
        taken.add(place)


def check_name(model: PreTrainedModel, name: str) -> None:
    """See that a tuning can have a name on this model.

    Raises:
        PetuneError: another has it, or it is none.
        UnsupportedError: it is no model.
    """
    if not isinstance(model, nn.Module):
        raise UnsupportedError(f"{model!r} is no transformers model.")
    if not isinstance(name, str):
        raise PetuneError(f"name={name!r}: should be a text.")
    if name in tunings(model):
        raise PetuneError(
            f"a tuning named {name!r} is attached already; give this one another name=…"
        )
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise PetuneError(f"name={name!r}: letters, digits, '_' and '-' only.")


@dataclass(frozen=True)
class Made:
    """What comes of a method on a model: adapters at its sites, or the names of the modules that train."""

    part: Part
    adapters: Sequence[tuple[Adapter, Site]] = ()
    modules: Sequence[str] = ()

    def links(self, tuning: Tuning) -> list[Link]:
        """The adapters as links of a tuning."""
        method = self.part.name
        before = f"{method}:" if len(tuning.parts) > 1 else ""
        return [
            Link(adapter, site, tuning, method, before + site.name)
            for adapter, site in self.adapters
        ]


def _made(part: Part, sites: list[Site]) -> Made:
    if issubclass(part.cls, Unfreeze):
        return Made(part, modules=list(part.cls(**part.arguments).modules(sites)))
    picked = _picked(part, part.cls, sites)
    pool: dict[Any, Any] = {}
    own: list[Site] = []
    own += [replace(site, peers=own, pool=pool) for site in picked]
    settled = replace(part, arguments=part.cls.settle(own, dict(part.arguments)))
    at_each = arguments_at(own, settled)
    adapters = [
        (part.cls(site, **given), site)
        for site, given in zip(own, at_each, strict=True)
    ]
    return Made(settled, adapters=adapters)


def _picked(part: Part, cls: type[Adapter], sites: list[Site]) -> list[Site]:
    """The sites at which a method acts.

    Raises:
        PetuneError: none, or some of a kind that the method has no form for.
    """
    try:
        picked = select(
            sites, part.where or part.own_roles, strict=part.where is not None
        )
    except PetuneError as none:
        raise type(none)(f"method {part.name!r}: {none}") from None
    accepted = _accepted_kinds(cls)
    picked = with_a_form(part, picked)
    for site in picked:
        if accepted and site.kind not in accepted:
            kinds = " and ".join(sorted(accepted - {"experts"}))
            raise PetuneError(
                f"method {part.name!r} acts on {kinds} sites; where={part.where!r} picks {site.kind} sites."
            )
    return picked


def _accepted_kinds(cls: type[Adapter]) -> set[str]:
    """The kinds of site that a method acts on: a map of hidden states stands around a layer as around a block."""
    roles = f"{cls.where} {cls.also}".split()
    accepted = {KIND_OF[role] for role in roles if role in KIND_OF}
    hidden = {"linear", "block"}
    if takes_experts(cls):
        accepted.add("experts")
    return accepted | hidden if accepted & hidden else accepted
