from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import petune

from .twins import PROMPT_TUNING


class PromptTuning(petune.Adapter):
    """[p_1 … p_n, e(x_1), e(x_2), …]   (Lester et al. 2021, arXiv:2104.08691).

    The rows start as those of random entries of the vocabulary, or of the tokens `init`, repeated to the length, or of
    those of a `text` by the base's own tokenizer, which sets the length if it is not given.
    """

    where, starts_at_base, peft = "prompt", False, PROMPT_TUNING

    def __init__(
        self,
        site: petune.Site,
        *,
        length: petune.Positive = 20,
        text: str | None = None,
        init: list[int] | None = None,
    ) -> None:
        super().__init__()
        table = site.weight()
        wrong = [i for i in init or [] if not 0 <= i < len(table)]
        if wrong:
            raise petune.PetuneError(
                f"prompt-tuning: init={init}: {wrong[0]} is no token of {len(table)}."
            )
        self.length = length
        ids = (
            torch.randint(len(table), (length,))
            if not init
            else torch.tensor(init)[torch.arange(length) % len(init)]
        )
        self.rows = nn.Parameter(table[ids.to(table.device)].clone())

    @classmethod
    def settle(
        cls, sites: Sequence[petune.Site], arguments: dict[str, Any]
    ) -> dict[str, Any]:
        text = arguments.pop("text", None)
        if text is None:
            return arguments
        model: Any = sites[0].module
        name = model.config.name_or_path
        if not name or arguments.get("init"):
            why = (
                "the model does not say where its tokenizer is"
                if not name
                else "init is given as well"
            )
            raise petune.PetuneError(
                f"prompt-tuning: text={text!r}: {why}; give the tokens' ids, init=[…], alone."
            )
        init = petune.load_tokenizer(name)(text, add_special_tokens=False)["input_ids"]
        if not init:
            raise petune.PetuneError(f"prompt-tuning: text={text!r} has no tokens.")
        return {"length": len(init), **arguments, "init": init}

    def forward(self) -> Tensor:
        return self.rows
