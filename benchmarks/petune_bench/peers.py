"""PEFT's own adapters in petune's training loop: the same rows, steps, targets and sizes, another implementation."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch import nn

from petune.adapter import arguments
from petune.errors import UnsupportedError
from petune.plugins import registry
from petune.site import ALL_LINEAR, select
from petune.tune.recipe import Recipe

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
        UnsupportedError: PEFT has no such method, or this harness no mapping to it.
    """
    import peft

    make = CONFIGS.get(recipe.method) if isinstance(recipe.method, str) else None
    if make is None or not isinstance(recipe.method, str) or isinstance(recipe.where, dict):
        raise UnsupportedError(f"no mapping of {recipe.method!r} to PEFT; there is one for {', '.join(CONFIGS)}.")
    own = registry().get("petune_methods", recipe.method)
    defaults = {name: p.default for name, p in arguments(own).items()}
    config = make({**defaults, **recipe.method_args}, _Targets(model, recipe.where))
    config.task_type = TASK_TYPES.get(recipe.task)
    if not config.is_prompt_learning:
        config.modules_to_save = list(getattr(model, "petune_fresh", ())) or None
    return PeftTuning(peft.get_peft_model(model, config))


class _Targets:
    """The names of the layers that petune's own method would act on."""

    def __init__(self, model: Any, where: str | None) -> None:
        self.model, self.where = model, where

    def __call__(self, roles: str) -> list[str]:
        import petune

        return [site.name for site in select(petune.sites(self.model), self.where or roles, strict=False)]


def _lora(args: dict[str, Any], targets: _Targets) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=args["rank"], lora_alpha=args["alpha"], lora_dropout=args["dropout"], target_modules=targets(ALL_LINEAR)
    )


def _ia3(args: dict[str, Any], targets: _Targets) -> Any:
    from peft import IA3Config

    return IA3Config(target_modules=targets("k v down"), feedforward_modules=targets("down"))


def _prompt(args: dict[str, Any], targets: _Targets) -> Any:
    from peft import PromptTuningConfig

    return PromptTuningConfig(num_virtual_tokens=args["length"])


def _prefix(args: dict[str, Any], targets: _Targets) -> Any:
    from peft import PrefixTuningConfig

    return PrefixTuningConfig(num_virtual_tokens=args["length"])


CONFIGS: dict[str, Callable[[dict[str, Any], _Targets], Any]] = {
    "lora": _lora,
    "ia3": _ia3,
    "prompt-tuning": _prompt,
    "prefix-tuning": _prefix,
}
"""From the method's arguments to PEFT's configuration."""
