"""PEFT's folder format, both ways. What a method has in common with one of PEFT's is stated as data: a `PeftTwin`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from petune.adapter import PeftTwin, arguments
from petune.discovery import find_sites, walk
from petune.errors import PetuneError, UnsupportedError
from petune.files import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from petune.tuning import Method, Tuning

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


def export(tuning: Tuning) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, configuration) as PEFT would have written them.

    Raises:
        UnsupportedError: PEFT has no such method, or no such place to put it.
    """
    twin = _twin(tuning)
    config: dict[str, Any] = {"peft_type": twin.kind, "task_type": _task(tuning.model), "inference_mode": True}
    config["base_model_name_or_path"] = getattr(tuning.model.config, "name_or_path", None)
    config |= {key: allowed[0] for key, allowed in twin.neutral.items()}
    config |= _arguments(tuning, twin)
    own = [link for link in tuning.links if link.site.kind != "module"]
    if any(link.site.part is not None for link in own):
        raise UnsupportedError(f"{tuning.method!r} acts on parts of a fused projection here, which PEFT can't.")
    config["target_modules"] = _short(tuning.model, {link.site.name for link in own})
    listed = {link.site.name for link in own if link.site.role in _roles(tuning, twin)}
    config |= dict.fromkeys(twin.roles, _short(tuning.model, listed))
    config["modules_to_save"] = list(tuning.heads) or None
    tensors = {}
    for key, tensor in tuning.state():
        site, _, name = key.rpartition(".")
        if name in twin.tensors and site in tuning.adapters:
            shape = ((1, -1) if site in listed else (-1, 1)) if twin.vectors else tensor.shape
            tensors[f"{PREFIX}{site}.{twin.tensors[name]}"] = tensor.detach().cpu().reshape(shape).contiguous()
        else:  # a head: `classifier.module.weight`
            tensors[PREFIX + key.replace(".module.", ".")] = tensor.detach().cpu().contiguous()
    return tensors, config


def load(model: PreTrainedModel, folder: Path, name: str) -> Tuning:
    """Attach what PEFT has saved.

    Raises:
        PetuneError: no method here is that of the folder, or it does not fit the model; the model stays as it was.
    """
    from petune.storage import fill, read_tensors
    from petune.tuning import attach

    config = read_json(folder / CONFIG)
    method, twin = _method(config, folder)
    tensors = {k.removeprefix(PREFIX): v for k, v in read_tensors(folder / WEIGHTS).items()}
    ours = {theirs: our for our, theirs in twin.tensors.items()}
    modules: dict[str, str] = {}
    for key in tensors:
        for theirs, our in ours.items():
            if key.endswith("." + theirs):
                modules[key] = f"{key.removesuffix('.' + theirs)}.{our}"
    # PEFT lists the names that a head of the task might have
    heads = [h for h in config.get("modules_to_save") or () if any(k.startswith(h + ".") for k in tensors)]
    given = {our: config[theirs] for theirs, our in twin.arguments.items() if config.get(theirs) is not None}
    names = dict.fromkeys(site.rpartition(".")[0] for site in modules.values())
    role = {site.name: site.role for site in find_sites(model)}
    for theirs, our in twin.roles.items():
        ends = tuple(config.get(theirs) or ())
        given[our] = " ".join(sorted({role[n] for n in names if n in role and f".{n}".endswith(ends)}))
    tuning = attach(model, method, name=name, where=" ".join(names) or None, train=heads, **given)
    found = {}
    try:
        for key, tensor in tensors.items():
            if key in modules and twin.vectors:
                flat = role[modules[key].rpartition(".")[0]] in _roles(tuning, twin)
                if tensor.shape[int(flat)] != tensor.numel():
                    raise UnsupportedError(f"{folder}: {key} acts on the other side of a layer of that role here.")
                tensor = tensor.flatten()
            found[modules.get(key) or ".module.".join(key.rsplit(".", 1))] = tensor
        fill(tuning, found, folder)
    except PetuneError:
        tuning.detach()
        raise
    return tuning


def _roles(tuning: Tuning, twin: PeftTwin) -> set[str]:
    """The roles that the arguments in `twin.roles` list."""
    from petune.tuning import resolve

    known = arguments(resolve(tuning.method)[1])
    return {r for our in twin.roles.values() for r in tuning.arguments.get(our, known[our].default).split()}


def _arguments(tuning: Tuning, twin: PeftTwin) -> dict[str, Any]:
    from petune.tuning import resolve

    defaults = {key: p.default for key, p in arguments(resolve(tuning.method)[1]).items()}
    for key, value in tuning.arguments.items():
        if key not in {*twin.arguments.values(), *twin.roles.values()} and value != defaults[key]:
            raise UnsupportedError(f"{tuning.method!r} with {key}={value!r} has no place in PEFT's format; merge it.")
    return {theirs: tuning.arguments.get(ours, defaults[ours]) for theirs, ours in twin.arguments.items()}


def _twin(tuning: Tuning) -> PeftTwin:
    from petune.tuning import resolve

    twin = vars(resolve(tuning.method)[1]).get("peft")  # its own: a subclass is another method
    if not isinstance(twin, PeftTwin):
        raise UnsupportedError(f"PEFT's format has no {tuning.method!r}; save without format=, or merge.")
    return twin


def _method(config: Mapping[str, Any], folder: Path) -> tuple[str, PeftTwin]:
    from petune.tuning import methods

    kind = config.get("peft_type")
    known: dict[str, Method] = methods()
    found = {name: vars(cls).get("peft") for name, cls in known.items()}
    twins = {name: twin for name, twin in found.items() if isinstance(twin, PeftTwin)}
    refused = ""
    for name, twin in twins.items():
        if twin.kind == kind:
            other = next((k for k, allowed in twin.neutral.items() if config.get(k, allowed[0]) not in allowed), None)
            if other is None:
                return name, twin
            refused = f" with {other}={config[other]!r}"
    have = ", ".join(sorted({twin.kind for twin in twins.values()}))
    raise UnsupportedError(f"{folder / CONFIG}: no method here is PEFT's {kind}{refused}. Known: {have}.")


def _task(model: PreTrainedModel) -> str | None:
    cls = getattr(type(model), "petune_base", type(model)).__name__
    return next((task for end, task in TASKS.items() if cls.endswith(end)), None)


def _short(model: PreTrainedModel, names: set[str]) -> list[str]:
    """The last parts of the names where they mean the same modules, as serving engines expect; else whole names."""
    ends = {name.rpartition(".")[2] for name in names}
    meant = {name for name, _ in walk(model) if name.rpartition(".")[2] in ends}
    return sorted(ends if meant == names else names)
