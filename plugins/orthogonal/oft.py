from collections.abc import Iterator, Sequence
from contextlib import contextmanager

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
    series, in which R is orthogonal nearly (Qiu et al. 2025, arXiv:2506.19847). With `share` all blocks of a layer are
    one. `bounded` keeps the Frobenius norm of each skew-symmetric matrix below eps / sqrt(blocks), as PEFT's COFT.
    """

    where, mergeable, peft = petune.ALL_LINEAR, True, twins.OFT

    def __init__(
        self,
        site: petune.Site,
        *,
        block: petune.Positive = 32,
        neumann: bool = False,
        terms: petune.Positive = 5,
        share: bool = False,
        bounded: bool = False,
        eps: float = 6e-5,
    ) -> None:
        super().__init__()
        self.width = width = site.in_features
        self.block = nearest(range(2, width + 1), width, block) or width
        self.terms = terms if neumann else None
        blocks = 1 if share else width // self.block
        self.free = nn.Parameter(
            torch.zeros(blocks, self.block * (self.block - 1) // 2)
        )
        self.most = eps / blocks**0.5 if bounded else None

    def forward(self, inner: petune.Inner, x: Tensor) -> Tensor:
        blocks = x.reshape(*x.shape[:-1], -1, self.block)
        return inner(turn(blocks, self.rotation()).flatten(-2))

    @petune.derived
    def rotation(self) -> Tensor:
        """R - I, (blocks, block, block)."""
        change = cayley(self.within(), self.block, self.terms)
        return change.expand(self.width // self.block, -1, -1)

    def within(self) -> Tensor:
        """`free`, cut to the bound."""
        if self.most is None:
            return self.free
        norm = self.free.detach().norm(dim=1, keepdim=True) * 2**0.5
        return self.free * (self.most / norm).clamp(max=1)

    @classmethod
    @contextmanager
    def step(cls, adapters: Sequence["OFT"], step: int, total: int) -> Iterator[None]:
        yield
        with torch.no_grad():
            for adapter in adapters if adapters[0].most else ():
                adapter.free.copy_(adapter.within())
