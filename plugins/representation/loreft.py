from typing import Annotated, Any

import torch
import torch.nn.functional as F
from annotated_types import Ge
from torch import Tensor, nn

import petune

Count = Annotated[int, Ge(0)]


class Edit(nn.Module):
    """R^T (W h + b - R h), R the orthonormal factor of a free matrix."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.free = nn.Parameter(torch.empty(width, min(rank, width)))
        nn.init.orthogonal_(self.free)
        self.W = nn.Parameter(self.rotation().detach().clone())  # (rank, hidden)
        self.b = nn.Parameter(torch.zeros(len(self.W)))

    @petune.derived
    def rotation(self) -> Tensor:
        return torch.linalg.qr(self.free).Q.T  # (rank, hidden)

    def forward(self, h: Tensor, here: Tensor) -> Tensor:
        rotation = self.rotation()
        low = F.linear(h, self.W - rotation, self.b)  # (batch, length, rank)
        return (low * here.unsqueeze(-1)) @ rotation


class LoReFT(petune.Adapter):
    """h + R^T (W h + b - R h) behind every block, R with orthonormal rows   (Wu et al. 2024, arXiv:2404.03592).

    Edits the `first` and the `last` tokens of each prompt, by R, W and b of their own or, if `tied`, of both; where a
    short prompt has too few for both, they meet in the middle. In an encoder-decoder the decoder's prompt is the token
    that it starts with. W starts at R and b at zero, so that training starts at the base.
    """

    where = "layer"

    def __init__(
        self,
        site: petune.Site,
        *,
        rank: petune.Positive = 4,
        first: Count = 7,
        last: Count = 7,
        tied: bool = False,
    ) -> None:
        super().__init__()
        if not first and not last:
            raise petune.PetuneError(
                "loreft: first=0 and last=0 leave nothing to edit."
            )
        self.first, self.last = first, last
        both = 1 if tied else bool(first) + bool(last)
        self.edits = nn.ModuleList(Edit(site.out_features, rank) for _ in range(both))

    def forward(self, inner: petune.Inner, x: Tensor, *, batch: petune.Batch) -> Any:
        h = inner(x)
        if batch.decoding:
            return h
        last = torch.clamp(batch.size - batch.size // 2, max=self.last)  # (batch, 1)
        tail = batch.place >= batch.size - last  # (batch, length)
        head = (batch.place >= 0) & (batch.place < self.first) & ~tail
        groups = [head | tail] if len(self.edits) == 1 else [head, tail]
        return sum(
            (edit(h, here) for edit, here in zip(self.edits, groups, strict=True)),
            start=h,
        )
