from typing import Literal

import torch
from torch import Tensor, nn

import petune

from .twins import P_TUNING


class PTuning(petune.Adapter):
    """[p_1 … p_n, e(x_1), e(x_2), …] with p = encoder(e_1 … e_n)   (Liu et al. 2021, arXiv:2103.10385).

    The encoder is an MLP with two hidden layers, or a bidirectional LSTM of two layers under an MLP. `hidden` is the
    width of both; left out, it is that of the embedding.
    """

    where, starts_at_base, peft = "prompt", False, P_TUNING

    def __init__(
        self,
        site: petune.Site,
        *,
        length: petune.Positive = 20,
        hidden: petune.Positive | None = None,
        encoder: Literal["mlp", "lstm"] = "mlp",
    ) -> None:
        super().__init__()
        width = site.out_features
        hidden = hidden or width
        self.length = length
        self.table = nn.Parameter(torch.randn(length, width))
        into = [width, 2 * hidden] if encoder == "lstm" else []
        # cells, since torch.compile does not trace nn.LSTM
        self.ahead, self.back = (
            nn.ModuleList(nn.LSTMCell(n, hidden) for n in into) for _ in range(2)
        )
        read, inside = (2 * hidden, 2 * hidden) if into else (width, hidden)
        last = [] if into else [nn.Linear(inside, inside), nn.ReLU()]
        self.mlp = nn.Sequential(
            nn.Linear(read, inside), nn.ReLU(), *last, nn.Linear(inside, width)
        )

    def plain(self) -> dict[str, Tensor]:
        return {"rows": self()}

    @petune.derived
    def forward(self) -> Tensor:
        rows: Tensor = self.table
        for ahead, back in zip(self.ahead, self.back, strict=True):
            rows = torch.cat(
                [_run(ahead, rows), _run(back, rows.flip(0)).flip(0)], -1
            )  # (length, 2 hidden)
        return self.mlp(rows)


def _run(cell: nn.Module, rows: Tensor) -> Tensor:
    state, out = None, []
    for row in rows:
        state = cell(row, state)
        out.append(state[0])
    return torch.stack(out)
