import torch
from torch import Tensor, nn

import petune

from .twins import PROMPT_TUNING


class PromptTuning(petune.Adapter):
    """[p_1 … p_n, e(x_1), e(x_2), …]   (Lester et al. 2021, arXiv:2104.08691).

    The rows start as those of random entries of the vocabulary, or of the tokens `init`, repeated to the length.
    """

    where, starts_at_base, peft = "prompt", False, PROMPT_TUNING

    def __init__(self, site: petune.Site, *, length: petune.Positive = 20, init: list[int] | None = None) -> None:
        super().__init__()
        table = site.weight()
        wrong = [i for i in init or [] if not 0 <= i < len(table)]
        if wrong:
            raise petune.PetuneError(f"prompt-tuning: init={init}: {wrong[0]} is no token of {len(table)}.")
        self.length = length
        ids = torch.randint(len(table), (length,)) if not init else torch.tensor(init)[torch.arange(length) % len(init)]
        self.rows = nn.Parameter(table[ids.to(table.device)].clone())

    def forward(self) -> Tensor:
        return self.rows
