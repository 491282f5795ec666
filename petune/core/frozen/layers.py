"""Which layers a word of a `where` means: `q@4:`, `down@-2:`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from petune.core.frozen.site import Site
from petune.errors import PetuneError

WRITTEN = re.compile(r"(?P<first>-?\d+)?(?P<colon>:)(?P<last>-?\d+)?|(?P<only>-?\d+)")


@dataclass(frozen=True)
class Layers:
    """Layers of each stack of blocks.

    Args:
        meant: their numbers, as a slice of those of the stack.
    """

    meant: slice

    @classmethod
    def of(cls, written: str, word: str) -> Layers:
        """Layers as Python writes a number or a slice.

        Args:
            word: what an error calls it.

        Raises:
            PetuneError: it is neither.
        """
        match = WRITTEN.fullmatch(written)
        if match is None:
            how = "layers are written 3, 2:5, 4: or -2:"
            raise PetuneError(f"where: {word!r}: {how}, not {written!r}.")
        if match["colon"] is not None:
            return cls(slice(_bound(match["first"]), _bound(match["last"])))
        first = int(match["only"])
        return cls(slice(first, first + 1 or None))  # -1 is the last alone

    def among(self, sites: Sequence[Site]) -> list[Site]:
        """Those of the sites that are in them."""
        depth: Counter[str] = Counter()
        for site in sites:
            stack, number = _stack_of(site), _number(site.layer, -1)
            depth[stack] = max(depth[stack], number + 1)
        return [site for site in sites if self._hold(site, depth[_stack_of(site)])]

    def _hold(self, site: Site, depth: int) -> bool:
        """Whether a site is in them, of a stack of so many layers."""
        return site.layer in range(depth)[self.meant]


def _bound(text: str | None) -> int | None:
    """An end of a slice, None where it is left open."""
    return None if text is None else int(text)


def _number(layer: int | None, outside: int) -> int:
    """A site's number in its stack, `outside` for one in no block."""
    return outside if layer is None else layer


def _stack_of(site: Site) -> str:
    """`model.layers.3.mlp` and `model.layers.4.mlp` are of one stack."""
    return re.split(r"\.\d+(?:\.|$)", site.name)[0]
