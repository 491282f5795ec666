"""What it cost to store merged weights."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Merged:
    """What it cost to store the merged weights W as W': rounding, or quantizing them again.

    Args:
        errors: |W' - W| / |W| by layer, in the Frobenius norm.
        losses: the same relative to what the tuning had changed, |W' - W| / |W - W_0|: near 1 and above, little of the
            tuning is left.
    """

    errors: dict[str, float] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, before: Tensor, wanted: Tensor, stored: Tensor) -> None:
        """Note the cost of one layer, of weights in float32."""
        error = float((stored - wanted).norm())
        self.errors[name] = _ratio(error, float(wanted.norm()))
        self.losses[name] = _ratio(error, float((wanted - before).norm()))

    @property
    def loss(self) -> float:
        """The mean of the losses: near 1 and above, little of the tuning is left."""
        return _mean(self.losses) if self.losses else 0.0

    def __str__(self) -> str:
        if not self.errors:
            return "no linear layer was written"
        worst = max(self.errors, key=self.errors.__getitem__)
        error = _mean(self.errors)
        most = f"worst {self.errors[worst]:.2g}, {worst}"
        lost = f"{self.loss:.2g} of what the tuning changes"
        return f"{len(self.errors)} layers: relative error {error:.2g} ({most}), {lost}"


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _mean(values: dict[str, float]) -> float:
    return sum(values.values()) / len(values)
