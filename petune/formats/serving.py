"""A low-rank update as vLLM reads it and llama.cpp's converter takes it: one rank, one alpha, two matrices a module."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from petune.core.frozen.modules import features
from petune.errors import UnsupportedError
from petune.formats import peft

if TYPE_CHECKING:
    from petune.core.attached.tuning import Tuning

A, B = "lora_A.weight", "lora_B.weight"


def export(tuning: Tuning) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """PEFT's form of a tuning with every scale in B, parts of a fused projection in one, and all ranks padded to the
    largest, which is also alpha.

    Raises:
        UnsupportedError: the tuning is more than a low-rank update.
    """
    tensors, config = peft.export(tuning, parts=True)
    modules: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        end = next((end for end in (A, B) if key.endswith("." + end)), None)
        if end is None:
            what = (
                "a head that was trained along"
                if tuning.heads
                else f"{key.removeprefix(peft.PREFIX)!r}"
            )
            raise UnsupportedError(
                f"serving engines read low-rank updates alone, not {what} of {tuning.method!r}; merge it instead."
            )
        modules.setdefault(key.removesuffix("." + end), {})[end] = tensor
    baked: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for name, pair in modules.items():
        site = name.removeprefix(peft.PREFIX)
        up = pair[B] * _scale(config, site, len(pair[A])) * tuning.weight
        baked.setdefault(name.partition("[")[0], []).append(
            (pair[A], _whole(tuning, site, up))
        )
    joined = {
        name: (torch.cat([a for a, _ in p]), torch.cat([b for _, b in p], 1))
        for name, p in baked.items()
    }
    rank = max(len(a) for a, _ in joined.values())
    out = {}
    for name, (a, b) in joined.items():
        more = rank - len(a)
        out[f"{name}.{A}"] = torch.nn.functional.pad(a, (0, 0, 0, more)).contiguous()
        out[f"{name}.{B}"] = torch.nn.functional.pad(b, (0, more)).contiguous()
    plain = {
        "r": rank,
        "lora_alpha": rank,
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    names = {name.removeprefix(peft.PREFIX) for name in joined}
    return out, {
        **config,
        **plain,
        "lora_dropout": 0.0,
        "target_modules": peft.short_names(tuning.model, names),
    }


def _scale(config: Mapping[str, Any], site: str, rank: int) -> float:
    alpha = float(config["alpha_pattern"].get(site, config["lora_alpha"]))
    return alpha / (math.sqrt(rank) if config["use_rslora"] else rank)


def _whole(tuning: Tuning, site: str, up: Tensor) -> Tensor:
    """B of a part of a fused projection among the rows of the whole, which are zero elsewhere."""
    found = next(link.site for link in tuning.links if link.site.name == site)
    if found.part is None:
        return up
    out = up.new_zeros((features(found.module) or (0, len(up)))[1], up.shape[1])
    out[found.part] = up
    return out
