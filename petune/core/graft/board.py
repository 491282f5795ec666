"""What petune keeps of a model, by how long it lasts: the board as long as anything is attached, a generation for one
`generate`, a forward pass for one forward (`forward/forward_pass.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from petune.core.forward.forward_pass import ForwardPass, part_alone, running
from petune.core.forward.link import Acting, Link
from petune.core.forward.settings import settings_of
from petune.core.graft.gate import Gate


@dataclass(eq=False)
class Board:
    """What all adapted modules of one model share. Switching a tuning changes a flag here, and nothing walks the model.

    Args:
        tunings: what is attached, by name, in the order in which it acts.
        vocabulary: ids from here on stand for virtual tokens.
        causal: the model reads left to right, so that virtual tokens may stand before its first token.
        asked_gradients: which base parameters asked for gradients before the first attach.
        gate: lets forwards in, and attach and detach when none runs.
    """

    tunings: dict[str, Acting] = field(default_factory=dict)
    vocabulary: int = 0
    causal: bool = True
    asked_gradients: dict[str, bool] = field(default_factory=dict)
    gate: Gate = field(default_factory=Gate)

    def begin(self) -> ForwardPass:
        """A forward pass under what is switched on now, in this context."""
        settings = settings_of(self)
        plan = settings.plan
        on = filter(self.is_on, self.tunings.values())
        acting = on if plan is None else map(self.tunings.__getitem__, plan.served)
        weights = {tuning.name: tuning.weight for tuning in acting}
        for name in settings.weights.keys() & weights.keys():
            weights[name] = settings.weights[name]
        return ForwardPass(self, weights, plan)

    def is_on(self, tuning: Acting) -> bool:
        """Whether a tuning acts where nothing is routed: it is switched on, also in this context."""
        return tuning.switched_on and tuning.name not in settings_of(self).off

    def forward_pass(self) -> ForwardPass:
        """The forward that runs in this thread; where a part of the model is called by itself, a new one."""
        return running(self) or part_alone(self.begin())

    def prompts(self, forward: ForwardPass) -> list[Link]:
        """The prompts that act in a forward."""
        acting = map(self.tunings.__getitem__, forward.weights)
        return [link for tuning in acting for link in tuning.prompts]

    def reads_batch(self, forward: ForwardPass) -> bool:
        """Whether an adapter that acts in a forward asks for the batch."""
        return any(self.tunings[name].reads_batch for name in forward.weights)


def board_of(model: nn.Module) -> Board | None:
    """What petune keeps of a model, None if nothing is attached."""
    graft: Any = vars(model).get("petune_graft")
    return graft.board if graft is not None else None
