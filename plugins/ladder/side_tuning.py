from collections.abc import Sequence
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
    one beside the encoder. With gradient checkpointing a backward has to come before the next forward.
    """

    where = "layer"

    def __init__(self, site: petune.Site, *, reduction: petune.Positive = 8) -> None:
        super().__init__()
        top: str = site.shared("top", lambda: site.name)
        self.rungs: list[LadderSideTuning] = site.shared("rungs", list)
        self.tape: dict[int, Tensor] = site.shared(
            "tape", dict
        )  # the results of the blocks by rung
        self.rung = len(self.rungs)
        self.beside = _stack(site.name) == _stack(top)
        if self.beside:
            hidden, width = site.out_features, max(1, site.out_features // reduction)
            self.down, self.gate = nn.Linear(hidden, width), nn.Parameter(torch.zeros(1))
            self.mlp = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
            self.up = nn.Linear(width, hidden, bias=False) if site.name == top else None
            if self.up:
                nn.init.zeros_(self.up.weight)
            self.rungs.append(self)

    @classmethod
    def settle(cls, sites: Sequence[petune.Site], arguments: dict[str, Any]) -> dict[str, Any]:
        sites[0].shared("top", lambda: sites[-1].name)
        return arguments

    def forward(self, inner: petune.Inner, x: Tensor) -> Tensor:
        if not self.beside:
            return inner(x)
        h = self.tape[self.rung] = inner(x).detach()
        if self.up is None:
            return h
        side = x.new_zeros(1)
        for rung in self.rungs:
            mixed = side + rung.gate.sigmoid() * (rung.down(self.tape[rung.rung]) - side)
            side = mixed + rung.mlp(mixed)
        if not torch.is_grad_enabled():  # with gradients, checkpointing may ask for them again
            self.tape.clear()
        return h + self.up(side).to(h.dtype)


def _stack(name: str) -> str:
    return name.rpartition(".")[0]
