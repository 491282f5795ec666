"""How an adapter comes to stand around a module: the module's class gets a mixin, as `parametrize` and FSDP2 do, so
that the base's keys, `isinstance` and checkpoints survive, and taking it off restores the class.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

graft_of = lambda module: vars(module)["petune_graft"]  # noqa: E731
from petune.core.method.adapter import Adapter
from petune.errors import UnsupportedError

if TYPE_CHECKING:
    from petune.core.attached.parts import Part
    from petune.core.attached.tuning import Tuning
    from petune.core.forward.plan import Rows
    from petune.core.frozen.site import Site


Call = Callable[..., Any]


@cache
def _reads(cls: Any) -> bool:
    """The method's `forward` asks for the batch."""
    return "batch" in inspect.signature(cls.forward).parameters


@dataclass(eq=False)
class Link:
    """One adapter at one site. Those of a module act in the order of its list, the first innermost."""

    adapter: Adapter
    site: Site
    tuning: Tuning
    part: Part | None = None
    """The method that it belongs to; None for a module that trains along."""
    stack: str = "decoder"
    """Whose batch it sees."""

    def __post_init__(self) -> None:
        kind: Any = type(self.adapter)
        self.reads = _reads(kind)

    def bound(self, index: Rows | None = None, *args: Any, **kwargs: Any) -> Call:
        """The adapter as it acts: with the batch that it asks for, or the rows `index` of it, and at its weight.
        After `inner` and x it gets what else is given here.
        """
        call: Call = self.adapter
        if args or kwargs:
            call = lambda inner, x: self.adapter(inner, x, *args, **kwargs)  # noqa: E731
        if self.reads:
            batch = graft_of(self.site.module).board.batch.get(self.stack)
            if batch is None:
                raise UnsupportedError(f"{self.tuning.method!r} acts by position: call the model itself, with its "
                                       f"{self.stack}'s input, not {self.site.name}.")  # fmt: skip
            call = partial(call, batch=batch if index is None else batch.rows(index))
        return call if self.tuning.weight == 1 else partial(_weighted, call, self.tuning.weight)

    @property
    def _method(self) -> str:
        return f"{self.part.name}:" if self.part is not None and len(self.tuning.parts) > 1 else ""

    @property
    def label(self) -> str:
        """What tells it from the tuning's others: the site's name, and the method's where there are several."""
        return self._method + self.site.name

    @property
    def key(self) -> str:
        """Where the adapter is registered: one tuning can act twice on a module, on parts or kinds of it."""
        tag = self.site.name.removeprefix(_plain(self.site.name))
        method = f":{self._method}" if self._method else ""
        return (self.tuning.name + method + tag).replace(".", "_")


def _plain(site: str) -> str:
    return site.partition("#")[0].partition("[")[0]


def _weighted(
    adapter: Call, weight: float, inner: Call, x: Tensor, *rest: Any, **others: Any
) -> Tensor:
    """Y + weight (adapter(inner, x) - y), y = inner(x) computed once."""
    y = inner(x, *rest)

    def once(h: Tensor, *more: Any) -> Tensor:
        same = h is x and all(a is b for a, b in zip(more, rest, strict=True))
        return y if same else inner(h, *more)

    return torch.lerp(y, adapter(once, x, *rest, **others).to(y.dtype), weight)
