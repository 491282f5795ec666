import torch
from torch import Tensor, nn

import petune


class TrainableTokens(petune.Adapter):
    """e(i) = r_i for the tokens i in `ids`, the base's embedding for all others.

    The rows start as the base's. A head that is tied to the embedding scores these tokens by the same rows; one that
    is not stays the base's. With `apart` a head has rows of its own, tied or not.
    """

    where, mergeable = "embed head", True
    ids: Tensor
    bias: Tensor
    peft = petune.PeftTwin(
        "TRAINABLE_TOKENS",
        {"token_indices": "ids"},
        {"rows": "trainable_tokens_delta"},
        beside="trainable_token_indices",
        tables="apart",
    )

    def __init__(
        self, site: petune.Site, *, ids: list[int], apart: bool = False
    ) -> None:
        super().__init__()
        table = site.module.get_parameter("weight").detach()  # (vocabulary, hidden)
        self.is_head = site.kind != "embedding"
        own = torch.tensor(_checked(ids, len(table)), device=table.device)
        bias = site.bias()[own] if self.is_head else torch.empty(0)
        self.register_buffer("ids", own, persistent=False)
        self.register_buffer("bias", bias, persistent=False)
        owner = "head" if self.is_head and apart else "tables"
        rows = site.shared(owner, lambda: nn.Parameter(table[own].float()))
        self.rows = rows if apart or site.tied or not self.is_head else None
        self.scale = 1.0 if self.is_head else site.gain()

    def forward(self, inner: petune.Inner, x: Tensor) -> Tensor:
        y = inner(x)
        if self.rows is None:
            return y
        if self.is_head:
            scores = x @ self.rows.T + self.bias
            return y.index_copy(-1, self.ids, scores.to(y.dtype))
        hit = x.unsqueeze(-1) == self.ids  # (batch, length, ids)
        rows = hit.to(self.rows.dtype) @ self.rows * self.scale
        return torch.where(hit.any(-1, keepdim=True), rows.to(y.dtype), y)


def _checked(ids: list[int], rows: int) -> list[int]:
    """The ids, each once.

    Raises:
        PetuneError: there is none, or one is no token.
    """
    if not ids or not all(0 <= i < rows for i in ids):
        raise petune.PetuneError(
            f"trainable-tokens: ids={ids}: wanted are numbers below {rows}."
        )
    return list(dict.fromkeys(ids))
