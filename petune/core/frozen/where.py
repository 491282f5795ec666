"""How a user or a method picks among a model's sites: a list of words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from itertools import chain

from torch import Tensor

from petune.core.frozen.layers import Layers
from petune.core.frozen.site import FUSED, KIND_OF, Site
from petune.errors import PetuneError, UnsupportedError, unknown

WHY = {
    "attention": "it has no softmax attention over keys and values, or none that petune can stand around",
    "prompt": "it can't take more embeddings than tokens",
    "embedding": "it has no single table of input embeddings",
}
"""Why a model has no site of a kind."""
NAMED = ("linear", "block", "experts", "embedding")
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
    words = list(map(Word.of, where.split()))
    asked = {word.what for word in words}
    picked: dict[str, Site] = {}
    for word in words:
        hits = word.hits(sites, asked)
        if strict and not hits:
            raise _no_hit(sites, where, word)
        picked.update((site.name, site) for site in hits)
    if not picked:
        raise _nothing(where, words)
    order = [site.whole_name for site in sites]
    return sorted(picked.values(), key=lambda site: order.index(site.whole_name))


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
        """The sites, or parts of them, that the word picks where `asked` is all that is
        asked for.
        """
        if self.layers:
            sites = Layers.of(self.layers, self.text).among(sites)
        found = map(partial(self._hit, asked=asked), sites)
        return list(filter(None, found))

    def _hit(self, site: Site, asked: set[str]) -> Site | None:
        """The site, or the part of it, that the word picks."""
        if self.what == site.role:
            return site
        if self.what in FUSED.get(site.role, ()):
            return _fused(site, self.what, asked)
        if self.what in KIND_OF or site.kind not in NAMED:
            return None
        return site if self._names(site) else None

    def _names(self, site: Site) -> bool:
        ends_so = f".{site.name}".endswith(f".{self.what}")
        return any((ends_so, fnmatchcase(site.name, self.what)))


def _fused(site: Site, role: str, asked: set[str]) -> Site:
    """The part of a fused projection that plays a role; all of it where its other roles are
    asked for too, or where nothing tells the parts.
    """
    whole = {site.role}, set(FUSED[site.role])
    if role not in site.parts or any(map(asked.issuperset, whole)):
        return site
    return _part(site, role)


def _part(site: Site, role: str) -> Site:
    part = site.parts[role]
    if isinstance(part, Tensor):
        width = len(part)
    else:
        part = slice(*part.indices(site.out_features))  # an end may be left open
        width = part.stop - part.start
    name = f"{site.name}[{role}]"
    return replace(site, name=name, role=role, out_features=width, part=part, parts={})


def _no_hit(sites: Sequence[Site], where: str, word: Word) -> PetuneError:
    known = set(chain.from_iterable((site.role, *site.parts) for site in sites))
    return PetuneError(
        f"where={where!r} matches no site: " + unknown("role or name", word.text, known)
    )


def _nothing(where: str, words: Sequence[Word]) -> UnsupportedError:
    kinds = dict.fromkeys(KIND_OF.get(word.text, "") for word in words)
    reasons = filter(None, map(WHY.get, kinds))
    why = "; ".join(reasons) or "`petune sites MODEL` shows its sites"
    return UnsupportedError(f"this model has no site for {where!r}: {why}.")
