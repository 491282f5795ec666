import torch
from torch import Tensor, nn

import petune

from . import twins
from .rotation import cayley, nearest, turn


class OFT(petune.Adapter):
    """y = W R x, R orthogonal and block-diagonal   (Qiu et al. 2023, arXiv:2306.07280).

    The input is rotated, and W is never formed. Each block is the Cayley transform of a skew-symmetric matrix that
    starts at zero, so that training starts at the base. The size of a block is the divisor, above one, of the layer's
    input width that is nearest to `block`. `neumann` replaces the transform's inverse by the first `terms` of its
    series, in which R is orthogonal nearly (Qiu et al. 2025, arXiv:2506.19847).
    """

    where, mergeable, peft = petune.ALL_LINEAR, True, twins.OFT

    def __init__(
        self,
        site: petune.Site,
        *,
        block: petune.Positive = 32,
        neumann: bool = False,
        terms: petune.Positive = 5,
    ) -> None:
        super().__init__()
        width = site.in_features
        self.block = nearest(range(2, width + 1), width, block) or width
        self.terms = terms if neumann else None
        self.free = nn.Parameter(
            torch.zeros(width // self.block, self.block * (self.block - 1) // 2)
        )

    def forward(self, inner: petune.Inner, x: Tensor) -> Tensor:
        blocks = x.reshape(*x.shape[:-1], -1, self.block)
        return inner(turn(blocks, self.rotation()).flatten(-2))

    @petune.derived
    def rotation(self) -> Tensor:
        """R - I, (blocks, block, block)."""
        return cayley(self.free, self.block, self.terms)
