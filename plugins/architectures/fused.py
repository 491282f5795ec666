"""Where q, k and v, or gate and up, lie in projections that compute them at once."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import petune

Parts = Mapping[str, slice | Tensor]
HALVES = {"gate_up": ("gate", "up"), "kv": ("k", "v")}


def sites(
    model: nn.Module, layout: Callable[[petune.Site], Parts]
) -> list[petune.Site]:
    """Those that discovery finds, the fused ones with their parts."""
    found = petune.discover(model)
    attentions = {s.name.partition("#")[0]: s for s in found if s.kind == "attention"}

    def parts(site: petune.Site) -> Parts:
        if site.role in HALVES:
            half = site.out_features // 2
            return dict(
                zip(HALVES[site.role], (slice(0, half), slice(half, None)), strict=True)
            )
        core = attentions.get(site.name.rpartition(".")[0])
        return layout(core) if site.role == "qkv" and core is not None else site.parts

    return [dataclasses.replace(site, parts=dict(parts(site))) for site in found]


def runs(core: petune.Site) -> Parts:
    """All queries, then all keys, then all values."""
    q, kv = core.heads * core.head_dim, core.kv_heads * core.head_dim
    return {"q": slice(0, q), "k": slice(q, q + kv), "v": slice(q + kv, q + 2 * kv)}


def by_head(core: petune.Site, groups: int | None = None) -> Parts:
    """For each group of heads its queries, then its key, then its value; without `groups` each head is one."""
    groups = groups or core.heads
    rows = torch.arange((core.heads + 2 * groups) * core.head_dim).view(
        groups, -1, core.head_dim
    )
    return {
        "q": rows[:, :-2].flatten(),
        "k": rows[:, -2].flatten(),
        "v": rows[:, -1].flatten(),
    }


def falcon(core: petune.Site) -> Parts:
    """By group of heads; one key and value for all heads in the first models."""
    attention: Any = core.module
    one = attention.multi_query and not attention.new_decoder_architecture
    return by_head(
        core,
        1
        if one
        else attention.num_kv_heads
        if attention.new_decoder_architecture
        else None,
    )


def within(core: petune.Site) -> Parts:
    """In a pair of an encoder and a decoder, as the half's own type has it."""
    kind = getattr(getattr(core.module, "config", None), "model_type", "")
    return LAYOUTS[kind](core) if kind in LAYOUTS else {}


LAYOUTS = {"falcon": falcon}
LAYOUTS |= dict.fromkeys(
    ["bloom", "gpt_neox", "gpt_neox_japanese", "persimmon"], by_head
)
LAYOUTS |= dict.fromkeys(
    ["dbrx", "glm", "glm4", "modernbert", "modernbert-decoder", "mpt", "phi3"], runs
)
LAYOUTS |= dict.fromkeys(
    ["decision_transformer", "gpt2", "imagegpt", "openai-gpt"], runs
)
LAYOUTS |= dict.fromkeys(
    ["encoder-decoder", "speech-encoder-decoder", "vision-encoder-decoder"], within
)
ARCHITECTURES = {
    kind: partial(sites, layout=layout) for kind, layout in LAYOUTS.items()
}
