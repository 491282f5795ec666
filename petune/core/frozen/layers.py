"""Which layers a word of a `where` means: `q@4:`, `down@-2:`."""

from __future__ import annotations

import re
from collections.abc import Sequence

from petune.core.frozen.site import Site
from petune.errors import PetuneError


def in_layers(sites: Sequence[Site], layers: str, word: str) -> Sequence[Site]:
    """The sites in some layers of their stacks.

    Args:
        layers: a number or a slice as Python writes them; "" for all sites, those outside
            the blocks too.
        word: what an error calls it.

    Raises:
        PetuneError: `layers` is neither.
    """
    if not layers:
        return sites
    meant = _slice(layers, word)
    within = [site for site in sites if site.layer is not None]
    depth: dict[str, int] = {}
    for site in within:
        stack, number = _stack_of(site), site.layer or 0
        depth[stack] = max(depth.get(stack, 0), number + 1)
    picked = {stack: range(count)[meant] for stack, count in depth.items()}
    return [site for site in within if site.layer in picked[_stack_of(site)]]


def _stack_of(site: Site) -> str:
    """`model.layers.3.mlp` and `model.layers.4.mlp` are of one stack."""
    return re.split(r"\.\d+(?:\.|$)", site.name)[0]


def _slice(layers: str, word: str) -> slice:
    written = re.fullmatch(r"(-?\d+)?(:)?(-?\d+)?", layers)
    if written is None:
        how = "layers are written 3, 2:5, 4: or -2:"
        raise PetuneError(f"where: {word!r}: {how}, not {layers!r}.")
    start, colon, stop = written.groups()
    first = None if start is None else int(start)
    last = None if stop is None else int(stop)
    if colon is None and first is not None:
        last = first + 1 or None  # -1 is the last alone
    return slice(first, last)
