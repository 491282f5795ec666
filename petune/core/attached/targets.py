"""The kinds of module that a tuning is folded into: a linear layer, a norm, a table, or
what a trained copy is of.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from petune.core.attached.cost import Merged
from petune.core.attached.quantized import replace_module, requantized
from petune.core.attached.stacked import ExpertsTarget
from petune.core.attached.target import TRIED, Map, Target, alike
from petune.core.forward.link import Acting, Link
from petune.core.frozen.modules import base_forward, features, is_norm, walk
from petune.core.frozen.norms import probe_norm, swapped, write_norm
from petune.core.frozen.tables import input_table
from petune.core.frozen.weights import (
    compute_dtype,
    is_dense,
    is_quantized,
    linear,
    probe,
    stored,
)
from petune.core.method.copies import TrainedCopy, TrainedParameters
from petune.errors import UnmergeableError


class LinearTarget(Target):
    """A linear layer, which is read off as y = W x + b and written as W and b."""

    def check(self) -> None:
        super().check()
        weight, bias = stored(self.module)
        x = torch.randn(TRIED, weight.shape[1], device=weight.device)
        base = _linear_map(weight, bias)
        self._check_finite([self.adapted(base)(x)])
        if (
            self._dtype() == torch.float16 or self.inside()
        ):  # which overflows where float32 and bfloat16 don't
            merged = self.read()
            self._check_finite(tensor.to(self._dtype()) for tensor in merged)
            self._check_commutes(x, base, _linear_map(*merged))
        if self.quantize and is_quantized(self.module):
            self._stored_anew(weight, bias)  # raises where no quantizer can

    def read(self) -> tuple[Tensor, Tensor]:
        """(W, b) in float32 of the layer with its adapters."""
        return self._read_over(*stored(self.module))

    def _read_over(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return probe(
            self.adapted(_linear_map(weight, bias)), self.module, torch.float32
        )

    def write(self, merged: Merged) -> None:
        before, bias_before = stored(self.module)
        weight, bias = self._read_over(before, bias_before)
        new = self._stored_anew(weight, bias)
        merged.add(self.name, before, weight, stored(new)[0])
        if is_dense(self.module):
            self.module.weight, self.module.bias = (
                new.weight,
                new.bias,
            )  # not in place: it may be tied
        else:
            replace_module(self.model, self.name, self.module, new)

    def _stored_anew(self, weight: Tensor, bias: Tensor) -> nn.Module:
        """A layer of this weight as the result is to be stored."""
        needed = self.module.bias is not None or bool(bias.any())
        given = bias if needed else None
        if self.quantize and is_quantized(self.module):
            return requantized(self.module, weight, given)
        return linear(self.module, weight, given, compute_dtype(self.module))


class QuantizedCopyTarget(LinearTarget):
    """A quantized layer of which a dense copy has been trained, to be quantized again."""

    def read(self) -> tuple[Tensor, Tensor]:
        return stored(_copy_of(self.links))

    def _read_over(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return self.read()


class NormTarget(Target):
    """A norm, which is read off as a scale and a shift of what it normalizes."""

    def check(self) -> None:
        weight, bias = (tensor.to(self._dtype()) for tensor in self.read())
        self._check_finite([weight, bias])
        x = torch.randn(TRIED, len(weight), dtype=weight.dtype, device=weight.device)
        base, merged = base_forward(self.module), self._with(weight, bias)
        if not alike(self.adapted(base)(x), merged(x)):
            raise UnmergeableError(
                f"{self.tuning.method!r} does more to {self.name} than scale and shift it."
            )
        self._check_commutes(x, base, merged)

    def read(self) -> tuple[Tensor, Tensor]:
        """(weight, bias) in float32 with which the norm alone computes what it does with its adapters."""
        base = base_forward(self.module)
        return probe_norm(self.adapted(base), base, self.module)

    def _with(self, weight: Tensor, bias: Tensor) -> Map:
        def norm(x: Tensor) -> Tensor:
            with swapped(self.module, weight, bias):
                out: Tensor = base_forward(self.module)(x)
            return out

        return norm

    def write(self, merged: Merged) -> None:
        write_norm(self.module, *self.read())


class EmbeddingTarget(Target):
    """A table of embeddings, of which every row is read off. A head that is tied to it and is not adapted by the same
    tensors keeps the old table.
    """

    def check(self) -> None:
        super().check()
        rows = torch.arange(
            min(TRIED, self.module.num_embeddings), device=self.module.weight.device
        )
        if not torch.equal(base_forward(self.module)(rows), self.module.weight[rows]):
            raise UnmergeableError(
                f"{self.tuning.method!r} can't be merged here: {self.name} changes its rows."
            )
        self.apart = not all(map(self._follows, self._others()))
        strangers = [m for m in self._others() if features(m) is None]
        if self.apart and strangers:
            raise UnmergeableError(
                f"{self.tuning.method!r} can't be merged here: the table of {self.name} is another embedding's too."
            )

    def _others(self) -> list[nn.Module]:
        """The modules that read the same table, but for the model's own, of which T5's stacks have copies."""
        own = {self.module, input_table(self.model)}
        table = self.module.weight
        return [
            module
            for _, module in walk(self.model)
            if getattr(module, "weight", None) is table and module not in own
        ]

    def _follows(self, other: nn.Module) -> bool:
        """Whether the tuning adapts another module by the same tensors."""
        own = _tensors(self.links)
        links = [link for link in self.tuning.links if link.site.module is other]
        return bool(links) and _tensors(links) == own

    def write(self, merged: Merged) -> None:
        ids = torch.arange(self.module.num_embeddings, device=self.module.weight.device)
        rows = self.adapted(base_forward(self.module))(ids)
        if self.apart:
            self.module.weight = nn.Parameter(rows, requires_grad=False)
        else:
            self.module.weight.copy_(rows)


class CopyTarget(Target):
    """A module of which a copy has been trained, which takes its place."""

    def write(self, merged: Merged) -> None:
        own, dtype = _copy_of(self.links), self._dtype()
        if features(self.module) is not None and is_dense(own):
            weight = stored(own)[0]
            merged.add(
                self.name, stored(self.module)[0], weight, weight.to(dtype).float()
            )
        self.links[
            0
        ].adapter.module = nn.Identity()  # the copy is moved, so that ties survive
        replace_module(
            self.model, self.name, self.module, own.to(dtype).requires_grad_(False)
        )


class ParametersTarget(Target):
    """A module of whose parameters copies have been trained, which are written into it."""

    def write(self, merged: Merged) -> None:
        adapter = self.links[0].adapter
        assert isinstance(adapter, TrainedParameters)
        adapter.write()


def target_of(
    model: Any, tuning: Acting, links: Sequence[Link], quantize: bool
) -> Target:
    """The target that the module of these links is."""
    return _kind(links, quantize)(model, tuning, links, quantize)


def _kind(links: Sequence[Link], quantize: bool) -> type[Target]:
    module = links[0].site.module
    if links[0].site.kind == "experts":
        return ExpertsTarget
    if isinstance(links[0].adapter, TrainedParameters):
        return ParametersTarget
    if isinstance(links[0].adapter, TrainedCopy) and len(links) == 1:
        return QuantizedCopyTarget if quantize and is_quantized(module) else CopyTarget
    if features(module) is not None:
        return LinearTarget
    return NormTarget if is_norm(module) else EmbeddingTarget


def _tensors(links: Sequence[Link]) -> set[int]:
    """The identities of the tensors that adapt a module."""
    return {id(p) for link in links for p in link.adapter.parameters()}


def _copy_of(links: Sequence[Link]) -> nn.Module:
    """The trained copy that takes the module's place."""
    adapter = links[0].adapter
    assert isinstance(adapter, TrainedCopy)
    return adapter.module


def _linear_map(weight: Tensor, bias: Tensor) -> Map:
    return lambda x: F.linear(x, weight, bias)
