import torch
import torch.nn.functional as F
from torch import Tensor, nn

import petune


class LlamaAdapter(petune.Adapter):
    """attention(q, k, v) + tanh(g) attention(q, P_k, P_v)   (Zhang et al. 2023, arXiv:2303.16199).

    A second attention, over the prefix alone, with a gate a head that starts at zero: training starts at the base. The
    prefix is learned as keys and values. The paper adapts the topmost layers: where="attention@2:" leaves out two.
    """

    where = "attention"

    def __init__(self, site: petune.Site, *, length: petune.Positive = 10) -> None:
        super().__init__()
        self.keys = nn.Parameter(torch.randn(site.kv_heads, length, site.head_dim))
        self.values = nn.Parameter(torch.randn(site.kv_heads, length, site.value_dim))
        self.gate = nn.Parameter(torch.zeros(site.heads, 1))
        self.groups = site.heads // site.kv_heads
        told = getattr(site.module, "scaling", None)  # T5 does not scale
        self.scale = told if isinstance(told, float) else site.head_dim**-0.5

    def forward(
        self, inner: petune.Inner, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
    ) -> Tensor:
        batch = (q.shape[0], -1, -1, -1)
        # (batch, heads, length, head_dim)
        keys = self.keys.repeat_interleave(self.groups, 0).to(q.dtype).expand(*batch)
        values = (
            self.values.repeat_interleave(self.groups, 0).to(q.dtype).expand(*batch)
        )
        second = F.scaled_dot_product_attention(
            q, keys, values, scale=self.scale
        )  # (batch, heads, queries, head_dim)
        return inner(q, k, v, mask) + (self.gate.tanh() * second.transpose(1, 2)).to(
            q.dtype
        )
