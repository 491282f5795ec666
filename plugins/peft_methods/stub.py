"""A site as PEFT sees it."""

from __future__ import annotations

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
        self.last: dict[Stub, Tensor] | None = site.shared("last weight", dict)  # while PEFT makes its layers

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        if self.last is None:
            return self._dense()
        if self not in self.last:
            self.last.clear()
            self.last[self] = self._dense()
        return self.last[self]

    def _dense(self) -> Tensor:
        module, part = self.site.module, self.site.part
        own = isinstance(module, nn.Linear) and type(module.weight) is nn.Parameter
        if own and module.weight.is_floating_point():
            return module.weight.detach().float()[part or slice(None)]
        return self.site.weight()

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        bias = self.site.module.bias
        return bias.detach()[self.site.part or slice(None)] if isinstance(bias, Tensor) else None

    def forward(self, x: Tensor) -> Tensor:
        assert self.inner is not None
        return self.inner(x)


def is_affine(layer: nn.Module, stub: Stub) -> bool:
    """PEFT's layer is an affine map of its input around an affine one."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        x = torch.randn(3, 1, stub.in_features, device=stub.weight.device)
        x[2] = x[0] + x[1]
        saved = {name: p.detach().clone() for name, p in layer.named_parameters()}
        for p in layer.parameters():
            p.add_(torch.randn_like(p) * 0.1)
        stub.inner = lambda x: nn.functional.linear(x, stub.weight)
        mode = layer.training
        zero = layer.eval()(torch.zeros_like(x[:1]))
        one, other, both = layer(x) - zero
        layer.train(mode)
        stub.inner = None
        for name, p in layer.named_parameters():
            p.copy_(saved[name])
    return torch.allclose(one + other, both, rtol=1e-4, atol=1e-4 * float(both.abs().max()))
