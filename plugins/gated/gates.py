from typing import Any

import torch
from torch import Tensor, nn

import petune
from petune_plugins.bottleneck.pfeiffer import Pfeiffer
from petune_plugins.lowrank.lora import LoRA
from petune_plugins.prefix.prefix_tuning import PrefixTuning


class Gated(petune.Adapter):
    """y + g * (adapter(inner, x) - y) with y = inner(x) and g = sigmoid(w x + b)   (Mao et al. 2021, arXiv:2110.07577).

    A gate for each token, so that cached generation is as uncached; UniPELT has one for each row, from the mean.
    """

    def __init__(self, site: petune.Site, **arguments: Any) -> None:
        super().__init__(site, **arguments)
        self.gate = nn.Linear(site.in_features, 1)

    def forward(self, inner: petune.Inner, x: Tensor, *rest: Any) -> Tensor:
        y, again = petune.once(inner, x, *rest)
        adapted = super().forward(again, x, *rest)
        gate = self.gate(self.seen(x)).sigmoid().to(y.dtype)  # (batch, length, 1)
        return torch.lerp(y, adapted, gate.view(*gate.shape[:2], *[1] * (y.dim() - 2)))

    def seen(self, x: Tensor) -> Tensor:
        """What the gate reads, (batch, length, width)."""
        return x


class GatedLoRA(Gated, LoRA):  # type: ignore[misc]
    """W x + g * s B A x, g = sigmoid(w x + b)   (Mao et al. 2021, arXiv:2110.07577)."""

    also, mergeable = "", False


class GatedPfeiffer(Gated, Pfeiffer):  # type: ignore[misc]
    """h + g * U gelu(D h) behind the MLP, g = sigmoid(w x + b)   (Mao et al. 2021, arXiv:2110.07577)."""


class GatedPrefixTuning(Gated, PrefixTuning):  # type: ignore[misc]
    """a + g * (attention(q, [P_k; k], [P_v; v]) - a), a without prefix   (Mao et al. 2021, arXiv:2110.07577)."""

    def seen(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(2)
