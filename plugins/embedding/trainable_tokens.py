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
        "TRAINABLE_TOKENS", {"token_indices": "ids"}, {"rows": "trainable_tokens_delta"}
    )

    def __init__(self, site: petune.Site, *, ids: list[int]) -> None:
        super().__init__()
        table = site.module.weight
        assert isinstance(table, Tensor)  # (vocabulary, hidden)
        weight = table.detach()
        wrong = [i for i in ids if not 0 <= i < len(weight)]
        if wrong or not ids:
            raise petune.PetuneError(
                f"trainable-tokens: ids={ids}: wanted are numbers below {len(weight)}."
            )
        self.is_head = site.kind != "embedding"
        self.register_buffer(
            "ids", torch.tensor(list(dict.fromkeys(ids)), device=weight.device), persistent=False
        )
        tied = site.shared("table", lambda: table) is table
        rows = site.shared("rows", lambda: nn.Parameter(weight[self.ids].float()))
        self.rows = rows if tied else None
        probe = self.ids[:1]  # some embeddings (Gemma's) scale what they look up
        stored = float(weight[probe].norm())
        self.scale = (
            float(site.module(probe).detach().norm()) / stored
            if stored and not self.is_head
            else 1.0
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
