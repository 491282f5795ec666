"""Block-wise orthogonal matrices from free parameters."""

import torch
from torch import Tensor


def rotate(x: Tensor, free: Tensor, block: int, terms: int | None = None) -> Tensor:
    """Each block of x (…, blocks, block) times an orthogonal R = (I + S)^-1 (I - S), S skew-symmetric with `free`
    (blocks, block (block - 1) / 2) above its diagonal.

    With `terms`, R is I + 2 S + 2 S^2 + … + S^(terms - 1) in place of (I - S)^-1 (I + S), the transform of -S.
    Added as x (R - I), so that a small rotation survives rounding to 16 bits.
    """
    row, column = torch.triu_indices(block, block, 1, device=free.device)
    skew = free.new_zeros(*free.shape[:-1], block, block)
    skew[..., row, column] = free
    skew = skew - skew.mT
    if terms is None:
        eye = torch.eye(block, device=free.device, dtype=free.dtype)
        change = torch.linalg.solve(eye + skew, -2 * skew)  # R - I
    else:
        power, change = skew, 2 * skew
        for i in range(2, terms):
            power = power @ skew
            change = change + (1 if i == terms - 1 else 2) * power
    return x + torch.einsum("...ni,nij->...nj", x, change).to(x.dtype)


def nearest(divisors: range, width: int, block: int) -> int | None:
    """The one of `divisors` that divides `width` and is nearest to `block`, of two the larger, if there is one."""
    return min(
        (d for d in divisors if width % d == 0), key=lambda d: (abs(d - block), -d), default=None
    )
