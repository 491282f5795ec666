"""All the seams of the core, for `petune doctor` and for the first `attach` of a process."""

from __future__ import annotations

from petune.core.host import (
    attention,
    cache,
    checkpointing,
    experts,
    generation,
    parallel,
    quantization,
    torch_modules,
    trainer,
)
from petune.core.host.seam import Seams

SEAMS = Seams(
    attention.SEAMS,
    cache.SEAMS,
    checkpointing.SEAMS,
    experts.SEAMS,
    generation.SEAMS,
    parallel.SEAMS,
    quantization.SEAMS,
    torch_modules.SEAMS,
    trainer.SEAMS,
)
