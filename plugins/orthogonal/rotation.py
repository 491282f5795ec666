"""Block-wise orthogonal matrices from free parameters."""

import torch
from torch import Tensor


def cayley(free: Tensor, block: int, terms: int | None = None) -> Tensor:
    """R - I for orthogonal blocks R = (I + S)^-1 (I - S), (…, blocks, block, block), S skew-symmetric with `free`
    (…, blocks, block (block - 1) / 2) above its diagonal.

    With `terms`, R is I + 2 S + 2 S^2 + … + S^(terms - 1) in place of (I - S)^-1 (I + S), the transform of -S.
    """
    row, column = torch.triu_indices(block, block, 1, device=free.device)
    skew = free.new_zeros(*free.shape[:-1], block, block)
    skew[..., row, column] = free
    skew = skew - skew.mT
    if terms is None:
        eye = torch.eye(block, device=free.device, dtype=free.dtype)
        return torch.linalg.solve(eye + skew, -2 * skew)
    power, change = skew, 2 * skew
    for i in range(2, terms):
        power = power @ skew
        change = change + (1 if i == terms - 1 else 2) * power
    return change


def turn(x: Tensor, change: Tensor) -> Tensor:
    """Each block of x (…, blocks, block) times its R, given as `change` = R - I (blocks, block, block).

    Added as x (R - I), so that a small rotation survives rounding to 16 bits.
    """
    blocks, block = x.shape[-2:]
    flat = x.reshape(-1, blocks, block).transpose(0, 1)  # (blocks, rows, block)
    moved = torch.bmm(flat, change.to(x.dtype))
    return x + moved.transpose(0, 1).reshape(x.shape)


def nearest(divisors: range, width: int, block: int) -> int | None:
    """The one of `divisors` that divides `width` and is nearest to `block`, of two the larger, if there is one."""
    return min(
        (d for d in divisors if width % d == 0),
        key=lambda d: (abs(d - block), -d),
        default=None,
    )
