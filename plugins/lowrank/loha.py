import torch
from torch import Tensor, nn

import petune

from .twins import LOHA


class LoHa(petune.Adapter):
    """y = W x + (alpha / rank) ((B1 A1) * (B2 A2)) x   (Hyeon-Woo et al. 2021, arXiv:2108.06098).

    A product of two matrices of rank r element by element has rank r^2: its factors are the products of their rows and
    columns, so that no matrix of W's size is formed. B2 starts at zero, so that training starts at the base.
    """

    where, mergeable, peft = petune.ALL_LINEAR, True, LOHA

    def __init__(
        self, site: petune.Site, *, rank: petune.Positive = 8, alpha: float = 16.0
    ) -> None:
        super().__init__()
        into, out = site.in_features, site.out_features
        self.A1, self.A2 = (
            nn.Parameter(torch.randn(rank, into)),
            nn.Parameter(torch.randn(rank, into)),
        )
        self.B1, self.B2 = (
            nn.Parameter(torch.randn(out, rank) * 0.1),
            nn.Parameter(torch.zeros(out, rank)),
        )
        self.scale = alpha / rank

    def forward(self, inner: petune.Inner, x: Tensor) -> Tensor:
        return petune.lowrank_update(inner(x), x, *self.factors(), self.scale)

    @petune.derived
    def factors(self) -> tuple[Tensor, Tensor]:
        """Matrices of which (B1 A1) * (B2 A2) is the product: (rank rank, in) and (out, rank rank)."""
        a = (self.A1[:, None] * self.A2).flatten(0, 1)
        b = (self.B1[:, :, None] * self.B2[:, None]).flatten(1)
        return a, b
