from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

import petune

from .allocation import allocate, observe, straighten
from .twins import ADALORA


class AdaLoRA(petune.Adapter):
    """y = W x + (alpha / rank) P diag(e) Q x   (Zhang et al. 2023, arXiv:2303.10512).

    After `warmup` (a share of the steps, as `cooldown`) the e of all sites are cut, `every` so many steps, to the most
    important, until on a cubic schedule `target` a site are left, which then train on. Important is what has a large
    smoothed |w dL/dw|, times how much that varies. `orthogonality` is the weight in the loss of the mean of |P'P - I|
    and |QQ' - I|. e starts at zero, so that training starts at the base. Without `tuning.step` nothing is cut.
    """

    where, mergeable, peft = petune.ALL_LINEAR, True, ADALORA
    keep: Tensor

    def __init__(
        self,
        site: petune.Site,
        *,
        rank: petune.Positive = 12,
        target: petune.Positive = 8,
        alpha: float = 16.0,
        warmup: float = 0.1,
        cooldown: float = 0.3,
        every: petune.Positive = 10,
        betas: tuple[float, float] = (0.85, 0.85),
        orthogonality: float = 0.5,
    ) -> None:
        super().__init__()
        if warmup + cooldown >= 1:
            raise petune.PetuneError(
                f"adalora: warmup={warmup} and cooldown={cooldown} leave no steps to cut in."
            )
        self.Q = nn.Parameter(torch.randn(rank, site.in_features) * 0.02)
        self.e = nn.Parameter(torch.zeros(rank))
        self.P = nn.Parameter(torch.randn(site.out_features, rank) * 0.02)
        self.register_buffer(
            "keep", torch.ones(rank, dtype=torch.bool), persistent=False
        )
        for name, p in list(self.named_parameters()):
            for what in ("mean", "spread"):
                self.register_buffer(
                    f"{what}_{name}", torch.zeros_like(p), persistent=False
                )
        self.scale, self.target, self.betas, self.orthogonality = (
            alpha / rank,
            min(target, rank),
            betas,
            orthogonality,
        )
        self.phases, self.every = (warmup, 1 - cooldown), every

    def forward(self, inner: petune.Inner, x: Tensor) -> Tensor:
        return petune.lowrank_update(inner(x), x, self.scaled(), self.P, self.scale)

    @petune.derived
    def scaled(self) -> Tensor:
        """diag(e) Q, (rank, in)."""
        return self.e[:, None] * self.Q

    @classmethod
    @contextmanager
    def step(
        cls, adapters: Sequence["AdaLoRA"], step: int, total: int
    ) -> Iterator[None]:
        straighten(adapters)
        yield
        observe(adapters)
        allocate(
            adapters, step, *(round(share * total) for share in adapters[0].phases)
        )
