"""What the linear layers of an attention are for, read off their names."""

from __future__ import annotations

import re
from collections.abc import Sequence

CROSS = re.compile(r"cross|enc_?dec|encoder_attn|crs", re.IGNORECASE)
"""What the name of an attention over another sequence has in it."""
OUT = {"o", "out", "output", "wo", "dense", "c"}
"""Words of an attention's output."""
OTHER = {
    "pos",
    "position",
    "rel",
    "relative",
    "gate",
    "indexer",
    "compressor",
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
    "qkv": "qkv",
    "wqkv": "qkv",
    "kv": "kv",
    "wkv": "kv",
    "qkvz": "qkv",
}
"""Words of projections, and the roles that they play."""
INTO = {"in", "proj"}
"""The words of a layer that is called after nothing but what goes in: the projection of all three."""
KNOWN = ("", "q", "k", "v", "qkv", "kv")
COMPLETE = ({"q", "k", "v"}, {"qkv"}, {"q", "kv"})
"""The roles with which an attention has all its projections."""


def words_of(name: str) -> list[str]:
    """The words that a module's name is made of: `selfAttention.q_proj` self, attention, q, proj."""
    spaced = re.sub(r"([a-z])([A-Z])", r"\1_\2", name)
    return re.split(r"[^a-z]+", spaced.lower())


def spelled(name: str) -> str:
    """The roles that a name inside an attention spells: `q_proj` q, `query_key_value` qkv, `dense` none; `other` for
    what is known to be none of them. The innermost part that spells any counts, `qkv_proj.q_proj` is q; but
    `indexer.q` belongs to the indexer.
    """
    parts = list(map(_spelled_by, name.split(".")))
    if "other" in parts:
        return "other"
    return next(filter(None, reversed(parts)), "")


def _spelled_by(part: str) -> str:
    """The roles that one part of a name spells."""
    words = words_of(part)
    if set(words) == INTO:
        return "qkv"
    letters = "".join(filter(None, map(LETTERS.get, words)))
    is_known = letters in KNOWN and OTHER.isdisjoint(words)
    return letters if is_known else "other"


def attention_roles(names: Sequence[str]) -> list[str]:
    """The roles of the linear layers of an attention and its output, by their names inside it."""
    roles = list(map(spelled, names))
    unnamed = [i for i, role in enumerate(roles) if not role]
    if not unnamed:
        return roles
    spelled_out = [i for i in unnamed if OUT & set(words_of(names[i]))]
    rest = _role_of_the_rest(set(roles))
    for i in unnamed:
        roles[i] = rest
    roles[(spelled_out or unnamed)[-1]] = "o"
    return roles


def _role_of_the_rest(roles: set[str]) -> str:
    """The role of layers whose names say nothing: a projection, if one is missing."""
    if any(complete <= roles for complete in COMPLETE):
        return "other"
    if {"k", "v"} <= roles:
        return "q"
    return "kv" if "q" in roles else "qkv"


def are_projections(names: Sequence[str]) -> bool:
    """Whether layers call themselves queries, keys and values, whatever the module around them is called."""
    return {"q", "k", "v"} <= set(map(spelled, names))
