import torch
from torch import Tensor, nn

import petune


class TrainableTokens(petune.Adapter):
    """e(i) = r_i for the tokens i in `ids`, the base's embedding for all others.

    The rows start as the base's. A head that is tied to the embedding scores these tokens by the same rows; one that
    is not stays the base's.
    """

    where, mergeable = "embed head", True
    ids: Tensor
    peft = petune.PeftTwin(
        "TRAINABLE_TOKENS",
        {"token_indices": "ids"},
        {"rows": "trainable_tokens_delta"},
        beside="trainable_token_indices",
    )

    def __init__(self, site: petune.Site, *, ids: list[int]) -> None:
        super().__init__()
        table = site.module.get_parameter("weight").detach()  # (vocabulary, hidden)
        wrong = [i for i in ids if not 0 <= i < len(table)]
        if wrong or not ids:
            raise petune.PetuneError(
                f"trainable-tokens: ids={ids}: wanted are numbers below {len(table)}."
            )
        self.is_head = site.kind != "embedding"
        self.register_buffer(
            "ids",
            torch.tensor(list(dict.fromkeys(ids)), device=table.device),
            persistent=False,
        )
        rows = site.shared("rows", lambda: nn.Parameter(table[self.ids].float()))
        self.rows = rows if site.tied or not self.is_head else None
        self.scale = (
            1.0
            if self.is_head
            else _scale(site.module, table[self.ids[:1]], self.ids[:1])
        )

    def forward(self, inner: petune.Inner, x: Tensor) -> Tensor:
        y = inner(x)
        if self.rows is None:
            return y
        if self.is_head:
            return y.index_copy(-1, self.ids, (x @ self.rows.T).to(y.dtype))
        hit = x.unsqueeze(-1) == self.ids  # (batch, length, ids)
        rows = hit.to(self.rows.dtype) @ self.rows * self.scale
        return torch.where(hit.any(-1, keepdim=True), rows.to(y.dtype), y)


def _scale(embedding: nn.Module, row: Tensor, token: Tensor) -> float:
    """What an embedding (Gemma's) multiplies its rows by."""
    stored = float(row.norm())
    return float(embedding(token).detach().norm()) / stored if stored else 1.0
