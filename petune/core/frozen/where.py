"""How a user or a method picks among a model's sites: a list of words."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from torch import Tensor

from petune.core.frozen.site import FUSED, KIND_OF, Site
from petune.errors import PetuneError, UnsupportedError, unknown

WHY = {
    "attention": "it has no softmax attention over keys and values, or none that petune can stand around",
    "prompt": "it can't take more embeddings than tokens",
    "embedding": "it has no single table of input embeddings",
}
"""Why a model has no site of a kind."""
NAMED = ("linear", "block")
"""The kinds of site that are picked by their names too."""


def select(sites: list[Site], where: str, *, strict: bool = True) -> list[Site]:
    """The sites that `where` picks, in the model's order.

    `where` is a list of words: a role (`q`), the end of a name or a pattern (`q_proj`, `*.layers.?.mlp.*`), each
    with an optional range of layers (`q@4:`, `down@-2:`). Roles inside a fused projection pick their part of it;
    all of them together pick it whole.

    Args:
        strict: a word that picks nothing is an error; for a method's own default it is not.

    Raises:
        PetuneError: a word picked nothing (strict).
        UnsupportedError: the model has nothing of the kind.
    """
    words = [Word.of(text) for text in where.split()]
    asked = {word.what for word in words}
    picked: dict[str, Site] = {}
    for word in words:
        hits = word.hits(sites, asked)
        if strict and not hits:
            raise _no_hit(sites, where, word)
        picked.update((site.name, site) for site in hits)
    if not picked:
        raise _nothing(where, words)
    order = {site.name: i for i, site in enumerate(sites)}
    return sorted(picked.values(), key=lambda site: order[site.whole_name])


@dataclass(frozen=True)
class Word:
    """One word of a `where`.

    Args:
        text: the word as it was written.
        what: a role, the end of a name or a pattern.
        layers: which layers of each stack, as a slice is written; "" for all.
    """

    text: str
    what: str
    layers: str

    @classmethod
    def of(cls, text: str) -> Word:
        """A word as it is written: `q@4:`."""
        what, _, layers = text.partition("@")
        return cls(text, what, layers)

    def hits(self, sites: Sequence[Site], asked: set[str]) -> list[Site]:
        """The sites, or parts of them, that the word picks where `asked` is all that is asked for."""
        found = [self._hit(site, asked) for site in self._in_layers(sites)]
        return [site for site in found if site is not None]

    def _hit(self, site: Site, asked: set[str]) -> Site | None:
        if self.what == site.role:
            return site
        if self.what in FUSED.get(site.role, ()):
            return _fused(site, self.what, asked)
        by_name = site.kind in NAMED and self.what not in KIND_OF
        return site if by_name and self._names(site) else None

    def _names(self, site: Site) -> bool:
        return site.name.endswith(f".{self.what}") or fnmatchcase(site.name, self.what)

    def _in_layers(self, sites: Sequence[Site]) -> Iterable[Site]:
        """The sites in the layers that the word names."""
        if not self.layers:
            return sites
        depth: dict[str, int] = {}
        within = [site for site in sites if site.layer is not None]
        for site in within:
            stack = stack_of(site)
            depth[stack] = max(depth.get(stack, 0), 1 + (site.layer or 0))
        return [
            site for site in within if site.layer in self._range(depth[stack_of(site)])
        ]

    def _range(self, depth: int) -> range:
        """The numbers of the layers, in a stack of so many."""
        start, colon, stop = self.layers.partition(":")
        try:
            first, last = _number(start), _number(stop)
        except ValueError:
            layers = "layers are written 3, 2:5, 4: or -2:"
            raise PetuneError(
                f"where: {self.text!r}: {layers}, not {self.layers!r}."
            ) from None
        if not colon and first is not None:
            last = first + 1 or None  # -1 is the last alone
        return range(depth)[slice(first, last)]


def _number(text: str) -> int | None:
    return int(text) if text else None


def _fused(site: Site, role: str, asked: set[str]) -> Site:
    """The part of a fused projection that plays a role; all of it where its other roles are asked for too, or where
    nothing tells the parts.
    """
    together = set(FUSED[site.role]) <= asked
    whole = together or site.role in asked or role not in site.parts
    return site if whole else _part(site, role)


def _part(site: Site, role: str) -> Site:
    part = site.parts[role]
    if isinstance(part, Tensor):
        width = len(part)
    else:
        part = slice(*part.indices(site.out_features))  # an end may be left open
        width = part.stop - part.start
    name = f"{site.name}[{role}]"
    return replace(site, name=name, role=role, out_features=width, part=part, parts={})


def stack_of(site: Site) -> str:
    """`model.layers.3.mlp` and `model.layers.4.mlp` are of one stack."""
    return re.split(r"\.\d+(?:\.|$)", site.name)[0]


def _no_hit(sites: Sequence[Site], where: str, word: Word) -> PetuneError:
    known = {site.role for site in sites}
    for site in sites:
        known.update(site.parts)
    return PetuneError(
        f"where={where!r} matches no site: " + unknown("role or name", word.text, known)
    )


def _nothing(where: str, words: Sequence[Word]) -> UnsupportedError:
    kinds = [KIND_OF.get(word.text, "") for word in words]
    reasons = dict.fromkeys(WHY[kind] for kind in kinds if kind in WHY)
    why = "; ".join(reasons) or "`petune sites MODEL` shows its sites"
    return UnsupportedError(f"this model has no site for {where!r}: {why}.")
