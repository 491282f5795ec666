"""Stacked experts as what a tuning is folded into: each is read off as a linear layer, and all are written at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from petune.core.attached.cost import Merged
from petune.core.attached.target import Map, Target, alike
from petune.core.forward.chain import chain
from petune.core.forward.experts import FrozenProjection
from petune.core.forward.forward_pass import ForwardPass
from petune.core.forward.link import Link
from petune.core.frozen.weights import ROWS, stacked
from petune.core.graft.module import graft_of
from petune.core.host.experts import Stack, stacks
from petune.errors import PetuneError, UnmergeableError

TRIED = 2
"""How many random rows each merged expert is tried on."""


class ExpertsTarget(Target):
    """The projections of a module of experts."""

    def check(self) -> None:
        super().check()
        for parameter in self._parameters():
            self._check_projection(parameter)

    def _check_projection(self, parameter: str) -> None:
        weight, bias = self._read(parameter)
        self._check_finite([weight.to(self._dtype()), bias.to(self._dtype())])
        old = Stack(*stacked(self.module, parameter), False, False)
        if stacks(self.module)[parameter].bias is None and bool(bias.any()):
            raise UnmergeableError(
                f"{self.tuning.method!r} has no merged form at {self.name}.{parameter}, which has no bias."
            )
        inside = self._inside(parameter)
        rows = torch.randn(TRIED * len(weight), weight.shape[2], device=weight.device)
        before = self._map(old, [*inside, *self._at(parameter)])(rows)
        after = self._map(Stack(weight, bias, False, False), inside)(rows)
        if inside and not alike(before, after):
            first = inside[0].tuning.name
            raise PetuneError(
                f"merge {first!r} first: {self.tuning.name!r} stands around it and they do not commute."
            )

    def write(self, merged: Merged) -> None:
        for parameter in self._parameters():
            before, _ = stacked(self.module, parameter)
            weight, bias = self._read(parameter)
            old = stacks(self.module)[parameter]
            wanted = (weight.mT if old.transposed else weight).contiguous()
            self._put(parameter, wanted.to(old.weight.dtype))
            if old.bias is not None:
                self._put(f"{parameter}_bias", bias.to(old.bias.dtype))
            after, _ = stacked(self.module, parameter)
            merged.add(f"{self.name}.{parameter}", before, weight, after)

    def _put(self, name: str, value: Tensor) -> None:
        setattr(self.module, name, nn.Parameter(value, requires_grad=False))

    def _parameters(self) -> Iterator[str]:
        """The projections on which the tuning acts."""
        yield from dict.fromkeys(link.site.parameter for link in self.links)

    def _at(self, parameter: str) -> list[Link]:
        return [link for link in self.links if link.site.parameter == parameter]

    def _inside(self, parameter: str) -> list[Link]:
        """The adapters of other tunings that stand inside this one's at a projection."""
        here = [
            link
            for link in graft_of(self.module).attention
            if link.site.parameter == parameter
        ]
        before = here[: here.index(self._at(parameter)[0])]
        return [link for link in before if link.tuning.switched_on]

    def _read(self, parameter: str) -> tuple[Tensor, Tensor]:
        """(W, b) in float32 of a projection with its adapters, (experts, out, in) and (experts, out)."""
        weight, bias = stacked(self.module, parameter)
        experts, _, into = weight.shape
        f = self._map(Stack(weight, bias, False, False), self._at(parameter))
        b = f(weight.new_zeros(experts, into))
        eye = torch.eye(into, device=weight.device)
        some = torch.split(eye, max(1, ROWS // experts))
        columns = [f(rows.repeat(experts, 1)) for rows in some]
        found = [part.view(experts, -1, part.shape[1]) for part in columns]
        return (torch.cat(found, 1) - b[:, None]).mT, b

    def _map(self, stack: Stack, links: Sequence[Link]) -> Map:
        """A projection with adapters around it, for rows of which each expert has as many."""
        forward = ForwardPass(
            None, {link.tuning.name: link.tuning.weight for link in links}
        )

        def f(x: Tensor) -> Tensor:
            experts = len(stack.weight)
            counts = [len(x) // experts] * experts
            call: Any = FrozenProjection(forward, stack, x, counts)
            out: Tensor = chain(links, call)(x)
            return out

        return f
