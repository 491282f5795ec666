from typing import Any

import torch
from torch import Tensor, nn

import petune

from .lora import LoRA
from .twins import DORA


class DoRA(LoRA):
    """y = m * (W + s B A) x / n + b, with n the norms of the rows of W + s B A   (Liu et al. 2024, arXiv:2402.09353).

    n is a constant in backward (section 4.3 there) and expanded, so that W is never formed:
    n^2 = |W|^2 + sum_r (2 s W A^T + s^2 B A A^T) * B, where feeding A to the layer gives W A^T. m starts at |W|.
    """

    peft = DORA
    base_norm: Tensor

    def __init__(self, site: petune.Site, **lora: Any) -> None:
        super().__init__(site, **lora)
        norm = site.weight().norm(dim=1)
        self.m = nn.Parameter(norm.clone())
        self.register_buffer("base_norm", norm, persistent=False)

    def plain(self) -> dict[str, Tensor]:
        return {**super().plain(), "m": self.m}

    def forward(self, inner: petune.Inner, x: Tensor) -> Tensor:
        a, b = self.factors()
        y = petune.lowrank_update(
            inner(x), x, a, b, self.scale, dropout=self.dropout * self.training
        )
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            bias = inner(x.new_zeros(1, x.shape[-1]))
            wa = (inner(a.to(x.dtype)) - bias).to(b.dtype).T  # (out, rank)
            cross = 2 * self.scale * wa + self.scale**2 * b @ (a @ a.T)
            norm = (self.base_norm**2 + (cross * b).sum(1)).clamp(min=1e-12).sqrt()  # (out,)
        return torch.addcmul(y, (self.m / norm - 1).to(y.dtype), y - bias)
