"""A tuning as PEFT would have saved it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from petune.core.frozen.modules import walk
from petune.errors import PetuneWarning, UnsupportedError
from petune.formats.advice import instead
from petune.formats.base import Base
from petune.formats.choice import twins_of
from petune.formats.layouts import LAYOUTS, Surroundings
from petune.formats.names import (
    BASE_LAYER,
    BESIDE,
    OUTER,
    PREFIX,
    TASK_HEADS,
    WHOLE_KEY,
    input_embedding,
    short_names,
)
from petune.formats.options import check_same, listed_roles, options_of, ranks_of
from petune.formats.parameters import wrapped_names
from petune.formats.shapes import block_options
from petune.formats.tasks import modules_to_save, task_of
from petune.formats.tokens import check_reached, token_option
from petune.formats.whole import WHOLES

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from petune.core.attached.parts import Part
    from petune.core.attached.tuning import Tuning
    from petune.core.forward.link import Link
    from petune.core.frozen.site import Site
    from petune.core.method.twin import PeftTwin
    from petune.formats.layouts import TensorsBySite

Described = tuple[dict[str, Tensor], dict[str, Any]]
"""(tensors by PEFT's names, what its configuration says)."""


def export(tuning: Tuning) -> Described:
    """(tensors, configuration) as PEFT would have written them.

    Raises:
        UnsupportedError: PEFT has no such method, or can't put it where it acts here.
    """
    if tuning.weight != 1:
        raise UnsupportedError(
            f"PEFT's format has no place for a weight of {tuning.weight}; save without format=."
        )
    (part, twin), *others = twins_of(tuning)
    if any(link.site.part is not None for link in adapter_links(tuning)):
        raise UnsupportedError(
            f"{tuning.method!r} acts on parts of a fused projection here, which PEFT can't; "
            'format="serving" can write some for the whole.'
        )
    tensors, config = describe(tuning, part, twin)
    adapted = {
        link.site.name for link in adapter_links(tuning) if link.method == part.name
    }
    for other, twin_beside in others:
        more, options = _beside(tuning, other, twin_beside, adapted)
        tensors |= more
        config |= options
    heads = _untrained_heads(tuning, twin, config["task_type"])
    return heads | _on_cpu(tensors), config


def describe(tuning: Tuning, part: Part, twin: PeftTwin) -> Described:
    """(tensors, configuration) of one method in PEFT's names. Where the tuning has a weight or acts on slices of a
    fused projection PEFT would not read it: the slices go under the names of their sites, the weight is left out.
    """
    links = _own_links(tuning, part)
    _check_layers(links, part, twin)
    if twin.tables:
        check_reached(tuning.model, [link.site for link in links])
    plain = {
        link.site.name: {**link.adapter.plain(), **link.adapter.drawn()}
        for link in links
    }
    config = _general_options(tuning, twin) | options_of(part, twin)
    check_same(links, twin, config)
    _say_cautions(twin, config)
    config |= ranks_of(links, plain, twin, config) | block_options(links, twin)
    config["modules_to_save"] = modules_to_save(tuning, config["task_type"])
    tensors = _head_tensors(tuning, twin)
    if twin.whole:
        sites = [link.site for link in links]
        tensors[WHOLE_KEY] = WHOLES[twin.whole].write(tuning.model, plain, sites)
    else:
        listed = _listed(part, twin, links)
        found = _site_tensors(tuning.model, links, plain, twin, listed)
        tensors |= {_key(*names): t for names, t in found.items()}
        config |= dict.fromkeys(twin.roles, short_names(tuning.model, listed))
        stacked = _stacked(links)
        modules = {module for module, theirs in found if theirs[0] != "/"}
        modules -= {*wrapped_names(stacked).values()}
        config["target_modules"] = short_names(tuning.model, modules)
        config |= _parameters(stacked, twin, config)
    return _on_cpu(tensors), config


def _say_cautions(twin: PeftTwin, config: Mapping[str, Any]) -> None:
    """One line for each option of whose value PEFT makes something else in some places."""
    for option, (value, what) in twin.cautions.items():
        if config[option] == value:
            warnings.warn(f"{option}={value}: {what}.", PetuneWarning, stacklevel=6)


def _key(module: str, theirs: str) -> str:
    """The name of a tensor in a folder, by its module's and by its own inside; `/` is the model as a whole."""
    if theirs.startswith("/"):
        return OUTER + theirs.removeprefix("/")
    return f"{PREFIX}{module}.{theirs}"


def _listed(part: Part, twin: PeftTwin, links: list[Link]) -> set[str]:
    """The sites whose roles the arguments in `PeftTwin.roles` list."""
    roles = listed_roles(part, twin)
    return {link.site.name for link in links if link.site.role in roles}


def _own_links(tuning: Tuning, part: Part) -> list[Link]:
    return [link for link in adapter_links(tuning) if link.method == part.name]


def adapter_links(tuning: Tuning) -> list[Link]:
    """Where the methods themselves act: all links but those of modules that are trained whole, such as a head."""
    return [link for link in tuning.links if link.site.kind != "module"]


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: t.detach().cpu().contiguous() for key, t in tensors.items()}


def _check_layers(links: list[Link], part: Part, twin: PeftTwin) -> None:
    """See that every site is a layer, to which PEFT's names belong.

    Raises:
        UnsupportedError: one is a parameter that holds the weights of all experts, which PEFT's method can't adapt.
    """
    for site in _stacked(links):
        if not twin.stacked:
            raise UnsupportedError(
                f"{site.name}: PEFT's format has no layer for stacked experts; {instead([part])}."
            )


def _stacked(links: Iterable[Link]) -> list[Site]:
    """The sites that are stacked experts."""
    return [link.site for link in links if link.site.kind == "experts"]


def _parameters(
    stacked: Iterable[Site], twin: PeftTwin, config: Mapping[str, Any]
) -> dict[str, Any]:
    """The option that lists the parameters of stacked experts, with which PEFT takes no dropout."""
    names = [site.name for site in stacked]
    if not names:
        return {}
    if config.get("lora_dropout"):
        what = f"PEFT's {twin.stacked} goes without the dropout of {config['lora_dropout']}"
        warnings.warn(
            f"{what}, which further training had.", PetuneWarning, stacklevel=6
        )
    return {twin.stacked: names, "lora_dropout": 0.0}


def _beside(tuning: Tuning, part: Part, twin: PeftTwin, adapted: set[str]) -> Described:
    """What a method comes to as an option of another one's.

    Args:
        adapted: the modules that the other one acts on, around which PEFT puts a layer of its own.
    """
    links = [link for link in adapter_links(tuning) if link.method == part.name]
    if twin.tables:
        check_reached(tuning.model, [link.site for link in links])
    plain = {link.site.name: dict(link.adapter.plain()) for link in links}
    found = _site_tensors(tuning.model, links, plain, twin, set())
    tensors = {}
    for (module, theirs), tensor in found.items():
        around = BASE_LAYER if module in adapted else "."
        inside = BESIDE.get(twin.beside, around)
        tensors[f"{PREFIX}{module}{inside}{theirs}"] = tensor
    options_of(part, twin, beside=True)  # which refuses what has no place there
    if not twin.tables:
        return tensors, {twin.beside: "all"}
    modules = [module for module, _ in found]
    return tensors, {twin.beside: token_option(tuning.model, links, modules)}


def _general_options(tuning: Tuning, twin: PeftTwin) -> dict[str, Any]:
    """What PEFT's configuration says besides the arguments of the method."""
    options = {
        "peft_type": twin.kind,
        "task_type": task_of(tuning, twin),
        "inference_mode": True,
        "base_model_name_or_path": getattr(tuning.model.config, "name_or_path", None),
    }
    return (
        options
        | {key: allowed[0] for key, allowed in twin.neutral.items()}
        | {**twin.training}
    )


def _head_tensors(tuning: Tuning, twin: PeftTwin) -> dict[str, Tensor]:
    """The tensors of the modules that were trained whole, under PEFT's names. Tied ones share no memory, or safetensors
    would not take them.
    """
    prefix = OUTER if twin.whole else PREFIX
    return {
        f"{prefix}{link.site.name}.{key.removeprefix('module.')}": tensor.clone()
        for link in tuning.links
        if link.site.kind == "module"
        for key, tensor in link.adapter.state_dict().items()
    }


def _untrained_heads(
    tuning: Tuning, twin: PeftTwin, task: str | None
) -> dict[str, Tensor]:
    """The base's own tensors of the heads that PEFT expects in a folder for this task, trained or not. Those that were
    trained come instead of them.
    """
    ends = TASK_HEADS.get(task or "", ())
    prefix = OUTER if twin.whole else PREFIX
    heads = {f"{name}." for name, _ in walk(tuning.model) if name.endswith(ends)}
    return {
        f"{prefix}{key}": tensor.detach().cpu().clone()
        for key, tensor in Base(tuning.model).parameters.items()
        if ends and key.startswith(tuple(heads))
    }


def _site_tensors(
    model: PreTrainedModel,
    links: list[Link],
    plain: TensorsBySite,
    twin: PeftTwin,
    listed: set[str],
) -> dict[tuple[str, str], Tensor]:
    """The method's tensors by (module, PEFT's name inside it). One that several sites share comes once."""
    found, seen = {}, set()
    layers = wrapped_names(_stacked(links))
    for link in links:
        site, own = link.site, plain[link.site.name]
        around = Surroundings(site, site.name in listed, own)
        module = layers.get(site.name) or _module_of(model, site, twin)
        for name, tensor in own.items():
            if id(tensor) not in seen:
                seen.add(id(tensor))
                theirs = twin.name_of(name, site.kind)
                found[module, theirs] = _laid_out(
                    tensor, twin.layouts.get(name), around
                )
    return found


def _module_of(model: PreTrainedModel, site: Site, twin: PeftTwin) -> str:
    """The module whose layer of PEFT's holds the site's tensors: what PEFT's option trains of an embedding, it keeps
    at the input embedding, of which a model may have several modules.
    """
    one_for_all = site.kind == "embedding" and not twin.embedding
    return input_embedding(model) if one_for_all else site.name


def _laid_out(ours: Tensor, layout: str | None, around: Surroundings) -> Tensor:
    tensor = ours.detach().cpu()
    return tensor if layout is None else LAYOUTS[layout].write(tensor, around)
