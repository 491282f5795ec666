import torch
import torch.nn.functional as F
from torch import Tensor, nn

import petune

from .twins import VERA


class VeRA(petune.Adapter):
    """y = W x + b * B (d * A x)   (Kopiczko et al. 2023, arXiv:2310.11454).

    A and B are random, frozen and shared: drawn for the widest layers, of which others use the first columns of A and
    the first rows of B. `seed` makes them again, so that only d and b are saved. b starts at zero, so that training
    starts at the base.
    """

    where, mergeable, peft = petune.ALL_LINEAR, True, VERA
    A: Tensor
    B: Tensor

    def __init__(
        self,
        site: petune.Site,
        *,
        rank: petune.Positive = 256,
        seed: int = 0,
        d_initial: float = 0.1,
    ) -> None:
        super().__init__()
        device = next(site.module.parameters()).device
        sizes = (
            (rank, max(s.in_features for s in site.peers)),
            (max(s.out_features for s in site.peers), rank),
        )

        def draw() -> list[
            Tensor
        ]:  # Kaiming-uniform, drawn on the CPU: the same on every device
            generator = torch.Generator().manual_seed(seed)
            bounds = [(6 / size[1]) ** 0.5 for size in sizes]
            drawn = [
                torch.empty(n).uniform_(-x, x, generator=generator)
                for n, x in zip(sizes, bounds, strict=True)
            ]
            return [matrix.to(device) for matrix in drawn]

        a, b = site.shared(("A and B", device), draw)
        self.register_buffer("A", a[:, : site.in_features], persistent=False)
        self.register_buffer("B", b[: site.out_features], persistent=False)
        self.d = nn.Parameter(torch.full((rank,), d_initial))
        self.b = nn.Parameter(torch.zeros(site.out_features))

    def forward(self, inner: petune.Inner, x: Tensor) -> Tensor:
        return inner(x) + petune.recompute(
            self.expand, F.linear(x, self.A), self.d, self.b
        )

    def expand(self, low: Tensor, d: Tensor, b: Tensor) -> Tensor:
        return b * F.linear(d * low, self.B)
