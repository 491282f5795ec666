import torch
from torch import Tensor, nn

import petune


class LadderSideTuning(petune.Adapter):
    """s_i = m_i(g_i D_i h_i + (1 - g_i) s_{i-1}), x + U s_n   (Sung et al. 2022, arXiv:2206.06522).

    A thin network climbs beside the blocks and reads their results h_i, of which no gradient goes back: nothing that
    is attached inside the blocks trains along. Its result is added to x before the norm behind the blocks; a model
    without one is refused (BERT, RoBERTa). m_i is a residual MLP (the paper has small transformer blocks), so that it
    needs no cache of its own. U starts at zero, so that training starts at the base. In an encoder-decoder the ladder
    stands beside the decoder: no gradient could pass it to reach one beside the encoder.
    """

    where = "final layer"

    def __init__(self, site: petune.Site, *, reduction: petune.Positive = 8) -> None:
        super().__init__()
        top = site.role == "final"
        stack = site.name.rsplit(".", 1 if top else 2)[0]  # `model` of `model.norm` and of `model.layers.3`
        tops: list[str] = site.shared("tops", list)  # the norms outside the blocks come before all blocks
        self.top, self.stack, self.tops = top, stack, tops
        self.rungs: list[LadderSideTuning] = site.shared("rungs", list)
        self.tape: list[Tensor] = site.shared("tape", list)
        if top:
            tops.append(stack)
            return
        if stack not in tops:
            raise petune.UnsupportedError(f"ladder-side-tuning: no norm follows {site.name}, where a ladder could end.")
        if stack == tops[-1]:
            hidden, width = site.out_features, max(1, site.out_features // reduction)
            self.down, self.gate = nn.Linear(hidden, width), nn.Parameter(torch.zeros(1))
            self.mlp = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
            self.up = None if self.rungs else nn.Linear(width, hidden, bias=False)  # one, which the first rung keeps
            if self.up:
                nn.init.zeros_(self.up.weight)
            self.rungs.append(self)

    def forward(self, inner: petune.Inner, x: Tensor) -> Tensor:
        if self.stack != self.tops[-1]:
            return inner(x)
        if not self.top:
            h = inner(x).detach()
            if self is self.rungs[0]:
                self.tape.clear()  # of a forward that did not reach the top
            self.tape.append(h)
            return h
        up, side = self.rungs[0].up, x.new_zeros(1)
        assert up is not None
        for rung, h in zip(self.rungs, self.tape, strict=True):
            mixed = side + rung.gate.sigmoid() * (rung.down(h) - side)
            side = mixed + rung.mlp(mixed)
        self.tape.clear()
        return inner(x + up(side).to(x.dtype))
