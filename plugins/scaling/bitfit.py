import torch
from torch import Tensor, nn

import petune


class BitFit(petune.Adapter):
    """y = W x + b + delta   (Ben Zaken et al. 2021, arXiv:2106.10199).

    Every linear layer of the blocks gets a shift, also one that has no bias.
    """

    where, mergeable = petune.ALL_LINEAR, True
    peft = petune.PeftTwin(
        "", {}, {"shift": "bias"}, layouts={"shift": "bias"}, beside="bias"
    )

    def __init__(self, site: petune.Site) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(site.out_features))

    def forward(self, inner: petune.Inner, x: Tensor) -> Tensor:
        return inner(x) + self.shift
