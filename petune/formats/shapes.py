"""Arguments that are read off the shapes of PEFT's tensors, since its options name them in another way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from math import isqrt
from typing import TYPE_CHECKING, Any

from torch import Tensor

from petune.errors import UnsupportedError

if TYPE_CHECKING:
    from petune.core.forward.link import Link
    from petune.core.method.twin import PeftTwin
    from petune.formats.contents import Piece


def side_of(entries: int) -> int:
    """The side b of the matrices that have so many entries, b (b - 1) / 2, above their diagonals."""
    return (1 + isqrt(1 + 8 * entries)) // 2


def shaped_arguments(piece: Piece, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The side of the blocks, which may differ by site, and how many factors they are in."""
    twin = piece.twin
    sides, factors = {}, 0
    for key, (site, ours) in piece.owners.items():
        shape = tensors[key].shape
        if ours not in twin.blocks or len(shape) < 2:
            continue
        sides[site] = (
            shape[-1] if twin.layouts.get(ours) == "skew" else side_of(shape[-1])
        )
        factors = shape[0]
    if not sides:
        return {}
    most = _most(sides.values())
    others = {site: side for site, side in sides.items() if side != most}
    found: dict[str, Any] = {"block": most} | (
        {"block_pattern": others} if others else {}
    )
    return found | (
        {"factors": factors} if "factors" in twin.arguments.values() else {}
    )


def block_options(links: Iterable[Link], twin: PeftTwin) -> dict[str, int]:
    """PEFT's options for the blocks: one size for all sites, or one number.

    Raises:
        UnsupportedError: the sites have neither in common.
    """
    if not twin.blocks:
        return {}
    sizes, counts = _sizes_and_counts(links)
    by_size = next(theirs for theirs, ours in twin.arguments.items() if ours == "block")
    by_count = next(iter(twin.blocks.values()))
    if len(set(sizes.values())) == 1:
        return {by_size: _most(sizes.values()), by_count: 0}
    if len(set(counts.values())) == 1:
        return {by_size: 0, by_count: _most(counts.values())}
    most = _most(sizes.values())
    other = next(name for name, size in sizes.items() if size != most)
    raise UnsupportedError(
        f"{other} has block={sizes[other]}, not {most}, and PEFT has one for all; attach with a block that fits all."
    )


def _sizes_and_counts(
    links: Iterable[Link],
) -> tuple[dict[str, int], dict[str, int]]:
    """How large the blocks of each site are, and how many."""
    sizes, counts = {}, {}
    for link in links:
        adapter: Any = link.adapter
        sizes[link.site.name] = adapter.block
        counts[link.site.name] = link.site.in_features // adapter.block
    return sizes, counts


def _most(values: Iterable[int]) -> int:
    return Counter(values).most_common(1)[0][0]
