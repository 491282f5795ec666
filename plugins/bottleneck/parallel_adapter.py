import torch.nn.functional as F
from torch import Tensor

import petune

from .houlsby import Houlsby


class ParallelAdapter(Houlsby):
    """mlp(x) + s U relu(D x)   (He et al. 2021, arXiv:2110.04366).

    A bottleneck beside the MLP that reads the MLP's input. U starts at zero, so that training starts at the base.
    """

    where = "mlp"

    def __init__(
        self, site: petune.Site, *, width: petune.Positive = 64, scale: float = 4.0
    ) -> None:
        super().__init__(site, width=width)
        self.scale = scale

    def forward(self, inner: petune.Inner, x: Tensor) -> Tensor:
        return petune.bottleneck_update(
            inner(x), x, self.down, F.relu, self.up, self.scale
        )
