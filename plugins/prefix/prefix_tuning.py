import torch
from torch import Tensor, nn

import petune

from .twins import PREFIX_TUNING


class Trunk(nn.Module):
    """tanh(A E + a): what the reparametrised prefixes of all layers are read from."""

    def __init__(self, length: int, hidden: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(length, hidden))
        self.dense = nn.Linear(hidden, hidden)

    def forward(self) -> Tensor:
        return self.dense(self.table).tanh()  # (length, hidden)


class PrefixTuning(petune.Adapter):
    """attention(q, [P_k; k], [P_v; v])   (Li & Liang 2021, arXiv:2101.00190).

    The prefix has no position and does not pass the cache: it stands beside it in every attention, cross-attention
    included. With `hidden` the prefixes are reparametrised, as in section 4.3 there: an MLP with that many hidden units
    makes them of a table (length, hidden); its last layer is each attention's own, all else is shared.
    """

    where, starts_at_base, peft = "attention cross-attention", False, PREFIX_TUNING

    def __init__(
        self,
        site: petune.Site,
        *,
        length: petune.Positive = 20,
        hidden: petune.Positive | None = None,
    ) -> None:
        super().__init__()
        self.shape, self.widths = (
            (length, site.kv_heads, -1),
            [site.head_dim, site.value_dim],
        )
        self.trunk = (
            None
            if hidden is None
            else site.shared("trunk", lambda: Trunk(length, hidden))
        )
        if hidden is None:
            self.keys = nn.Parameter(
                torch.randn(site.kv_heads, length, site.head_dim) * 0.02
            )
            self.values = nn.Parameter(
                torch.randn(site.kv_heads, length, site.value_dim) * 0.02
            )
        else:
            self.last = nn.Linear(hidden, site.kv_heads * sum(self.widths))

    @petune.derived
    def prefix(self) -> tuple[Tensor, Tensor]:
        """Keys and values, (kv_heads, length, head_dim) and (kv_heads, length, value_dim)."""
        if self.trunk is None:
            return self.keys, self.values
        keys, values = (
            self.last(self.trunk())
            .view(self.shape)
            .transpose(0, 1)
            .split(self.widths, -1)
        )
        return keys, values

    def plain(self) -> dict[str, Tensor]:
        return dict(zip(("keys", "values"), self.prefix(), strict=True))

    def forward(
        self, inner: petune.Inner, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
    ) -> Tensor:
        keys, values = self.prefix()
        batch = (k.shape[0], -1, -1, -1)
        k = torch.cat(
            [keys.to(k.dtype).expand(*batch), k], 2
        )  # (batch, kv_heads, length + keys, head_dim)
        v = torch.cat([values.to(v.dtype).expand(*batch), v], 2)
        return inner(q, k, v, mask)
