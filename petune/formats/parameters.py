"""Parameters that PEFT adapts in place of layers: stacked experts, routers. Its layer for one stands around the module,
several around each other.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from petune.core.frozen.modules import walk
from petune.errors import PetuneError, PetuneWarning, UnsupportedError
from petune.formats.advice import MERGE_THERE
from petune.formats.names import (
    BASE_LAYER,
    CONFIG,
    PREFIX,
    exceptions_by_module,
    input_embedding,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from petune.core.frozen.site import Site

OPTION = "target_parameters"
"""PEFT's option that lists parameters, by the ends of their names."""
ENDS = (
    (".lora_A.weight", ".lora_B.weight"),
    (".lora_embedding_A", ".lora_embedding_B"),
)
"""How PEFT calls the factors of an update."""


def wrapped_names(sites: Iterable[Site]) -> dict[str, str]:
    """{the name of a site of stacked experts: that of PEFT's layer for it}.

    PEFT adapts a module's parameters in their order and puts each layer around the ones before, whose tensors are then
    called `…experts.base_layer.lora_A.weight`.
    """
    by_module: dict[str, list[Site]] = {}
    for site in sites:
        by_module.setdefault(site.module_name, []).append(site)
    found = {}
    for module, own in by_module.items():
        order = [name for name, _ in own[0].module.named_parameters(recurse=False)]
        own.sort(key=lambda site: order.index(site.parameter))
        for depth, site in enumerate(reversed(own)):
            found[site.name] = module + BASE_LAYER.rstrip(".") * depth
    return found


def by_parameter(
    saved: Mapping[str, Tensor],
    model: PreTrainedModel,
    sites: Mapping[str, Site],
    config: Mapping[str, Any],
) -> dict[str, Tensor]:
    """The tensors of a folder, those for parameters of experts under the names of these. What PEFT adds to any other
    parameter (a router's, a table of positions, a head) comes as the parameter itself with that in it: its module
    trains in a copy here.

    Raises:
        UnsupportedError: it adapts a parameter that stands beside those of stacked experts.
    """
    meant = _meant(model, config.get(OPTION) or ())
    names = [name for name in meant if not _is_a_layers(name, sites)]
    layers = wrapped_names(_experts_among(names, sites))
    found = _renamed(saved, {layer: name for name, layer in layers.items()})
    others = [name for name in names if name not in layers]
    _check_alone(others, sites)
    others += _strangers(found, model, [*sites.values()], config, others)
    for name in others:
        _fold(name, found, model, config)
    _say_copies(others)
    return found


def _experts_among(names: Iterable[str], sites: Mapping[str, Site]) -> list[Site]:
    found = [sites[name] for name in names if name in sites]
    return [site for site in found if site.kind == "experts"]


def _strangers(
    tensors: Mapping[str, Tensor],
    model: PreTrainedModel,
    sites: Iterable[Site],
    config: Mapping[str, Any],
    listed: Sequence[str],
) -> list[str]:
    """The weights of modules that PEFT's LoRA adapts and where petune has no hook point for it. One that the model
    never calls, T5's shared table, is none of them.

    Args:
        listed: the parameters that are adapted as such.
    """
    if config.get("peft_type") != "LORA" or config.get("use_dora"):
        return []
    known = {site.name for site in sites if site.kind != "module"}
    known |= {input_embedding(model), *(name.rpartition(".")[0] for name in listed)}
    found = {_split(key)[0].removeprefix(PREFIX) for key in tensors if ".lora_" in key}
    weights = dict(model.named_parameters())
    return sorted(
        f"{name}.weight" for name in found - known if f"{name}.weight" in weights
    )


def _renamed(
    saved: Mapping[str, Tensor], owners: Mapping[str, str]
) -> dict[str, Tensor]:
    """The tensors of a folder, where those of some layers of PEFT's are another's."""
    found = {}
    for key, tensor in saved.items():
        layer, end = _split(key)
        name = owners.get(layer.removeprefix(PREFIX))
        found[key if name is None else f"{PREFIX}{name}{end}"] = tensor
    return found


def _check_alone(names: Sequence[str], sites: Mapping[str, Site]) -> None:
    """See that a module of which a parameter is to train in a copy is adapted nowhere else.

    Raises:
        UnsupportedError: it holds stacked experts, or several parameters of it are adapted.
    """
    experts = {s.module_name for s in sites.values() if s.kind == "experts"}
    modules = [name.rpartition(".")[0] for name in names]
    for name, module in zip(names, modules, strict=True):
        if module in experts or modules.count(module) > 1:
            raise UnsupportedError(
                f"{CONFIG}: {OPTION} lists {name}, which is neither a weight of stacked experts nor its module's only "
                f"one there; {MERGE_THERE}."
            )


def _fold(
    name: str,
    tensors: dict[str, Tensor],
    model: PreTrainedModel,
    config: Mapping[str, Any],
) -> None:
    """Put a parameter with its low-rank update in place of the update's tensors.

    Raises:
        PetuneError: they are missing, or have other shapes.
    """
    module = name.rpartition(".")[0]
    weight = model.get_parameter(name).detach().cpu().float()
    pair = _factors(f"{PREFIX}{module}", tensors)
    update = _product(pair, model.get_submodule(module))
    if update.shape != weight.shape:
        raise PetuneError(
            f"it does not fit this model: it has no low-rank update of {name}'s shape."
        )
    scale = _scale(config, name, len(pair[0]))
    tensors[f"{PREFIX}{name}"] = weight + scale * update


def _factors(layer: str, tensors: dict[str, Tensor]) -> list[Tensor]:
    """A (rank, in) and B (out, rank), which are taken out of the tensors; less where some are missing."""
    keys = [f"{layer}{end}" for pair in ENDS for end in pair]
    return [tensors.pop(key).float() for key in keys if key in tensors]


def _product(pair: Sequence[Tensor], module: nn.Module) -> Tensor:
    """The update as the module keeps its weight; without numbers where the factors don't fit together."""
    if len(pair) != 2 or any(t.dim() != 2 for t in pair):
        return torch.empty(0)
    a, b = pair
    if len(a) != b.shape[1]:
        return torch.empty(0)
    return (b @ a).T if isinstance(module, nn.Embedding | Conv1D) else b @ a


def _scale(config: Mapping[str, Any], name: str, rank: int) -> float:
    """By what PEFT multiplies the update of a parameter, which it knows by its own name or by its module's."""
    names = [name, name.rpartition(".")[0]]
    patterns = exceptions_by_module(config.get("alpha_pattern"), names) or {}
    alpha = next(iter(patterns.values()), config["lora_alpha"])
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _say_copies(names: Sequence[str]) -> None:
    if names:
        more = f" and {len(names) - 1} more".removesuffix(" and 0 more")
        what = f"{CONFIG}: {names[0]}{more} trains in a copy here, with PEFT's low-rank update in it"
        warnings.warn(f"{what}, which computes the same.", PetuneWarning, stacklevel=8)


def _is_a_layers(name: str, sites: Mapping[str, Site]) -> bool:
    """Whether a parameter is the weight of a linear layer, at which PEFT's tensors are those of the layer itself."""
    module, _, parameter = name.rpartition(".")
    is_linear = module in sites and isinstance(sites[module].module, nn.Linear)
    return is_linear and parameter == "weight"


def _split(key: str) -> tuple[str, str]:
    """A tensor's name in two: its layer's, and what comes from `lora_` on."""
    layer, dot, end = key.partition(".lora_")
    return layer, dot + end


def _meant(model: PreTrainedModel, listed: Sequence[str]) -> Iterator[str]:
    """The parameters of the model that a list of PEFT's means."""
    ends = tuple(f".{end}" for end in listed)
    for module, own in walk(model):
        for name, _ in own.named_parameters(recurse=False):
            if ends and f".{module}.{name}".endswith(ends):
                yield f"{module}.{name}"
