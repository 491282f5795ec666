"""Operations that methods share, written so that they keep no more for backward than they must."""

from petune.core.ops.again import recompute
from petune.core.ops.bottleneck import bottleneck_update
from petune.core.ops.lowrank import lowrank_update

__all__ = ["bottleneck_update", "lowrank_update", "recompute"]
