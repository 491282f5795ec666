"""The sites of experts that are no modules: one parameter holds a projection of all of them."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from petune.core.frozen.block import Block
from petune.core.frozen.site import FUSED, Part, Site
from petune.core.host.experts import DOWN, UP, Stack, stacks

ROLES = {UP[0]: "gate_up", UP[1]: "up", DOWN: "down"}


def expert_sites(block: Block) -> Iterator[Site]:
    """A site for each projection of a block's stacked experts."""
    for name, module in block.modules.items():
        for parameter, stack in stacks(module).items():
            experts, *size = stack.weight.shape
            into, out = size if stack.transposed else reversed(size)
            role = ROLES[parameter]
            yield Site(
                f"{name}.{parameter}",
                "experts",
                role,
                block.layer,
                into,
                out,
                module,
                parts=_parts(role, out, stack),
                parameter=parameter,
                experts=experts,
            )


def _parts(role: str, out: int, stack: Stack) -> dict[str, Part]:
    """Where gate and up lie among the outputs of a projection that computes both."""
    if role not in FUSED:
        return {}
    if stack.interleaved:
        return {half: torch.arange(i, out, 2) for i, half in enumerate(FUSED[role])}
    middle = out // 2
    halves = slice(0, middle), slice(middle, out)
    return dict(zip(FUSED[role], halves, strict=True))
