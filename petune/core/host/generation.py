"""What of `generate` only its private methods let others take part in."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor
from transformers import GenerationMixin

from petune.core.host.seam import Seams

SEAMS = Seams()


def _parameters(name: str) -> list[str]:
    return list(inspect.signature(getattr(GenerationMixin, name)).parameters)


@SEAMS.lean(
    "transformers",
    "GenerationMixin._get_logits_processor",
    since="4.12",
    why="keep virtual tokens from the logits processors of `generate`",
)
def _processors_are_made_there() -> bool:
    made = inspect.getsource(GenerationMixin.generate)
    return (
        "self._get_logits_processor(" in made and _parameters("_get_logits_processor")[0] == "self"
    )


@SEAMS.lean(
    "transformers",
    "GenerationMixin._get_stopping_criteria",
    since="4.12",
    why="keep virtual tokens from the stopping criteria of `generate`",
)
def _criteria_are_made_there() -> bool:
    made = inspect.getsource(GenerationMixin.generate)
    return "self._get_stopping_criteria(" in made


@SEAMS.lean(
    "transformers",
    "GenerationMixin._maybe_prepare_encoder_kwargs_for_generation",
    since="5.0",
    why="see the prompts' mask and the encoder's input before `generate` runs anything",
)
def _encoder_runs_there() -> bool:
    made = inspect.getsource(GenerationMixin.generate)
    called = "self._maybe_prepare_encoder_kwargs_for_generation(" in made
    known = ["self", "inputs_tensor", "model_kwargs"]
    return called and _parameters("_maybe_prepare_encoder_kwargs_for_generation")[:3] == known


class Generating:
    """A mixin of a model class: what petune does within `generate`, under names of its own."""

    def seen_by_processors(self, processors: Any) -> Any:
        """What takes the place of the list of logits processors."""
        return processors

    def seen_by_criteria(self, criteria: Any) -> Any:
        """What takes the place of the list of stopping criteria."""
        return criteria

    def before_the_first_forward(self, inputs: Tensor, arguments: dict[str, Any]) -> None:
        """Called with what the first forward gets, before any part of the model runs."""

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> Any:
        return self.seen_by_processors(super()._get_logits_processor(*args, **kwargs))  # type: ignore[misc]

    def _get_stopping_criteria(self, *args: Any, **kwargs: Any) -> Any:
        return self.seen_by_criteria(super()._get_stopping_criteria(*args, **kwargs))  # type: ignore[misc]

    def _maybe_prepare_encoder_kwargs_for_generation(
        self, inputs_tensor: Tensor, model_kwargs: dict[str, Any], *rest: Any, **others: Any
    ) -> Any:
        self.before_the_first_forward(inputs_tensor, model_kwargs)
        prepare = super()._maybe_prepare_encoder_kwargs_for_generation  # type: ignore[misc]
        return prepare(inputs_tensor, model_kwargs, *rest, **others)
