from typing import Any

import torch
from torch import Tensor, nn

import petune

from .lora import LoRA
from .start import matrix
from .twins import DORA


class DoRA(LoRA):
    """y = m * (W + s B A) x / n + b, with n the norms of the rows of W + s B A   (Liu et al. 2024, arXiv:2402.09353).

    n is a constant in backward (section 4.3 there) and expanded, so that W is never formed:
    n^2 = |W|^2 + sum_r (2 s W A^T + s^2 B A A^T) * B, where feeding A to the layer gives W A^T. m starts at |W|.
    """

    peft = DORA
    base_norm: Tensor
    bias: Tensor

    def __init__(self, site: petune.Site, **lora: Any) -> None:
        super().__init__(site, **lora)
        norm = matrix(site).norm(dim=1)
        bias = site.bias() if self.gain is None else torch.zeros_like(norm)
        self.m = nn.Parameter(norm.clone())
        self.register_buffer("base_norm", norm, persistent=False)
        self.register_buffer("bias", bias, persistent=False)

    # no form for stacked experts, which LoRA has
    def forward(self, inner: petune.Inner, x: Tensor) -> Tensor:  # type: ignore[override]
        y = super().forward(inner, x)  # (W + s B A) x + b
        more = (self.m / self.norm(inner, x.dtype) - 1).to(y.dtype)
        out = torch.addcmul(y, more, y)  # keeps y, and no y - b beside it
        return torch.addcmul(out, more, self.bias.to(y.dtype), value=-1)

    @torch.no_grad()
    def norm(self, inner: petune.Inner, dtype: torch.dtype) -> Tensor:
        """The norms of the rows of W + s B A, (out,)."""
        a, b = self.factors()
        with torch.autocast(a.device.type, enabled=False):
            wa = self.through(inner, a, dtype).to(b.dtype).T  # (out, rank)
            cross = 2 * self.scale * wa + self.scale**2 * b @ (a @ a.T)
            return (self.base_norm**2 + (cross * b).sum(1)).clamp(min=1e-12).sqrt()

    def through(self, inner: petune.Inner, a: Tensor, dtype: torch.dtype) -> Tensor:
        """A W^T, (rank, out); of an embedding W^T is the table."""
        if self.gain is None:
            return inner(a.to(dtype)) - self.bias
        rows = inner(torch.arange(a.shape[1], device=a.device))
        return a @ rows.to(a.dtype) / self.gain

    def plain(self) -> dict[str, Tensor]:
        return {**super().plain(), "m": self.m}
