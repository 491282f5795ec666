"""What holds for one forward of a model from its beginning to its end, and in the backward that runs it again."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from petune.core.forward.link import Link
from petune.core.forward.plan import Plan
from petune.core.method.batch import Batch


@dataclass(frozen=True, eq=False)
class ForwardPass:
    """One forward of a model. What is switched meanwhile, here or in another thread, it does not see.

    Args:
        board: the model's board.
        weights: the weight of each tuning that acts, by its name.
        plan: which of them serves each row, None if all rows are alike.
        batches: what adapters may know of the batch, by stack: `encoder` or `decoder`.
        inputs: the last input of a module at which a site begins that ends at another module.
        notes: what the sites of a tuning tell each other, by the tuning's name.
        part_alone: a part of the model was called by itself.
        may_have_virtual: its ids may stand for virtual tokens.
    """

    board: object
    weights: Mapping[str, float]
    plan: Plan | None = None
    batches: Mapping[str, Batch] = field(default_factory=dict)
    inputs: dict[nn.Module | None, Tensor] = field(default_factory=dict)
    notes: dict[str, dict[Any, Any]] = field(default_factory=dict)
    part_alone: bool = False
    may_have_virtual: bool = True

    def acting(self, links: list[Link]) -> list[Link]:
        """Those of the links whose tunings act."""
        return [link for link in links if link.tuning.name in self.weights]

    def notes_of(self, tuning: str) -> dict[Any, Any]:
        """The dict that the sites of a tuning share in this forward."""
        return self.notes.setdefault(tuning, {})


class _Thread(threading.local):
    def __init__(self) -> None:
        self.running: ForwardPass | None = None
        self.inputs: dict[Any, Tensor] = {}


_thread = _Thread()


def running(board: object) -> ForwardPass | None:
    """The forward of the board's model that runs in this thread, None outside one."""
    found = _thread.running
    return found if found is not None and found.board is board else None


def part_alone(forward: ForwardPass) -> ForwardPass:
    """The same for a part of the model that is called by itself: its modules share no pass, but what they have seen."""
    return replace(forward, part_alone=True, inputs=_thread.inputs)


@contextmanager
def run(forward: ForwardPass) -> Iterator[None]:
    """Within the context `forward` is the one that runs in this thread."""
    before, _thread.running = _thread.running, forward
    try:
        yield
    finally:
        _thread.running = before


class Remembering:
    """Gradient checkpointing that runs a block again as the forward it belongs to ran it, whatever has been switched
    since and whichever thread runs the backward.

    Args:
        checkpoint: what it was: (function, *inputs) -> the function's result.
    """

    def __init__(self, checkpoint: Callable[..., Any]) -> None:
        self.checkpoint = checkpoint

    @classmethod
    def around(cls, checkpoint: Callable[..., Any]) -> Remembering:
        """The same that remembers, if it does not yet."""
        return checkpoint if isinstance(checkpoint, Remembering) else cls(checkpoint)

    def __call__(
        self, function: Callable[..., Any], *inputs: Any, **options: Any
    ) -> Any:
        forward = _thread.running
        if forward is not None:
            function = partial(_again, forward, function)
        return self.checkpoint(function, *inputs, **options)


def _again(
    forward: ForwardPass, function: Callable[..., Any], *inputs: Any, **others: Any
) -> Any:
    with run(forward):
        return function(*inputs, **others)
