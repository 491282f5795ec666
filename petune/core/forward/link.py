"""One adapter at one site, and the half of a tuning that acts in a forward."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

from petune.core.frozen.site import Site
from petune.core.method.adapter import Adapter
from petune.errors import PetuneError, UnsupportedError

Call = Callable[..., Any]
LARGEST = torch.finfo(torch.float32).max
"""Beyond it a weight is infinite in a forward."""


class Acting:
    """What of a tuning acts in a forward: its links, whether it is switched on, and its weight.

    Args:
        name: the tuning's name on its model.
        method: the name of its method, for messages.
    """

    def __init__(self, name: str, method: str) -> None:
        self.name, self.method = name, method
        self.links: list[Link] = []
        self.switched_on = True
        self._weight = 1.0

    @property
    def prompts(self) -> list[Link]:
        """The links that put virtual tokens before the input."""
        return [link for link in self.links if link.site.kind == "prompt"]

    @property
    def reads_batch(self) -> bool:
        """Whether an adapter of it asks for the batch."""
        return any(link.reads_batch for link in self.links)

    @property
    def shares_notes(self) -> bool:
        """Whether its sites tell each other something within a forward."""
        return any(link.takes_notes for link in self.links)

    @property
    def weight(self) -> float:
        """How much of the tuning acts: at each site y = inner(x) + weight (adapter(inner, x) - inner(x)). So tunings
        that add something, stacked, are their weighted sum.
        """
        return self._weight

    @weight.setter
    def weight(self, weight: float) -> None:
        self._weight = self.checked_weight(weight)

    def checked_weight(self, weight: float) -> float:
        """The weight as a float.

        Raises:
            PetuneError: it is no finite number.
            UnsupportedError: the tuning has virtual tokens, and the weight is not 1.
        """
        if not isinstance(weight, int | float) or not abs(weight) <= LARGEST:
            raise PetuneError(
                f"weight={weight!r} of tuning {self.name!r}: wanted is a finite number."
            )
        if self.prompts and weight != 1:
            raise UnsupportedError(
                f"tuning {self.name!r} puts tokens before the input, which have no weighted form."
            )
        return float(weight)


@cache
def _keywords(cls: Any) -> frozenset[str]:
    """What the method's `forward` asks for besides its input: `batch`, `notes`, `experts`."""
    return frozenset(
        {"batch", "notes", "experts"} & set(inspect.signature(cls.forward).parameters)
    )


def takes_experts(cls: Any) -> bool:
    """Whether a method has a form for stacked experts: its `forward` asks how many rows are whose."""
    return "experts" in _keywords(cls)


@dataclass(eq=False)
class Link:
    """One adapter at one site. The links of a module act in the order of its list, the first innermost.

    Args:
        tuning: the tuning that it belongs to.
        method: the name of its method; "" for a module that trains along.
        label: what tells it from the tuning's other links: its site's name, and where the tuning has several
            methods the method's name before it.
        stack: of an encoder-decoder's two stacks of blocks, the one that holds the site.
        methods: what takes the place of the module's own methods while this attention adapter is there, by name.
    """

    adapter: Adapter
    site: Site
    tuning: Acting
    method: str = ""
    label: str = ""
    stack: str = "decoder"
    methods: Mapping[str, Call] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.label = self.label or self.site.name
        kind: Any = type(self.adapter)
        asked = _keywords(kind)
        self.reads_batch, self.takes_notes = "batch" in asked, "notes" in asked

    @property
    def key(self) -> str:
        """The name under which the adapter is registered on its module. One tuning can act twice on a module: on
        parts of a fused projection, or on the module as a layer and as an attention.
        """
        what = self.label.replace(self.site.module_name, "", 1)
        separator = ":" if self.label != self.site.name else ""
        return (self.tuning.name + separator + what).replace(".", "_")
