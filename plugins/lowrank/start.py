"""Where LoRA's factors start."""

import math
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Lt
from torch import Tensor

import petune

Start = Literal["default", "gaussian", "orthogonal", "pissa", "exact-pissa", "olora"]
Share = Annotated[float, Ge(0), Lt(1)]


def start(
    init: Start, site: petune.Site, rank: int, scale: float
) -> tuple[Tensor, Tensor]:
    """A (rank, in) and B (out, rank), for stacked experts one each before that. What `pissa` and `olora` cut out of the
    weight has its rank at most. By default an embedding's A is zero and its B normal.
    """
    if init in ("pissa", "exact-pissa"):
        u, s, v = _largest(matrix(site), rank, exact=init == "exact-pissa")
        root = (s / scale).sqrt().unsqueeze(-2)
        return (v * root).mT.contiguous(), u * root
    if init == "olora":
        weight = matrix(site)
        q = torch.linalg.qr(weight[..., :rank]).Q  # (out, rank)
        return q.mT @ weight, q
    each = (site.experts,) if site.experts else ()
    a = torch.empty(*each, rank, site.in_features)
    b = torch.zeros(*each, site.out_features, rank)
    if (
        init == "orthogonal"
    ):  # A and B meet in orthogonal halves of the rank, so that B A = 0
        q = torch.linalg.qr(torch.randn(rank, rank)).Q
        a = (torch.randn(*each, site.in_features, (rank + 1) // 2) @ q[0::2]).mT / 10
        b = torch.randn(*each, site.out_features, rank // 2) @ q[1::2] / 10
    elif site.kind == "embedding":
        torch.nn.init.zeros_(a)
        torch.nn.init.normal_(b)
    elif init == "gaussian":
        a.normal_(std=1 / rank)
    else:
        for one in a if each else [a]:
            torch.nn.init.kaiming_uniform_(one, a=math.sqrt(5))
    return a.contiguous(), b


def _largest(
    weight: Tensor, rank: int, *, exact: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The largest singular values (rank) and their vectors (out, rank) and (in, rank), by a randomized decomposition
    unless they are to be exact.
    """
    least = min(weight.shape[-2:])
    rank = min(rank, least)
    if exact:
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        v = vh.mT
    else:
        u, s, v = torch.svd_lowrank(weight, min(2 * rank, least), niter=8)
    return u[..., :rank], s[..., :rank], v[..., :rank]


def matrix(site: petune.Site) -> Tensor:
    """The weight that maps the site's input, (out, in)."""
    weight = site.weight()
    return weight.T if site.kind == "embedding" else weight
