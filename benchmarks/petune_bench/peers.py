"""PEFT's own adapters in petune's training loop: the same rows, steps, targets and sizes, another implementation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
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
    if twin is None or not twin.kind:
        raise UnsupportedError(f"PEFT has no {method!r}.")
    if missing := given.keys() - {*twin.arguments.values(), *twin.roles.values()}:
        raise UnsupportedError(f"PEFT's {method!r} has no {min(missing)!r}.")
    defaults = {name: p.default for name, p in arguments(cls).items()}
    sites = select(find_sites(model), where or cls.where, strict=False)
    options = _options(twin, {**defaults, **given}, sites)
    made = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(twin.kind)]
    return made(**options)


def _options(
    twin: PeftTwin, ours: Mapping[str, Any], sites: Sequence[Site]
) -> dict[str, Any]:
    """The options of PEFT's configuration, from all arguments of ours. PEFT finds embeddings and prompts itself."""
    options = {key: allowed[0] for key, allowed in twin.neutral.items()}
    options |= twin.training
    options |= {theirs: ours[name] for theirs, name in twin.arguments.items()}
    if all(site.kind in ("linear", "block") for site in sites):
        options["target_modules"] = [site.name for site in sites]
    for theirs, name in twin.roles.items():
        roles = ours[name].split()
        options[theirs] = [site.name for site in sites if site.role in roles]
    return options
