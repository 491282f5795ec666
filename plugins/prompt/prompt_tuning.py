import torch
from torch import Tensor, nn

import petune


class PromptTuning(petune.Adapter):
    """[p_1 … p_n, e(x_1), e(x_2), …]   (Lester et al. 2021, arXiv:2104.08691).

    The rows start as those of random entries of the vocabulary.
    """

    where, starts_at_base = "prompt", False

    def __init__(self, site: petune.Site, *, length: petune.Positive = 20) -> None:
        super().__init__()
        table = site.weight()
        self.length = length
        self.rows = nn.Parameter(table[torch.randint(len(table), (length,), device=table.device)].clone())

    def forward(self) -> Tensor:
        return self.rows
