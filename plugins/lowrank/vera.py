from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import petune


class VeRA(petune.Adapter):
    """y = W x + b * B (d * A x)   (Kopiczko et al. 2023, arXiv:2310.11454).

    A and B are random and frozen; layers of one shape share them, and `seed` makes them again, so that only d and b
    are saved. b starts at zero, so that training starts at the base.
    """

    where, mergeable = petune.ALL_LINEAR, True
    A: Tensor
    B: Tensor

    def __init__(
        self, site: petune.Site, *, rank: petune.Positive = 256, seed: int = 0, d_initial: float = 0.1
    ) -> None:
        super().__init__()
        device = next(site.module.parameters()).device

        def draw(*shape: int) -> Tensor:  # Kaiming-uniform, drawn on the CPU: the same on every device
            bound = (6 / shape[1]) ** 0.5
            generator = torch.Generator().manual_seed(seed)
            return torch.empty(shape).uniform_(-bound, bound, generator=generator).to(device)

        sizes = (rank, site.in_features), (site.out_features, rank)
        for name, size in zip("AB", sizes, strict=True):
            matrix = site.shared((name, size, device), partial(draw, *size))
            self.register_buffer(name, matrix, persistent=False)
        self.d = nn.Parameter(torch.full((rank,), d_initial))
        self.b = nn.Parameter(torch.zeros(site.out_features))

    def forward(self, inner: petune.Inner, x: Tensor) -> Tensor:
        return inner(x) + petune.recompute(self.expand, F.linear(x, self.A), self.d, self.b)

    def expand(self, low: Tensor, d: Tensor, b: Tensor) -> Tensor:
        return b * F.linear(d * low, self.B)
