"""Stacked experts in PEFT's folders: its layer for a parameter stands around the module, several around each other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from petune.core.frozen.modules import walk
from petune.errors import UnsupportedError
from petune.formats.advice import MERGE_THERE
from petune.formats.names import BASE_LAYER, CONFIG, PREFIX

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from petune.core.frozen.site import Site

OPTION = "target_parameters"
"""PEFT's option that lists parameters, by the ends of their names."""


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
    """The tensors of a folder, those for parameters of experts under the names of these.

    Raises:
        UnsupportedError: it adapts another parameter than those of stacked experts.
    """
    listed = config.get(OPTION) or ()
    names = [name for name in _meant(model, listed) if not _is_a_layers(name, sites)]
    for name in names:
        if name not in sites or sites[name].kind != "experts":
            raise UnsupportedError(
                f"{CONFIG}: {OPTION} lists {name}, which is no parameter of stacked experts; {MERGE_THERE}."
            )
    owner = {
        f"{PREFIX}{layer}": f"{PREFIX}{name}"
        for name, layer in wrapped_names(map(sites.__getitem__, names)).items()
    }
    found = {}
    for key, tensor in saved.items():
        layer, end = _split(key)
        found[owner.get(layer, layer) + end] = tensor
    return found


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
