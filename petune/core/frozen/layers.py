"""Which layers a word of a `where` means: `q@4:`, `down@-2:`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from petune.core.frozen.site import Site
from petune.errors import PetuneError

WRITTEN = re.compile(r"(?P<first>-?\d+)?(?P<colon>:)?(?P<last>-?\d+)?")


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
        first, last = _number(match["first"]), _number(match["last"])
        if match["colon"] is None and first is not None:
            last = first + 1 or None  # -1 is the last alone
        return cls(slice(first, last))

    def among(self, sites: Sequence[Site]) -> list[Site]:
        """Those of the sites that are in them."""
        within = [site for site in sites if site.layer is not None]
        numbers: dict[str, set[int | None]] = {}
        for site in within:
            numbers.setdefault(_stack_of(site), set()).add(site.layer)
        picked = {stack: self._of_stack(has) for stack, has in numbers.items()}
        return [site for site in within if site.layer in picked[_stack_of(site)]]

    def _of_stack(self, numbers: set[int | None]) -> range:
        """Those of a stack whose layers have these numbers."""
        last = max(filter(None, numbers), default=0)
        return range(last + 1)[self.meant]


def _number(text: str | None) -> int | None:
    return None if text is None else int(text)


def _stack_of(site: Site) -> str:
    """`model.layers.3.mlp` and `model.layers.4.mlp` are of one stack."""
    return re.split(r"\.\d+(?:\.|$)", site.name)[0]
