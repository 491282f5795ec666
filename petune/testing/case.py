"""One method, or several as one, on one family of models at one precision, and what its checks compare."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import petune
from petune.core.attached.parts import parts
from petune.core.attached.tuning import Tuning
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
        return FAMILIES[self.family][2] != "sequence-classification"

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

    def base(self, **options: Any) -> Any:
        """A model of its own, of two blocks: what a behaviour does to one of several shows."""
        return tiny_model(
            self.family, self.precision, device=self.device, **{"layers": 2, **options}
        )

    def attach(
        self, model: Any, name: str = "default", *, change: bool = True
    ) -> Tuning:
        """The method on a model, its parameters moved off their start, so that it acts."""
        with torch.random.fork_rng():
            torch.manual_seed(len(petune.tunings(model)))
            tuning = petune.attach(model, self.method, name=name, **self.arguments)
            with torch.no_grad():
                for p in tuning.parameters() if change else []:
                    p.add_(
                        torch.randn_like(p)
                        * 0.1
                        * (1 if p.dim() < 2 else p.std(correction=0).clamp(min=0.2))
                    )
        return tuning

    def tuned(self, **options: Any) -> tuple[Any, Tuning]:
        model = self.base(**options)
        return model, self.attach(model)

    def close(self, one: Tensor, other: Tensor, what: str, factor: float = 1.0) -> None:
        worst = float((one.float() - other.float()).abs().max())
        limit = (
            ROUNDING.get(self.precision, ROUNDING["fp32"])
            * factor
            * max(1.0, float(other.float().abs().max()))
        )
        assert worst <= limit, f"{what}: {worst:.1e} apart, at most {limit:.1e} allowed"


@torch.no_grad()
def logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """The logits at the tokens that are not padding."""
    decoder = model.config.is_encoder_decoder
    out: Tensor = model(
        **{k: v for k, v in batch.items() if k != "labels" or decoder}
    ).logits
    return (
        out[batch["attention_mask"].bool()] if out.dim() == 3 and not decoder else out
    )
