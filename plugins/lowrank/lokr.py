import math

import torch
from torch import Tensor, nn

import petune


class LoKr(petune.Adapter):
    """y = W x + (alpha / rank) (C kron (B A)) x   (Yeh et al. 2023, arXiv:2309.14859).

    C is (f_out, f_in), each the divisor of the layer's width that is nearest to `factor`. The product is applied factor
    by factor and never formed. B starts at zero, so that training starts at the base.
    """

    where, mergeable = petune.ALL_LINEAR, True

    def __init__(
        self, site: petune.Site, *, rank: petune.Positive = 8, alpha: float = 16.0, factor: petune.Positive = 8
    ) -> None:
        super().__init__()
        into, out = _divisor(site.in_features, factor), _divisor(site.out_features, factor)
        self.C = nn.Parameter(torch.empty(out, into))
        self.A = nn.Parameter(torch.empty(rank, site.in_features // into))
        self.B = nn.Parameter(torch.zeros(site.out_features // out, rank))
        nn.init.kaiming_uniform_(self.C, a=math.sqrt(5))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.scale = alpha / rank

    def forward(self, inner: petune.Inner, x: Tensor) -> Tensor:
        z = x.reshape(*x.shape[:-1], self.C.shape[1], -1) @ self.A.T  # (…, f_in, rank)
        return inner(x) + self.scale * (self.C @ z @ self.B.T).flatten(-2)


def _divisor(width: int, near: int) -> int:
    return min((d for d in range(1, width + 1) if width % d == 0), key=lambda d: abs(d - near))
