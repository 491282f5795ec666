from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import petune

from .start import Share, Start, start
from .twins import LORA


class LoRA(petune.Adapter):
    """y = W x + (alpha / rank) B A x   (Hu et al. 2021, arXiv:2106.09685).

    A is Kaiming-uniform (`gaussian`: normal) and B zero; `orthogonal` starts both with B A = 0; `pissa`
    (arXiv:2404.02948; `exact-pissa` without random numbers) and `olora` (arXiv:2406.01775) start at parts of W and
    subtract the product B_0 A_0 that they start with. So training starts at the base. `rslora` scales by
    alpha / sqrt(rank) (arXiv:2312.03732). Dropout acts on the input of A. B learns `lr_ratio` times as fast as A
    (LoRA+, arXiv:2402.12354). With `bias` the update is B A x + b. Each of stacked experts has an A and a B of its
    own. At an embedding x is a row of the identity.
    """

    where, also, mergeable, peft = petune.ALL_LINEAR, "embed", True, LORA
    A0: Tensor | None
    B0: Tensor | None

    def __init__(
        self,
        site: petune.Site,
        *,
        rank: petune.Positive = 8,
        alpha: float = 16.0,
        dropout: Share = 0.0,
        rslora: bool = False,
        init: Start = "default",
        lr_ratio: float = 1.0,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.scale, self.dropout = alpha / (rank**0.5 if rslora else rank), dropout
        self.gain = site.gain() if site.kind == "embedding" else None
        self.lr_ratio = lr_ratio
        a, b = start(init, site, rank, self.scale)
        self.A, self.B = nn.Parameter(a), nn.Parameter(b)
        subtracted = init.endswith(("pissa", "olora"))
        self.register_buffer("A0", a.clone() if subtracted else None)
        self.register_buffer("B0", b.clone() if subtracted else None)
        if bias and site.experts:
            raise petune.UnsupportedError(
                f"lora: bias=True has no form for stacked experts such as {site.name}."
            )
        self.b = nn.Parameter(torch.zeros(site.out_features)) if bias else None

    def forward(
        self, inner: petune.Inner, x: Tensor, *, experts: Sequence[int] = ()
    ) -> Tensor:
        a, b = self.factors()
        dropout = self.dropout if self.training else 0.0
        y = inner(x)
        if self.b is not None:
            y = y + (self.scale * self.b).to(y.dtype)
        if self.gain is not None:
            return y + self.gain * self.scale * F.embedding(x, a.T) @ b.T
        if not experts:
            return petune.lowrank_update(y, x, a, b, self.scale, dropout=dropout)
        update = partial(petune.lowrank_update, scale=self.scale, dropout=dropout)
        rows = (torch.split(t, list(experts)) for t in (y, x))
        return torch.cat(list(map(update, *rows, a, b)))

    @petune.derived
    def factors(self) -> tuple[Tensor, Tensor]:
        """(A, B), or factors of B A - B_0 A_0 = (B - B_0) A + B_0 (A - A_0), which lose no small change to rounding."""
        if self.A0 is None or self.B0 is None:
            return self.A, self.B
        return torch.cat([self.A, self.A - self.A0], -2), torch.cat(
            [self.B - self.B0, self.B0], -1
        )

    def plain(self) -> dict[str, Tensor]:
        a, b = self.factors()
        return {"A": a, "B": b} | ({} if self.b is None else {"b": self.b})

    def learning_rates(self) -> dict[str, float]:
        return {"B": self.lr_ratio}
