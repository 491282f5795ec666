"""A tuning as PEFT would have saved it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from petune.errors import UnsupportedError
from petune.formats.choice import twin_of
from petune.formats.layouts import LAYOUTS, Surroundings
from petune.formats.names import OUTER, PREFIX, input_embedding, short_names
from petune.formats.options import check_same, listed_roles, options_of, ranks_of
from petune.formats.whole import WHOLES

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from petune.core.attached.tuning import Tuning
    from petune.core.forward.link import Link
    from petune.core.method.twin import PeftTwin
    from petune.formats.layouts import TensorsBySite

TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
"""How the name of a model's class ends -> PEFT's name of the task."""


def export(tuning: Tuning) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, configuration) as PEFT would have written them.

    Raises:
        UnsupportedError: PEFT has no such method, or can't put it where it acts here.
    """
    if tuning.weight != 1:
        raise UnsupportedError(
            f"PEFT's format has no place for a weight of {tuning.weight}; save without format=."
        )
    twin = twin_of(tuning)
    if any(link.site.part is not None for link in adapter_links(tuning)):
        raise UnsupportedError(
            f"{tuning.method!r} acts on parts of a fused projection here, which PEFT can't; "
            'format="serving" can write some for the whole.'
        )
    return describe(tuning, twin)


def describe(
    tuning: Tuning, twin: PeftTwin
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, configuration) in PEFT's names. Where the tuning has a weight or acts on slices of a fused projection
    PEFT would not read it: the slices go under the names of their sites, the weight is left out.
    """
    links = adapter_links(tuning)
    plain = {link.site.name: dict(link.adapter.plain()) for link in links}
    config = _general_options(tuning, twin) | options_of(tuning, twin)
    check_same(links, twin, config)
    config |= ranks_of(links, plain, twin, config)
    config["modules_to_save"] = list(tuning.heads) or None
    tensors = _head_tensors(tuning, twin)
    if twin.whole:
        sites = [link.site for link in links]
        tensors["prompt_embeddings"] = WHOLES[twin.whole].write(
            tuning.model, plain, sites
        )
    else:
        roles = listed_roles(tuning, twin)
        listed = {link.site.name for link in links if link.site.role in roles}
        found = _site_tensors(tuning.model, links, plain, twin, listed)
        tensors |= {
            f"{PREFIX}{module}.{theirs}": t for (module, theirs), t in found.items()
        }
        config |= dict.fromkeys(twin.roles, short_names(tuning.model, listed))
        config["target_modules"] = short_names(
            tuning.model, {module for module, _ in found}
        )
    return {key: t.detach().cpu().contiguous() for key, t in tensors.items()}, config


def adapter_links(tuning: Tuning) -> list[Link]:
    """Where the method itself acts: all links but those of modules that are trained whole, such as a head."""
    return [link for link in tuning.links if link.site.kind != "module"]


def _general_options(tuning: Tuning, twin: PeftTwin) -> dict[str, Any]:
    """What PEFT's configuration says besides the arguments of the method."""
    options = {
        "peft_type": twin.kind,
        "task_type": _task_of(tuning.model),
        "inference_mode": True,
        "base_model_name_or_path": getattr(tuning.model.config, "name_or_path", None),
    }
    return (
        options
        | {key: allowed[0] for key, allowed in twin.neutral.items()}
        | {**twin.training}
    )


def _task_of(model: PreTrainedModel) -> str | None:
    cls = getattr(type(model), "petune_base", type(model)).__name__
    return next((task for end, task in TASKS.items() if cls.endswith(end)), None)


def _head_tensors(tuning: Tuning, twin: PeftTwin) -> dict[str, Tensor]:
    """The tensors of the modules that were trained whole, under PEFT's names."""
    prefix = OUTER if twin.whole else PREFIX
    found = {}
    for link in tuning.links:
        if link.site.kind == "module":
            for key, tensor in link.adapter.state_dict().items():
                found[f"{prefix}{link.site.name}.{key.removeprefix('module.')}"] = (
                    tensor
                )
    return found


def _site_tensors(
    model: PreTrainedModel,
    links: list[Link],
    plain: TensorsBySite,
    twin: PeftTwin,
    listed: set[str],
) -> dict[tuple[str, str], Tensor]:
    """The method's tensors by (module, PEFT's name inside it). One that several sites share comes once."""
    found, seen = {}, set()
    for link in links:
        site, own = link.site, plain[link.site.name]
        if site.kind == "experts":
            raise UnsupportedError(
                f"{site.name} is one parameter for all experts, which PEFT's format has no layer for; "
                "save without format=, or merge."
            )
        around = Surroundings(site, site.name in listed, own)
        module = input_embedding(model) if site.kind == "embedding" else site.name
        for name, tensor in own.items():
            if id(tensor) not in seen:
                seen.add(id(tensor))
                theirs = name if twin.tensors is None else twin.tensors[name]
                found[module, theirs] = _laid_out(
                    tensor, twin.layouts.get(name), around
                )
    return found


def _laid_out(ours: Tensor, layout: str | None, around: Surroundings) -> Tensor:
    tensor = ours.detach().cpu()
    return tensor if layout is None else LAYOUTS[layout].write(tensor, around)
