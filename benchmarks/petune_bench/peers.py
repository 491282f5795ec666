"""PEFT's own adapters in petune's training loop: the same rows, steps, targets and sizes, another implementation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from petune.core.frozen.site import Site
from petune.core.frozen.where import select
from petune.core.method.arguments import arguments
from petune.core.method.twin import PeftTwin
from petune.core.registry.plugins import registry
from petune.core.registry.sites import find_sites
from petune.errors import UnsupportedError
from petune.training.recipe import Recipe

TASK_TYPES = {
    "classification": "SEQ_CLS",
    "generation": "CAUSAL_LM",
    "language-modeling": "CAUSAL_LM",
    "question-answering": "QUESTION_ANS",
    "seq2seq": "SEQ_2_SEQ_LM",
    "tagging": "TOKEN_CLS",
}


class PeftTuning:
    """What `train` asks of an adapted model: the model to call, what trains, and how to save it."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def parameters(self) -> Iterable[nn.Parameter]:
        """What trains, PEFT's copy of the classifier included."""
        return (p for p in self.model.parameters() if p.requires_grad)

    def save(self, folder: str | Path) -> None:
        """PEFT's own format. The embeddings never change here; to find that out PEFT would ask the Hub."""
        self.model.save_pretrained(str(folder), save_embedding_layers=False)


def adapt(model: Any, recipe: Recipe) -> PeftTuning:
    """Put PEFT's form of the recipe's method on the model.

    Raises:
        UnsupportedError: PEFT has no such method, no such argument of it, or leaves its schedule to the loop.
    """
    import peft

    if not isinstance(recipe.method, str) or isinstance(recipe.where, dict):
        raise UnsupportedError(
            f"PEFT has no several methods in one: {', '.join(recipe.method)}."
        )
    config = configure(model, recipe.method, recipe.where, recipe.method_args)
    if getattr(config, "total_step", None):
        raise UnsupportedError(
            f"PEFT leaves the schedule of {recipe.method!r} to a training loop that knows it."
        )
    config.task_type = TASK_TYPES.get(recipe.task)
    if not config.is_prompt_learning:
        config.modules_to_save = list(getattr(model, "petune_fresh", ())) or None
    return PeftTuning(peft.get_peft_model(model, config))


def configure(
    model: Any, method: str, where: str | None, given: Mapping[str, Any]
) -> Any:
    """PEFT's configuration of what petune's method is with these arguments, at the same modules.

    Raises:
        UnsupportedError: PEFT has no such method, or no such argument of it.
    """
    import peft

    cls = registry().get("petune_methods", method)
    twin = vars(cls).get("peft")
    if twin is None:
        raise UnsupportedError(f"PEFT has no {method!r}.")
    known = {name: p.default for name, p in arguments(cls).items()}
    ours = {**known, **given}
    if missing := given.keys() - {*twin.arguments.values(), *twin.roles.values()}:
        raise UnsupportedError(f"PEFT's {method!r} has no {min(missing)!r}.")
    sites = select(find_sites(model), where or cls.where, strict=False)
    options = {**_values(twin, ours), **_modules(twin, ours, sites)}
    return peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(twin.kind)](**options)


def _values(twin: PeftTwin, ours: Mapping[str, Any]) -> dict[str, Any]:
    """PEFT's options that have a value of petune's, or one that changes nothing."""
    neutral = {key: allowed[0] for key, allowed in twin.neutral.items()}
    carried = {theirs: ours[name] for theirs, name in twin.arguments.items()}
    return {**neutral, **twin.training, **carried}


def _modules(
    twin: PeftTwin, ours: Mapping[str, Any], sites: Iterable[Site]
) -> dict[str, list[str]]:
    """PEFT's options that name modules; embeddings and prompts it finds itself."""
    found = {}
    if all(site.kind in ("linear", "block") for site in sites):
        found["target_modules"] = [site.name for site in sites]
    for theirs, name in twin.roles.items():
        roles = ours[name].split()
        found[theirs] = [site.name for site in sites if site.role in roles]
    return found
