import math

import torch
from torch import Tensor, nn

import petune

from .twins import LOKR


class LoKr(petune.Adapter):
    """y = W x + (alpha / rank) (C kron (B A)) x   (Yeh et al. 2023, arXiv:2309.14859).

    C is (f_out, f_in): `factor` where it divides the layer's width, else the largest divisor below it and the width's
    root; -1 is that below the root. B A is one matrix where the rank is half its larger side or more, and C the product
    of two, C1 C2, where it is less than half of C's and `both` asks for it. The product is applied factor by factor and
    never formed. B, or B A, starts at zero, so that training starts at the base.
    """

    where, mergeable, peft = petune.ALL_LINEAR, True, LOKR

    def __init__(
        self,
        site: petune.Site,
        *,
        rank: petune.Positive = 8,
        alpha: float = 16.0,
        factor: int = 8,
        both: bool = False,
    ) -> None:
        super().__init__()
        into, out = (
            _divisor(site.in_features, factor),
            _divisor(site.out_features, factor),
        )
        wide, high = site.in_features // into, site.out_features // out
        whole = 2 * rank >= max(wide, high)
        split = both and 2 * rank < max(out, into)
        self.C = None if split else nn.Parameter(torch.empty(out, into))
        self.C1 = nn.Parameter(torch.empty(out, rank)) if split else None
        self.C2 = nn.Parameter(torch.empty(rank, into)) if split else None
        self.A = None if whole else nn.Parameter(torch.empty(rank, wide))
        self.B = None if whole else nn.Parameter(torch.zeros(high, rank))
        self.BA = nn.Parameter(torch.zeros(high, wide)) if whole else None
        for start in (self.C, self.C1, self.C2, self.A):
            if start is not None:
                nn.init.kaiming_uniform_(start, a=math.sqrt(5))
        self.rank, self.scale, self.f_in = rank, alpha / rank, into

    def forward(self, inner: petune.Inner, x: Tensor) -> Tensor:
        z = x.reshape(*x.shape[:-1], self.f_in, -1)  # (…, f_in, in / f_in)
        for factor in (self.A, self.B, self.BA):
            z = z if factor is None else z @ factor.T
        for factor in (self.C, self.C2, self.C1):
            z = z if factor is None else factor @ z
        return inner(x) + self.scale * z.flatten(-2)


def _divisor(width: int, factor: int) -> int:
    if factor > 0 and width % factor == 0:
        return factor
    below = [d for d in range(1, math.isqrt(width) + 1) if width % d == 0]
    return max((d for d in below if d <= factor or factor < 0), default=1)
