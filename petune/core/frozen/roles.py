"""What linear layers are for, read off their names and sizes; and the shape of an attention's heads."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

CROSS = re.compile(r"cross|enc_?dec|encoder_attn|crs", re.IGNORECASE)


OUT = {"o", "out", "output", "wo", "dense", "c"}


OTHER = {
    "pos",
    "position",
    "rel",
    "relative",
    "gate",
    "indexer",
    "global",
    "expert",
    "experts",
    "router",
    "conv",
}
"""Words of layers in an attention that are neither its projections nor its output."""


LETTERS = {
    "q": "q",
    "query": "q",
    "wq": "q",
    "k": "k",
    "key": "k",
    "wk": "k",
    "v": "v",
    "value": "v",
    "wv": "v",
}
LETTERS |= {"qkv": "qkv", "wqkv": "qkv", "kv": "kv", "wkv": "kv", "qkvz": "qkv", "in": "qkv"}


Sizes = Sequence[tuple[int, int]]


def _words(name: str) -> list[str]:
    return re.split(r"[^a-z]+", re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower())


def spelled(name: str) -> str:
    """The roles that a name inside an attention spells: `q_proj` q, `query_key_value` qkv, `dense` none; `other` for
    what is known to be none of them. The first part counts: `indexer.q` belongs to the indexer.
    """
    words = _words(name.partition(".")[0])
    letters = "".join(LETTERS.get(w, "") for w in words)
    if OTHER & set(words) or letters not in ("", "q", "k", "v", "qkv", "kv"):
        return "other"
    return letters


def attention_roles(names: Sequence[str]) -> list[str]:
    """The roles of the linear layers of an attention and its output, by their names inside it."""
    roles = [spelled(name) for name in names]
    unnamed = [i for i, role in enumerate(roles) if not role]
    outs = [i for i in unnamed if OUT & set(_words(names[i]))] or unnamed
    fused = "kv" if "q" in roles else "qkv"
    complete = {"q", "k", "v"} <= set(roles) or "qkv" in roles or {"q", "kv"} <= set(roles)
    for i in unnamed:
        roles[i] = "o" if i == outs[-1] else "other" if complete else fused
    return roles


def mlp_roles(names: Sequence[str], sizes: Sizes, hidden: int) -> list[str]:
    """The roles of the linear layers of an MLP: `down` is the last that gives back the width that another takes."""
    roles = ["other"] * len(names)
    aside = [bool({"bottleneck", "router"} & set(_words(name))) for name in names]
    pairs = [
        (i, j)
        for j, (inner, out) in enumerate(sizes)
        for i, (width, middle) in enumerate(sizes)
        if i < j
        and not (aside[i] or aside[j])
        and width == out
        and (middle in (inner, 2 * inner) or (out == hidden and middle >= inner))
    ]
    if not pairs:
        return roles
    down = pairs[-1][1]
    ups = [
        i
        for i, (width, middle) in enumerate(sizes)
        if i != down and (width, middle) in {sizes[k] for k, _ in pairs}
    ]
    gate = next((i for i in ups if "gate" in names[i].rpartition(".")[2]), ups[0])
    for i in ups:
        roles[i] = (
            "gate_up"
            if sizes[i][1] == 2 * sizes[down][0]
            else "gate"
            if i == gate and len(ups) > 1
            else "up"
        )
    roles[down] = "down"
    return roles


def geometry(core: Any, width: Mapping[str, int]) -> tuple[int, int, int, int] | None:
    """(heads, kv_heads, head_dim, value_dim) of an attention; None where neither it nor its layers tell.

    Args:
        width: The outputs of its linear layers by role.
    """
    owners = [
        core,
        getattr(core, "config", None),
    ]  # not the model's, which may speak of another tower

    def told(*names: str, among: list[Any] = owners) -> int:
        found = (getattr(owner, name, None) for owner in among for name in names)
        return next((v for v in found if isinstance(v, int) and v > 0), 0)

    heads = told("num_heads", "num_attention_heads", "n_heads", "n_head")
    if not heads:
        return None
    dims = (
        "qk_head_dim",
        "head_dim",
        "attention_head_size",
        "key_value_proj_dim",
        "d_head",
        "head_size",
    )
    groups = told("num_key_value_groups", among=[core])
    kv_heads = heads // groups if groups else told("num_key_value_heads", "num_kv_heads") or heads
    dim = (
        told(*dims, among=[core])
        or width.get("q", 0) // heads
        or width.get("qkv", 0) // (heads + 2 * kv_heads)
    )
    if not dim:
        return None
    if (
        width.get("q", 0) not in (0, heads * dim, 2 * heads * dim) and width["q"] % dim == 0
    ):  # twice: with a gate
        heads = width["q"] // dim
    if "k" in width:
        kv_heads = width["k"] // dim
    if not kv_heads or heads % kv_heads:
        return None
    return (
        heads,
        kv_heads,
        dim,
        told("v_head_dim", among=[core]) or width.get("v", 0) // kv_heads or dim,
    )
