"""Block-wise orthogonal matrices from free parameters."""

import torch
from torch import Tensor


def rotate(x: Tensor, free: Tensor, block: int) -> Tensor:
    """Each block of x (…, blocks, block) times an orthogonal R = (I + S)^-1 (I - S), S skew-symmetric with `free`
    (blocks, block (block - 1) / 2) above its diagonal.

    Added as x (R - I), so that a small rotation survives rounding to 16 bits.
    """
    row, column = torch.triu_indices(block, block, 1, device=free.device)
    skew = free.new_zeros(*free.shape[:-1], block, block)
    skew[..., row, column] = free
    skew = skew - skew.mT
    eye = torch.eye(block, device=free.device, dtype=free.dtype)
    change = torch.linalg.solve(eye + skew, -2 * skew)  # R - I
    return x + torch.einsum("...ni,nij->...nj", x, change).to(x.dtype)


def nearest(divisors: range, width: int, block: int) -> int | None:
    """The one of `divisors` that divides `width` and is nearest to `block`, if there is one."""
    return min((d for d in divisors if width % d == 0), key=lambda d: abs(d - block), default=None)
