import math

import torch
from torch import Tensor, nn

import petune


class LoRA(petune.Adapter):
    """y = W x + (alpha / rank) B A x   (Hu et al. 2021, arXiv:2106.09685).

    A is Kaiming-uniform and B zero, so that training starts at the base. Dropout acts on the input of A.
    """

    where, mergeable = petune.ALL_LINEAR, True

    def __init__(
        self, site: petune.Site, *, rank: petune.Positive = 8, alpha: float = 16.0, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.empty(rank, site.in_features))
        self.B = nn.Parameter(torch.zeros(site.out_features, rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.scale, self.dropout = alpha / rank, nn.Dropout(dropout)

    def forward(self, inner: petune.Inner, x: Tensor) -> Tensor:
        return petune.lowrank_update(inner(x), self.dropout(x), self.A, self.B, self.scale)
