"""What holds for one `generate` from its call to its result."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from petune.core.forward.forward_pass import ForwardPass


class Generation:
    """One `generate`. What is switched meanwhile, here or in another thread, it does not see.

    Args:
        board: the model's board.
        forward: what its forwards begin with.
        prompted: how many columns the prompts take, those of virtual tokens included; of an encoder-decoder, those
            that the decoding starts with.
        layout: the virtual tokens among the ids that are generated; None if there are none.
        inserted: the virtual tokens that go in before it begins: the same, or those of an encoder, or of embeddings.
    """

    def __init__(
        self,
        board: Any,
        forward: ForwardPass,
        prompted: int,
        layout: Any = None,
        inserted: Any = None,
    ) -> None:
        self.board, self.forward, self.prompted = board, forward, prompted
        self.layout, self.inserted = layout, inserted
        self.mask: Tensor | None = None
        self.columns = 0

    def begin(self) -> ForwardPass:
        """A forward pass of its own for one of its forwards."""
        return replace(self.forward, inputs={}, notes={})

    def see(self, ids: Any, mask: Any) -> None:
        """Take what a step begins with: all ids so far, (rows, columns), and which of these columns hold tokens, None
        if all do.
        """
        self.columns = ids.shape[1] if isinstance(ids, Tensor) else 0
        self.mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None

    def seen(self, cached: int, given: Tensor) -> int:
        """How many columns came before those of a step.

        Args:
            cached: how many the cache says, if it can.
        """
        return max(cached, self.columns - given.shape[1])

    def at_step(self, forward: ForwardPass, given: Tensor, cached: int) -> ForwardPass:
        """What a step goes by, whose new columns are `given`: rows stand there as often as there are beams, and behind
        the prompts no id is virtual.
        """
        plan = forward.plan
        if plan is not None:
            beams = given.shape[0] // len(plan.names)
            forward = replace(forward, plan=plan.with_beams(beams))
        in_prompts = self.seen(cached, given) < self.prompted
        return replace(forward, may_have_virtual=in_prompts)
