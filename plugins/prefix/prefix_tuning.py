import torch
from torch import Tensor, nn

import petune


class PrefixTuning(petune.Adapter):
    """attention(q, [P_k; k], [P_v; v])   (Li & Liang 2021, arXiv:2101.00190).

    The prefix has no position and does not pass the cache: it stands beside it in every attention, cross-attention
    included.
    """

    where, starts_at_base = "attention cross-attention", False

    def __init__(self, site: petune.Site, *, length: petune.Positive = 20) -> None:
        super().__init__()
        self.keys = nn.Parameter(torch.randn(site.kv_heads, length, site.head_dim) * 0.02)
        self.values = nn.Parameter(torch.randn(site.kv_heads, length, site.head_dim) * 0.02)

    def forward(self, inner: petune.Inner, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        batch = (k.shape[0], -1, -1, -1)
        k = torch.cat([self.keys.to(k.dtype).expand(*batch), k], 2)  # (batch, kv_heads, length + keys, head_dim)
        v = torch.cat([self.values.to(v.dtype).expand(*batch), v], 2)
        return inner(q, k, v, mask)
