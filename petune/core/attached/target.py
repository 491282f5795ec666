"""What a tuning is folded into: one module of the base, whatever it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from petune.core.attached.cost import Merged
from petune.core.forward.chain import chain
from petune.core.forward.computation import ModuleForward
from petune.core.forward.forward_pass import ForwardPass
from petune.core.forward.link import Acting, Link
from petune.core.frozen.weights import (
    is_quantized,
)
from petune.core.graft.module import graft_of
from petune.errors import PetuneError

Map = Callable[[Tensor], Tensor]
TRIED = 4
"""How many random rows a merged layer is tried on."""


class Target:
    """One module of the base, and the links of a tuning on it."""

    def __init__(
        self, model: Any, tuning: Acting, links: Sequence[Link], quantize: bool
    ) -> None:
        self.model, self.tuning, self.links, self.quantize = (
            model,
            tuning,
            list(links),
            quantize,
        )
        self.module: Any = links[0].site.module
        self.name = links[0].site.module_name

    def check(self) -> None:
        """See whether it can be written, without changing anything.

        Raises:
            UnmergeableError: the method does more here than a merged module can.
            PetuneError: the result would not be finite.
        """
        tensors = [
            tensor
            for link in self.links
            for tensor in link.adapter.state_dict().values()
        ]
        self._check_finite(
            tensor.to(self._dtype()) for tensor in tensors if tensor.is_floating_point()
        )

    def write(self, merged: Merged) -> None:
        """Put what the module computes with its adapters into the module, and note the cost."""
        raise NotImplementedError

    def _dtype(self) -> torch.dtype:
        """The dtype in which the result is stored."""
        if is_quantized(self.module):
            found: torch.dtype = self.model.dtype
            return found
        return next(self.module.parameters()).dtype

    def _check_finite(self, tensors: Any) -> None:
        if not all(bool(tensor.isfinite().all()) for tensor in tensors):
            raise PetuneError(
                f"{self.name}: the merged weights are not finite; nothing was changed."
            )

    def adapted(
        self, base: Callable[..., Any], links: Sequence[Link] | None = None
    ) -> Map:
        """The computation `base` with adapters around it, by default the target's own, whatever is switched on."""
        around = self.links if links is None else links
        weights = {link.tuning.name: link.tuning.weight for link in around}
        forward = ForwardPass(None, weights)

        def f(x: Tensor) -> Tensor:
            call = ModuleForward(forward, base, (x,), {}, "")
            return chain(around, call)(x)

        return f

    def inside(self) -> list[Link]:
        """The adapters of other tunings that stand inside this one's."""
        everything = graft_of(self.module).links
        before = everything[: everything.index(self.links[0])]
        return [link for link in before if link.tuning.switched_on]

    def _check_commutes(self, x: Tensor, base: Map, merged: Map) -> None:
        """A tuning inside this one will stand around the merged module: that must be the same map."""
        inside = self.inside()
        if not inside:
            return
        before, after = (
            self.adapted(base, [*inside, *self.links])(x),
            self.adapted(merged, inside)(x),
        )
        if not alike(before, after):
            first = inside[0].tuning.name
            raise PetuneError(
                f"merge {first!r} first: {self.tuning.name!r} stands around it and they do not commute."
            )


def alike(one: Tensor, other: Tensor) -> bool:
    near = 1e-3 if one.dtype in (torch.float32, torch.float64) else 3e-2
    return torch.allclose(
        one.float(), other.float(), atol=near * float(one.abs().max()), rtol=near
    )
