"""Ways of spreading a model over devices that petune can't follow, found by what they leave on modules and tensors."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn

from petune.core.host.seam import Seams
from petune.errors import UnsupportedError

SEAMS = Seams()


@SEAMS.lean(
    "torch",
    "nn.Module._replicate_for_data_parallel()",
    since="1.5",
    why="refuse nn.DataParallel, whose threads don't know the forward that they are part of",
)
def _modules_replicate_themselves() -> bool:
    module: Any = nn.Identity()
    replica = module._replicate_for_data_parallel()
    return vars(replica)["_is_replica"] is True


class NotReplicated:
    """A mixin of an adapted module, which nn.DataParallel can't copy for its threads."""

    def _replicate_for_data_parallel(self) -> Any:
        raise UnsupportedError(
            "nn.DataParallel can't run an adapted model: use one process a device "
            "(torchrun with DistributedDataParallel or fully_shard)."
        )


@SEAMS.lean(
    "deepspeed",
    "the attribute ds_id of a parameter that ZeRO-3 has partitioned",
    since="0.3",
    why="refuse a model whose weights are not there to be looked at",
)
def _deepspeed_marks_parameters() -> bool:
    found = find_spec("deepspeed")
    if found is None or found.origin is None:
        return True
    source = Path(found.origin).parent / "runtime/zero/partition_parameters.py"
    return "ds_id" in source.read_text(encoding="utf-8")


def partitioned_by(model: nn.Module) -> str | None:
    """What has taken a model's parameters apart in a way that petune can't follow, None if they are as they were.

    FSDP2 (`fully_shard`) is none of it: its parameters are tensors with their own shapes.
    """
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        return "DeepSpeed ZeRO-3"
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    old = getattr(fsdp, "FullyShardedDataParallel", ())
    return "FSDP1" if any(isinstance(part, old) for part in model.modules()) else None
