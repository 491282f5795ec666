import torch
from torch import Tensor, nn

import petune

from . import twins
from .rotation import cayley, nearest, turn


class BOFT(petune.Adapter):
    """y = s * (W R_1 … R_m x) + b, a butterfly of block rotations   (Liu et al. 2023, arXiv:2311.06243).

    The blocks of factor i join half-blocks that lie 2^i half-blocks apart, so that m `factors` let every input reach
    2^(m-1) blocks. Rotations start at the identity and s at one: training starts at the base. The size of a block is
    the even number nearest to `block` of which 2^(m-1) blocks divide the input's width; a layer without one is refused.
    """

    where, mergeable, peft = petune.ALL_LINEAR, True, twins.BOFT
    bias: Tensor

    def __init__(
        self,
        site: petune.Site,
        *,
        block: petune.Positive = 8,
        factors: petune.Positive = 2,
    ) -> None:
        super().__init__()
        width = site.in_features
        parts, left = divmod(width, 1 << min(factors - 1, width.bit_length()))
        size = None if left else nearest(range(2, parts + 1, 2), parts, block)
        if size is None:
            raise petune.UnsupportedError(
                f"boft: {site.name}: {width} inputs have no butterfly of {factors} factors."
            )
        self.block = size
        self.free = nn.Parameter(
            torch.zeros(factors, width // size, size * (size - 1) // 2)
        )
        self.scale = nn.Parameter(torch.ones(site.out_features))
        self.register_buffer("bias", site.bias(), persistent=False)

    def forward(self, inner: petune.Inner, x: Tensor) -> Tensor:
        rotations = self.rotations()
        for i in reversed(range(len(rotations))):
            x = self.turned(x, rotations[i], 2**i)
        y = inner(x)
        more = (self.scale - 1).to(y.dtype)
        out = torch.addcmul(y, more, y)  # keeps y, and no y - b beside it
        return torch.addcmul(out, more, self.bias.to(y.dtype), value=-1)

    def turned(self, x: Tensor, rotation: Tensor, apart: int) -> Tensor:
        """R_i x, whose blocks join half-blocks that lie `apart` half-blocks from each other."""
        halves = x.reshape(*x.shape[:-1], -1, 2, apart, self.block // 2)
        pairs = halves.transpose(-3, -2)  # (…, groups, apart, 2, block / 2)
        blocks = pairs.flatten(-2).flatten(-3, -2)  # (…, blocks, block)
        return turn(blocks, rotation).reshape(pairs.shape).transpose(-3, -2).flatten(-4)

    @petune.derived
    def rotations(self) -> Tensor:
        """R_i - I, (factors, blocks, block, block)."""
        return cayley(self.free, self.block)
