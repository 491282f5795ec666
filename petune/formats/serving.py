"""A low-rank update as vLLM reads it and llama.cpp's converter takes it: one rank, one alpha, two matrices a module."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from petune.core.frozen.modules import features
from petune.errors import UnsupportedError
from petune.formats.advice import instead
from petune.formats.choice import twin_of
from petune.formats.export import describe
from petune.formats.names import PREFIX, short_names

if TYPE_CHECKING:
    from petune.core.attached.tuning import Tuning

A, B = "lora_A.weight", "lora_B.weight"


class Factors(NamedTuple):
    """The two matrices of an update B A: a is (rank, in_features), b is (out_features, rank)."""

    a: Tensor
    b: Tensor


def export(tuning: Tuning) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """PEFT's form of a tuning with every scale in B, slices of a fused projection in one, and all ranks padded to the
    largest, which is also alpha.

    Raises:
        UnsupportedError: the tuning is more than a low-rank update.
    """
    twin = twin_of(tuning)
    _check_layers(tuning)
    tensors, config = describe(tuning, tuning.parts[0], twin)
    whole = _joined(_scaled(tuning, _by_site(tuning, tensors), config))
    rank = max(len(factors.a) for factors in whole.values())
    out = {}
    for module, (a, b) in whole.items():
        missing = rank - len(a)
        out[f"{PREFIX}{module}.{A}"] = torch.nn.functional.pad(
            a, (0, 0, 0, missing)
        ).contiguous()
        out[f"{PREFIX}{module}.{B}"] = torch.nn.functional.pad(
            b, (0, missing)
        ).contiguous()
    return out, {
        **config,
        "r": rank,
        "lora_alpha": rank,
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "lora_dropout": 0.0,
        "target_modules": short_names(tuning.model, set(whole)),
    }


def _check_layers(tuning: Tuning) -> None:
    """See that the tuning acts at layers alone.

    Raises:
        UnsupportedError: it acts at stacked experts too.
    """
    for link in tuning.links:
        if link.site.kind == "experts":
            raise UnsupportedError(
                f"{link.site.name}: serving engines read low-rank updates of layers alone, not of stacked experts; "
                f"{instead(tuning.parts)}."
            )


def _by_site(tuning: Tuning, tensors: Mapping[str, Tensor]) -> dict[str, Factors]:
    """The factors of each site.

    Raises:
        UnsupportedError: there are other tensors.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        end = next((end for end in (A, B) if key.endswith(f".{end}")), None)
        if end is None:
            raise UnsupportedError(
                f"serving engines read low-rank updates alone, not {_said(tuning, key)} "
                f"of {tuning.method!r}; {instead(tuning.parts)}."
            )
        site = key.removeprefix(PREFIX).removesuffix(f".{end}")
        found.setdefault(site, {})[end] = tensor
    return {site: Factors(pair[A], pair[B]) for site, pair in found.items()}


def _said(tuning: Tuning, key: str) -> str:
    return (
        "a head that was trained along"
        if tuning.heads
        else repr(key.removeprefix(PREFIX))
    )


def _scaled(
    tuning: Tuning, factors: Mapping[str, Factors], config: Mapping[str, Any]
) -> dict[str, Factors]:
    """The factors with the scale in B; where a site is a slice of a module, B covers all outputs of the module."""
    found = {}
    for site, (a, b) in factors.items():
        scale = _scale(config, site, len(a))
        found[site] = Factors(a, _all_outputs(tuning, site, b * scale * tuning.weight))
    return found


def _scale(config: Mapping[str, Any], site: str, rank: int) -> float:
    alpha = float(config["alpha_pattern"].get(site, config["lora_alpha"]))
    return alpha / (math.sqrt(rank) if config["use_rslora"] else rank)


def _all_outputs(tuning: Tuning, name: str, b: Tensor) -> Tensor:
    """B with a row for each output of the module, which is zero where the site does not cover the output."""
    site = next(link.site for link in tuning.links if link.site.name == name)
    if site.part is None:
        return b
    _, out_features = features(site.module) or (0, len(b))
    found = b.new_zeros(out_features, b.shape[1])
    found[site.part] = b
    return found


def _joined(factors: Mapping[str, Factors]) -> dict[str, Factors]:
    """The factors by module: those of its slices behind each other, so that the ranks add up."""
    slices: dict[str, list[Factors]] = {}
    for site, pair in factors.items():
        module = site.partition("[")[0]
        slices.setdefault(module, []).append(pair)
    found = {}
    for module, pairs in slices.items():
        a = torch.cat([pair.a for pair in pairs])
        b = torch.cat([pair.b for pair in pairs], 1)
        found[module] = Factors(a, b)
    return found
