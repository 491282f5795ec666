"""One method, or several as one, on one family of models at one precision, and what its checks compare."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from petune.core.attached.attach import attach
from petune.core.attached.parts import parts
from petune.core.attached.tuning import Tuning, tunings
from petune.core.method.adapter import Unfreeze
from petune.core.registry.methods import Method
from petune.testing.models import DTYPES, FAMILIES, tiny_batch, tiny_model

# how far apart, of the largest value, two ways to compute the same may be
ROUNDING = {"fp32": 1e-5, "bf16": 5e-2, "fp16": 1e-2}


@dataclass
class Case:
    """One method on one family of models at one precision; a list of methods is one tuning."""

    method: str | Method | Sequence[str | Method]
    family: str
    precision: str
    arguments: dict[str, Any] = field(default_factory=dict)
    device: str = "cpu"

    @property
    def classes(self) -> list[Method]:
        return [part.cls for part in parts(self.method, self.arguments)]

    @property
    def mergeable(self) -> bool:
        return all(cls.mergeable for cls in self.classes)

    @property
    def starts_at_base(self) -> bool:
        return all(getattr(cls, "starts_at_base", True) for cls in self.classes)

    @property
    def trains_the_base(self) -> bool:
        return any(issubclass(cls, Unfreeze) for cls in self.classes)

    @property
    def generates(self) -> bool:
        return FAMILIES[self.family].head != "sequence-classification"

    @property
    def quantized(self) -> bool:
        return self.precision not in DTYPES

    @property
    def batch(self) -> dict[str, Tensor]:
        return self.rows(2)

    def rows(self, count: int) -> dict[str, Tensor]:
        return {
            k: v.to(self.device) for k, v in tiny_batch(self.family, rows=count).items()
        }

    def base(self, layers: int = 2) -> Any:
        """A model of its own. With two blocks, so that what a behaviour does to one of several shows."""
        return tiny_model(
            self.family, self.precision, layers=layers, device=self.device
        )

    def attach(
        self, model: Any, name: str = "default", *, change: bool = True
    ) -> Tuning:
        """The method on a model, its parameters moved off their start, so that it acts."""
        with torch.random.fork_rng():
            torch.manual_seed(len(tunings(model)))
            tuning = attach(model, self.method, name=name, **self.arguments)
            if change:
                _move(tuning)
        return tuning

    def tuned(self, layers: int = 2) -> tuple[Any, Tuning]:
        """(a model, the method on it)."""
        model = self.base(layers)
        return model, self.attach(model)

    def close(self, one: Tensor, other: Tensor, what: str, factor: float = 1.0) -> None:
        """Assert that two ways to compute the same agree but for rounding, as a share of the largest value.

        Args:
            what: what the error says.
            factor: how many times the rounding of one forward is allowed.
        """
        worst = float((one.float() - other.float()).abs().max())
        largest = max(1.0, float(other.float().abs().max()))
        rounding = ROUNDING.get(self.precision, ROUNDING["fp32"])
        limit = rounding * factor * largest
        assert worst <= limit, f"{what}: {worst:.1e} apart, at most {limit:.1e} allowed"


@torch.no_grad()
def _move(tuning: Tuning) -> None:
    """Add noise to all that trains: to matrices in the size of what is there."""
    for parameter in tuning.parameters():
        noise = torch.randn_like(parameter) * 0.1
        if parameter.dim() > 1:
            noise *= parameter.std(correction=0).clamp(min=0.2)
        parameter.add_(noise)


@torch.no_grad()
def logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """The logits at the tokens that are not padding; all of an encoder-decoder's and of a classifier's."""
    out = forward(model, batch)
    if out.dim() == 3 and not model.config.is_encoder_decoder:
        return out[batch["attention_mask"].bool()]
    return out


def forward(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """The model's logits. Labels are left out, but for an encoder-decoder, which reads its decoder's input there."""
    if model.config.is_encoder_decoder:
        return model(**batch).logits
    return model(**{k: v for k, v in batch.items() if k != "labels"}).logits
