import torch
import torch.nn.functional as F
from torch import Tensor, nn

import petune


class LoReFT(petune.Adapter):
    """h + R^T (W h + b - R h) behind every block, R with orthonormal rows   (Wu et al. 2024, arXiv:2404.03592).

    R is the orthonormal factor of a free matrix. W starts at R and b at zero, so that training starts at the base.
    Every position is edited; the paper also edits the first and last few of the prompt alone.
    """

    where = "layer"

    def __init__(self, site: petune.Site, *, rank: petune.Positive = 4) -> None:
        super().__init__()
        self.free = nn.Parameter(torch.empty(site.out_features, min(rank, site.out_features)))
        nn.init.orthogonal_(self.free)
        self.W = nn.Parameter(self.rotation().detach().clone())  # (rank, hidden)
        self.b = nn.Parameter(torch.zeros(len(self.W)))

    def rotation(self) -> Tensor:
        return torch.linalg.qr(self.free).Q.T  # (rank, hidden)

    def forward(self, inner: petune.Inner, x: Tensor) -> Tensor:
        h, rotation = inner(x), self.rotation()
        return h + F.linear(h, self.W - rotation, self.b) @ rotation
