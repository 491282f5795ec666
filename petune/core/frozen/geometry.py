"""The shape of an attention's heads, as it or its layers tell."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, product
from operator import lt
from typing import Any, NamedTuple

HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
KV_HEADS = ("num_key_value_heads", "num_kv_heads")
WIDTHS = (
    "qk_head_dim",
    "head_dim",
    "attention_head_size",
    "key_value_proj_dim",
    "d_head",
    "head_size",
)


class Geometry(NamedTuple):
    """The heads of q, those of k and v, the width of one of q and k, and that of one of v."""

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int


def geometry(core: Any, width: Mapping[str, int]) -> Geometry | None:
    """The shape of an attention's heads; None where neither it nor its layers tell.

    Args:
        width: The outputs of its linear layers by role.
    """
    # not the model's configuration, which may speak of another tower
    owners = [core, getattr(core, "config", None)]
    heads = _first(_told(owners, HEADS))
    if not heads:
        return None
    kv_heads = _kv_heads(core, owners, heads)
    dim = _first(chain(_told([core], WIDTHS), _by_projection(width, heads, kv_heads)))
    if not dim:
        return None
    heads = _by_width(width, heads, dim)
    kv_heads = width.get("k", kv_heads * dim) // dim
    if not kv_heads or heads % kv_heads:
        return None
    values = (width.get("v", 0) // kv_heads, dim)
    value = _first(chain(_told([core], ["v_head_dim"]), values))
    return Geometry(heads, kv_heads, dim, value)


def _told(owners: Sequence[Any], names: Sequence[str]) -> Iterator[Any]:
    """What goes by one of the names, asked for one by one: some configurations refuse to
    answer for all layers at once.
    """
    for owner, name in product(owners, names):
        yield getattr(owner, name, None)


def _first(values: Iterable[Any]) -> int:
    """The first of the values that is a positive number, 0 if none is."""
    numbers = (value for value in values if isinstance(value, int))
    return next(filter(partial(lt, 0), numbers), 0)


def _kv_heads(core: Any, owners: Sequence[Any], heads: int) -> int:
    groups = _first(_told([core], ["num_key_value_groups"]))
    if groups:
        return heads // groups
    return _first(chain(_told(owners, KV_HEADS), [heads]))


def _by_projection(
    width: Mapping[str, int], heads: int, kv_heads: int
) -> tuple[int, int]:
    """The width of a head by that of the projection of queries, or of all three in one."""
    return width.get("q", 0) // heads, width.get("qkv", 0) // (heads + 2 * kv_heads)


def _by_width(width: Mapping[str, int], heads: int, dim: int) -> int:
    """The heads of q, by the width of its projection if that is of another number than
    what is told.
    """
    q = width.get("q", 0)
    as_told = (0, heads * dim, 2 * heads * dim)  # twice: with a gate
    return heads if q in as_told or q % dim else q // dim
