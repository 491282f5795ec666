import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import petune


class PHM(nn.Module):
    """x Wᵀ + b with Wᵀ = sum_i A_i kron (s_i t_i), the rules A_i (n, n, n) shared."""

    def __init__(self, rules: nn.Parameter, into: int, out: int) -> None:
        super().__init__()
        n = len(rules)
        self.rules = rules
        self.s = nn.Parameter(torch.randn(n, into // n) * (n / into) ** 0.5)
        self.t = nn.Parameter(torch.randn(n, out // n))
        self.bias = nn.Parameter(torch.zeros(out))

    @property
    def weight(self) -> Tensor:
        """W, (out, in)."""
        weight = torch.einsum(
            "nab,ni,no->boai", self.rules, self.s, self.t
        )  # (n, out / n, n, in / n)
        return weight.reshape(len(self.bias), -1)


class Compacter(petune.Adapter):
    """h + U gelu(D h), behind attention and MLP, D and U of Kronecker form   (Mahabadi et al. 2021, arXiv:2106.04647).

    D and U are sums of n Kronecker products of a small rule, which all sites share, with a matrix of rank one. n is the
    common divisor of the widths that is nearest to `n`. U starts at zero, so that training starts at the base.
    """

    where = "attn mlp"

    def __init__(
        self, site: petune.Site, *, width: petune.Positive = 24, n: petune.Positive = 4
    ) -> None:
        super().__init__()
        common = math.gcd(width, site.out_features)
        n = min(
            (d for d in range(1, common + 1) if common % d == 0),
            key=lambda d: abs(d - n),
        )
        rules = site.shared(
            ("rules", n), lambda: nn.Parameter(torch.randn(n, n, n) * n**-0.5)
        )
        self.down = PHM(rules, site.out_features, width)
        self.up = PHM(rules, width, site.out_features)
        nn.init.zeros_(self.up.t)

    def forward(self, inner: petune.Inner, x: Tensor) -> Tensor:
        h = inner(x)
        return petune.bottleneck_update(h, h, self.down, F.gelu, self.up)
