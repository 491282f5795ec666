"""XLNet (Yang et al. 2019, arXiv:1906.08237): q, k and v are parameters, and scores are sums of einsums."""

from typing import Any

import torch
from torch import Tensor, nn

import petune


def sites(model: nn.Module) -> list[petune.Site]:
    """Those that discovery finds, and the relative attentions."""
    from transformers.models.xlnet.modeling_xlnet import XLNetRelativeAttention

    return petune.discover(model, {XLNetRelativeAttention: {"rel_attn_core": core}})


def core(
    self: Any,
    q_head: Tensor,
    k_head_h: Tensor,
    v_head_h: Tensor,
    k_head_r: Tensor,
    seg_mat: Tensor | None = None,
    attn_mask: Tensor | None = None,
    output_attentions: bool = False,
) -> Any:
    """softmax(((q + u) k + (q + w) r + (q + s) e) / sqrt(d)) v; q, k, v and the result (length, batch, heads, d)."""
    bias = torch.einsum("ibnd,jbnd->bnij", q_head + self.r_r_bias, k_head_r)
    bias = self.rel_shift_bnij(bias, klen=len(k_head_h))
    if seg_mat is not None:
        segment = torch.einsum("ibnd,snd->ibns", q_head + self.r_s_bias, self.seg_embed)
        bias = bias + torch.einsum("ijbs,ibns->bnij", seg_mat, segment)
    bias = bias * self.scale
    if attn_mask is not None:
        bias = bias - (
            65500 if bias.dtype == torch.float16 else 1e30
        ) * attn_mask.permute(2, 3, 0, 1)
    q, k, v = (
        t.permute(1, 2, 0, 3) for t in (q_head + self.r_w_bias, k_head_h, v_head_h)
    )
    out, weights = petune.attend(
        attention, self, q, k, v, position_bias=bias, is_causal=False
    )
    out = out.transpose(0, 1)
    return (out, weights) if output_attentions else out


def attention(
    self: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    *,
    position_bias: Tensor,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """The frozen computation, (batch, queries, heads, d) and the weights (queries, keys, batch, heads)."""
    weights = self.dropout(
        (q @ k.transpose(-1, -2) * self.scale + position_bias).softmax(-1)
    )
    return (weights @ v).transpose(1, 2), weights.permute(2, 3, 0, 1)
