import math

import torch
from torch import Tensor, nn

import petune

from .twins import LOKR


class LoKr(petune.Adapter):
    """y = W x + (alpha / rank) (C kron (B A)) x   (Yeh et al. 2023, arXiv:2309.14859).

    C is (f_out, f_in): `factor` where it divides the layer's width, else the largest divisor below it and the width's
    root; -1 is that below the root. B A is one matrix where the rank is half its larger side or more. The product is
    applied factor by factor and never formed. B, or B A, starts at zero, so that training starts at the base.
    """

    where, mergeable, peft = petune.ALL_LINEAR, True, LOKR

    def __init__(
        self,
        site: petune.Site,
        *,
        rank: petune.Positive = 8,
        alpha: float = 16.0,
        factor: int = 8,
    ) -> None:
        super().__init__()
        into, out = (
            _divisor(site.in_features, factor),
            _divisor(site.out_features, factor),
        )
        wide, high = site.in_features // into, site.out_features // out
        whole = 2 * rank >= max(wide, high)
        self.C = nn.Parameter(torch.empty(out, into))
        self.A = None if whole else nn.Parameter(torch.empty(rank, wide))
        self.B = None if whole else nn.Parameter(torch.zeros(high, rank))
        self.BA = nn.Parameter(torch.zeros(high, wide)) if whole else None
        for start in (self.C, self.A):
            if start is not None:
                nn.init.kaiming_uniform_(start, a=math.sqrt(5))
        self.scale = alpha / rank

    def forward(self, inner: petune.Inner, x: Tensor) -> Tensor:
        z = x.reshape(*x.shape[:-1], self.C.shape[1], -1)  # (…, f_in, in / f_in)
        for factor in (self.A, self.B, self.BA):
            z = z if factor is None else z @ factor.T
        return inner(x) + self.scale * (self.C @ z).flatten(-2)


def _divisor(width: int, factor: int) -> int:
    if factor > 0 and width % factor == 0:
        return factor
    below = [d for d in range(1, math.isqrt(width) + 1) if width % d == 0]
    return max((d for d in below if d <= factor or factor < 0), default=1)
