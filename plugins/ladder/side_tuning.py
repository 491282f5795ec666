from typing import Any

import torch
from torch import Tensor, nn

import petune


class LadderSideTuning(petune.Adapter):
    """s_i = m_i(g_i D_i h_i + (1 - g_i) s_{i-1}), h_n + U s_n   (Sung et al. 2022, arXiv:2206.06522).

    A thin network climbs beside the blocks and reads their results h_i, of which no gradient goes back: nothing that
    is attached inside the blocks trains along. What it comes to is added behind the last block. m_i is a residual MLP
    (the paper has small transformer blocks), so that it needs no cache of its own. U starts at zero, so that training
    starts at the base. In an encoder-decoder the ladder stands beside the decoder: no gradient could pass it to reach
    one beside the encoder. Reentrant gradient checkpointing is refused, since no gradient enters the blocks.
    """

    where = "layer"

    def __init__(self, site: petune.Site, *, reduction: petune.Positive = 8) -> None:
        super().__init__()
        top = site.peers[-1]
        self.rungs: list[LadderSideTuning] = site.shared("rungs", list)
        self.beside = _stack(site) == _stack(top)
        self.up: nn.Linear | None = None
        if self.beside:
            hidden, width = site.out_features, max(1, site.out_features // reduction)
            self.down, self.gate = (
                nn.Linear(hidden, width),
                nn.Parameter(torch.zeros(1)),
            )
            self.mlp = nn.Sequential(
                nn.Linear(width, width), nn.GELU(), nn.Linear(width, width)
            )
            self.rungs.append(self)
        if site is top:
            self.up = nn.Linear(width, hidden, bias=False)
            nn.init.zeros_(self.up.weight)

    def forward(
        self, inner: petune.Inner, x: Tensor, *, notes: dict[Any, Tensor]
    ) -> Tensor:
        if not self.beside:
            return inner(x)
        h = notes[self] = inner(x).detach()
        if self.up is None:
            return h
        side = x.new_zeros(1)
        for rung in self.rungs:
            side = rung.climbed(side, notes[rung])
        return h + self.up(side).to(h.dtype)

    def climbed(self, side: Tensor, h: Tensor) -> Tensor:
        """s_i, (batch, length, width), from s_{i-1} and h_i."""
        mixed = side + self.gate.sigmoid() * (self.down(h) - side)
        return mixed + self.mlp(mixed)


def _stack(site: petune.Site) -> str:
    return site.name.rpartition(".")[0]
