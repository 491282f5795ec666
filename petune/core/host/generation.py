"""What of `generate` only its private methods let others take part in."""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager, nullcontext
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
        "self._get_logits_processor(" in made
        and _parameters("_get_logits_processor")[0] == "self"
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


NAMES = (
    "_maybe_prepare_encoder_kwargs_for_generation",  # since 5.18
    "_prepare_encoder_decoder_kwargs_for_generation",
)
"""What `generate` runs an encoder with, by the version of transformers."""
ENCODE = next((name for name in NAMES if hasattr(GenerationMixin, name)), NAMES[0])


@SEAMS.lean(
    "transformers",
    f"GenerationMixin.{NAMES[0]} (before 5.18 {NAMES[1]})",
    since="4.30",
    why="run the encoder as part of `generate`, with its adapters",
)
def _encoder_runs_there() -> bool:
    called = f"self.{ENCODE}(" in inspect.getsource(GenerationMixin.generate)
    return called and _parameters(ENCODE)[:3] == [
        "self",
        "inputs_tensor",
        "model_kwargs",
    ]


class Generating:
    """A mixin of a model class: what petune does within `generate`, under names of its own."""

    def as_the_user_counts(self, config: Any, made: dict[str, Any]) -> Any:
        """The generation's configuration for processors and criteria; `made` is what else they are made from."""
        return config

    def seen_by_processors(self, processors: Any) -> Any:
        """What takes the place of the list of logits processors."""
        return processors

    def seen_by_criteria(self, criteria: Any) -> Any:
        """What takes the place of the list of stopping criteria."""
        return criteria

    def around_the_encoder(
        self, inputs: Tensor, arguments: dict[str, Any]
    ) -> AbstractContextManager[None]:
        """What stands around the encoder's run, if there is an encoder."""
        return nullcontext()

    def _get_logits_processor(
        self, generation_config: Any, *args: Any, **kwargs: Any
    ) -> Any:
        make = super()._get_logits_processor  # type: ignore[misc]
        kwargs.update(zip(_parameters("_get_logits_processor")[2:], args, strict=False))
        config = self.as_the_user_counts(generation_config, kwargs)
        return self.seen_by_processors(make(config, **kwargs))

    def _get_stopping_criteria(
        self, generation_config: Any, *args: Any, **kwargs: Any
    ) -> Any:
        make = super()._get_stopping_criteria  # type: ignore[misc]
        config = self.as_the_user_counts(generation_config, {})
        return self.seen_by_criteria(make(config, *args, **kwargs))


def _encode(
    self: Any,
    inputs_tensor: Tensor,
    model_kwargs: dict[str, Any],
    *rest: Any,
    **others: Any,
) -> Any:
    encode = getattr(super(Generating, self), ENCODE)
    if not self.config.is_encoder_decoder:
        return encode(inputs_tensor, model_kwargs, *rest, **others)
    with self.around_the_encoder(inputs_tensor, model_kwargs):
        return encode(inputs_tensor, model_kwargs, *rest, **others)


setattr(Generating, ENCODE, _encode)
