"""What a method reaches of a model, and what it leaves out, which is said when it begins."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from itertools import filterfalse
from operator import attrgetter
from typing import Any

from torch import Tensor, nn

from petune.core.attached.parts import Part
from petune.core.forward.link import Link, takes_experts
from petune.core.frozen.modules import walk
from petune.core.frozen.site import KIND_OF, Site
from petune.core.method.adapter import Adapter
from petune.core.method.copies import TrainedCopy
from petune.errors import UnsupportedError

LITTLE = 0.1
"""The share of the weights in a model's layers that may be left out unsaid: position biases, routers."""
NAME, LAYER = attrgetter("name"), attrgetter("layer")
SITE, MODULE = attrgetter("site"), attrgetter("module")
Sizes = Mapping[str, int]
"""How many numbers a parameter has, by its name in the model."""
_DECIDED = ContextVar("_DECIDED", default=False)
"""Whether what is left out has been decided before, and so said."""


@contextmanager
def decided_before() -> Iterator[None]:
    """Within the context nothing is said of what is left out: it is a saved tuning that says where it acts."""
    token = _DECIDED.set(True)
    try:
        yield
    finally:
        _DECIDED.reset(token)


def with_a_form(part: Part, picked: Sequence[Site]) -> list[Site]:
    """Those of the sites picked for which the method has a form: all but stacked experts, if it has none for them.

    Raises:
        UnsupportedError: it has a form for none of them.
    """
    if takes_experts(part.cls):
        return list(picked)
    kept = list(filterfalse(_is_stacked, picked))
    if kept:
        return kept
    raise UnsupportedError(
        f"method {part.name!r} has no form for stacked experts: "
        f"{picked[0].name} is one parameter for all of them."
    )


def left_out(
    model: Any, parts: Iterable[Part], links: Sequence[Link], sites: Sequence[Site]
) -> Iterator[str]:
    """What the methods of a tuning leave out where the user would not expect it, in a line each.

    Args:
        links: the tuning's.
        sites: all sites of the model.
    """
    if _DECIDED.get():
        return
    yield from _tied_to_copies(model, links)
    for part in filter(_adapts, parts):
        layers = Layers(model, sites)
        yield from layers.experts_left(part)
        if part.where is None:
            yield from layers.strangers_left(part)
            yield from layers.left_alone(part, links)


def _is_stacked(site: Site) -> bool:
    return site.kind == "experts"


def _is_copy(link: Link) -> bool:
    return isinstance(link.adapter, TrainedCopy)


def _is_of(part: Part, link: Link) -> bool:
    return link.method == part.name


def _adapts(part: Part) -> bool:
    return issubclass(part.cls, Adapter)


def _words(part: Part) -> set[str]:
    """The words by which the sites of a method are picked."""
    return set((part.where or part.cls.where).split())


class Layers:
    """The layers of a model, and their weights by what is known of them.

    Args:
        sites: all sites of the model.
    """

    def __init__(self, model: Any, sites: Sequence[Site]) -> None:
        self.sites = sites
        self.sizes: Sizes = dict(_weights_in_blocks(model, sites))
        self.stacked = list(filter(_is_stacked, sites))

    def experts_left(self, part: Part) -> Iterator[str]:
        """The stacked experts that a method is to act on and has no form for."""
        words = _words(part)
        wanted = [s.name for s in self.stacked if words & {s.role, *s.parts}]
        if wanted and not takes_experts(part.cls):
            yield self._share(
                part,
                wanted,
                "one parameter for all experts of a layer, for which it has no form",
            )

    def strangers_left(self, part: Part) -> Iterator[str]:
        """The weights that are of no role which a method for linear layers could act at, where they are many."""
        if "linear" not in map(KIND_OF.get, _words(part)):
            return
        layers = map(NAME, filter(_has_a_role, self.sites))
        known = {*map(NAME, self.stacked), *map("{}.weight".format, layers)}
        strangers = sorted(self.sizes.keys() - known)
        if self._sum(strangers) > LITTLE * self._sum(self.sizes):
            yield self._share(part, strangers, "no linear layer of a known role")

    def left_alone(self, part: Part, links: Iterable[Link]) -> Iterator[str]:
        """The layers in which a method that acts in layers has no site."""
        own = filter(partial(_is_of, part), links)
        reached, layers = _numbers(map(SITE, own)), _numbers(self.sites)
        if reached and reached != layers:
            yield (
                f"{part.name!r} acts in {len(reached)} of {len(layers)} layers: "
                f"layer {min(layers - reached)}, and any other, has no site for {part.cls.where!r}."
            )

    def _sum(self, names: Iterable[str]) -> int:
        return sum(map(self.sizes.__getitem__, names))

    def _share(self, part: Part, left: Sequence[str], what: str) -> str:
        share = self._sum(left) / self._sum(self.sizes)
        largest = max(left, key=self.sizes.__getitem__)
        return (
            f"{part.name!r} leaves out {len(left)} of {len(self.sizes)} weights, "
            f"{share:.0%} of those in the layers: {largest} is {what}."
        )


def _has_a_role(site: Site) -> bool:
    """Whether it is a linear layer of which it is known what it is for."""
    return site.kind == "linear" and site.role != "other"


def _numbers(sites: Iterable[Site]) -> set[int]:
    """The numbers of the layers in which sites are."""
    return set(map(LAYER, sites)) - {None}


def _weights_in_blocks(model: Any, sites: Sequence[Site]) -> Iterator[tuple[str, int]]:
    """(name, size) of every matrix in a model's blocks but those of tables."""
    blocks = tuple(f"{site.name}." for site in sites if site.role == "layer")
    for name, module in walk(model):
        if f"{name}.".startswith(blocks) and not isinstance(module, nn.Embedding):
            own = module.named_parameters(recurse=False)
            for parameter, value in filter(_is_matrix, own):
                yield f"{name}.{parameter}", value.numel()


def _is_matrix(named: tuple[str, Tensor]) -> bool:
    return named[1].dim() > 1


def _tied_to_copies(model: Any, links: Sequence[Link]) -> Iterator[str]:
    """The modules that read the same table as one that trains in a copy, and have no copy themselves."""
    copies = list(map(SITE, filter(_is_copy, links)))
    copied = set(map(MODULE, copies))
    for site in copies:
        others = filterfalse(lambda named: named[1] in copied, walk(model))
        tables = set(map(id, site.module.parameters(recurse=False)))
        for name, _ in filter(partial(_reads, tables), others):
            yield (
                f"{site.name} trains in a copy of its own, and {name}, which is tied to it, stays as it is: "
                f"train={[site.name, name]!r} keeps them one."
            )


def _reads(tables: set[int], named: tuple[str, nn.Module]) -> bool:
    """Whether a module has one of these tensors among its own parameters."""
    return not tables.isdisjoint(map(id, named[1].parameters(recurse=False)))
