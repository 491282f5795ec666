"""A site as PEFT sees it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import petune


class Stub(nn.Linear):
    """The frozen layer of a site as an nn.Linear, whatever it is: it computes by `inner` and has no tensors of its own.

    PEFT's layers that read the weight get it dense and float32: the base's own where it is that, else made anew at
    every use, so that a quantized base stays as small as it is.
    """

    def __init__(self, site: petune.Site) -> None:
        nn.Module.__init__(self)  # no weight to allocate
        self.in_features, self.out_features = site.in_features, site.out_features
        self.site = site
        self.inner: petune.Inner | None = None
        # while PEFT makes its layers: the weight of the last stub that was asked for its own
        self.last: dict[Stub, Tensor] | None = site.shared("last weight", dict)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        if self.last is None:
            return self._dense()
        if self not in self.last:
            self.last.clear()
            self.last[self] = self._dense()
        return self.last[self]

    def _dense(self) -> Tensor:
        module: Any = self.site.module
        own = isinstance(module, nn.Linear) and type(module.weight) is nn.Parameter
        if own and module.weight.is_floating_point():
            return self._mine(module.weight.detach().float())
        return self.site.weight()

    def _mine(self, outputs: Tensor) -> Tensor:
        return outputs if self.site.part is None else outputs[self.site.part]

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        bias = self.site.module.bias
        return self._mine(bias.detach()) if isinstance(bias, Tensor) else None

    def forward(self, x: Tensor) -> Tensor:
        assert self.inner is not None
        # some layers add to it in place, and it may be a view, or another row's too
        return self.inner(x).clone()


@contextmanager
def moved(layer: nn.Module, stub: Stub) -> Iterator[Callable[[Tensor], Tensor]]:
    """A layer of PEFT's around its own weight, off its start, while one looks at how it behaves."""
    saved = {name: p.detach().clone() for name, p in layer.named_parameters()}
    mode, stub.inner = layer.training, lambda x: nn.functional.linear(x, stub.weight)
    try:
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(0)
            for p in layer.parameters():
                p.add_(torch.randn_like(p) * 0.1)
            yield layer.eval()
    finally:
        with torch.no_grad():
            for name, p in layer.named_parameters():
                p.copy_(saved[name])
        layer.train(mode)
        stub.inner = None


def is_affine(layer: nn.Module, stub: Stub) -> bool:
    """PEFT's layer is an affine map of its input around an affine one."""
    with moved(layer, stub) as f:
        one, other = rows(stub)
        both = f(one + other) - f(torch.zeros_like(one))
        return close(f(one) + f(other) - 2 * f(torch.zeros_like(one)), both)


def mixes_rows(layer: nn.Module, stub: Stub) -> bool:
    """What PEFT's layer computes for a row depends on the others in the batch."""
    with moved(layer, stub) as f:
        one, other = rows(stub)
        return not close(f(torch.cat([one, other])), torch.cat([f(one), f(other)]))


def rows(stub: Stub) -> tuple[Tensor, Tensor]:
    """Two inputs, (1, 2, in_features) each."""
    one, other = torch.randn(2, 1, 2, stub.in_features, device=stub.weight.device)
    return one, other


def close(one: Tensor, other: Tensor) -> bool:
    """Equal but for rounding."""
    return torch.allclose(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))
