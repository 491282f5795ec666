"""Where a tensor of a forward comes from: what it takes to have it again in backward."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from petune.training.host_operations import version_of
from petune.training.recompute.random import drawing_from


class Kept:
    """A tensor that backward keeps. It lives as long as what is packed with it."""

    __slots__ = ("__weakref__", "tensor", "version")

    def __init__(self, tensor: Tensor) -> None:
        # without the graph, which would hold the tensor that holds the graph
        self.tensor = tensor.detach()
        self.version = version_of(tensor)

    def copy(self) -> None:
        """Hold a copy, since the tensor is about to change."""
        self.tensor = self.tensor.clone()
        self.version = version_of(self.tensor)

    def value(self) -> Tensor:
        """The tensor as it was in forward.

        Raises:
            RuntimeError: it was changed since, as autograd would say it.
        """
        if version_of(self.tensor) != self.version:
            shape = tuple(self.tensor.shape)
            raise RuntimeError(
                f"a tensor of shape {shape} that backward needs was changed in place after the forward."
            )
        return self.tensor


class Source:
    """Where a tensor comes from.

    Args:
        size: the bytes that keeping it takes.
        version: how often the tensor had been changed when it came from there.
    """

    __slots__ = ("again", "holder", "packed", "size", "version")
    can_compute = True

    def __init__(self, size: int, version: int = 0) -> None:
        self.size, self.version = size, version
        self.holder: weakref.ref[Kept] | None = None
        self.packed = 0
        self.again: Tensor | None = None

    @property
    def price(self) -> int:
        """The bytes that are kept so that it can be computed from its inputs."""
        return 0

    def inputs(self) -> Iterator[Source]:
        """What it is computed from."""
        yield from ()

    def available(self) -> Tensor | None:
        """The tensor itself, where it has not gone and was not changed since."""
        return None

    def kept(self) -> Kept | None:
        """Where it is kept for backward, None if it is not."""
        return None if self.holder is None else self.holder()

    def keep(self, tensor: Tensor) -> Kept:
        """Keep the tensor, which must be the one that comes from here."""
        kept = Kept(tensor)
        self.holder = weakref.ref(kept)
        return kept

    def value(self) -> Tensor:
        """The tensor, as it was kept or computed again. It is remembered while more of backward asks for it."""
        kept = self.kept()
        if kept is not None:
            return kept.value()
        if self.again is not None:
            return self.again
        found = self.compute()
        if self.packed:
            self.again = found
        return found

    def compute(self) -> Tensor:
        """The tensor, computed again."""
        raise NotImplementedError

    def taken(self) -> None:
        """Backward has taken it once."""
        self.packed -= 1
        if self.packed <= 0:
            self.again = None

    def own(self) -> Tensor:
        """The tensor, which whoever asks may change."""
        return self.value().clone()


class Found(Source):
    """A tensor of which is known only that it was there: a product's result, a parameter, an input."""

    __slots__ = ("tensor",)
    can_compute = False

    def __init__(self, tensor: Tensor) -> None:
        lasts = isinstance(tensor, torch.nn.Parameter)
        super().__init__(0 if lasts else tensor.nbytes, version_of(tensor))
        self.tensor = weakref.ref(tensor)

    def available(self) -> Tensor | None:
        return _unchanged(self.tensor(), self.version)


class Blank(Source):
    """Memory that holds nothing yet."""

    __slots__ = ("device", "dtype", "shape", "stride")

    def __init__(self, tensor: Tensor) -> None:
        super().__init__(tensor.nbytes, version_of(tensor))
        self.shape, self.stride = tensor.shape, tensor.stride()
        self.dtype, self.device = tensor.dtype, tensor.device

    def compute(self) -> Tensor:
        return torch.empty_strided(
            self.shape, self.stride, dtype=self.dtype, device=self.device
        )

    def own(self) -> Tensor:
        return self.compute()


class Drawn(Blank):
    """Zeros and ones that were just drawn on the CPU, kept as bits: to draw them again would take a tenth of a step."""

    __slots__ = ("bits",)

    def __init__(self, tensor: Tensor) -> None:
        super().__init__(tensor)
        self.version += 1  # which the caller's tensor has when the drawing is over
        # in the order of memory, whatever that of the dimensions is
        flat = tensor.as_strided((tensor.numel(),), (1,))
        self.bits = np.packbits(flat.bool().numpy())

    @property
    def price(self) -> int:
        return self.bits.nbytes

    def compute(self) -> Tensor:
        drawn = super().compute()
        bits = np.unpackbits(self.bits, count=drawn.numel())
        drawn.as_strided((drawn.numel(),), (1,)).copy_(torch.from_numpy(bits))
        return drawn


class Computed(Source):
    """What an operation gives for some inputs.

    Args:
        args: the operation's inputs, each tensor among them as its source.
        state: the random generator's before it ran, if it draws.
        index: which of several results it is.
    """

    __slots__ = ("args", "index", "kwargs", "operation", "state", "tensor")

    def __init__(
        self,
        tensor: Tensor,
        operation: Callable[..., Any],
        args: list[Any],
        kwargs: dict[str, Any],
        state: Tensor | None = None,
        index: int | None = None,
    ) -> None:
        super().__init__(tensor.nbytes, version_of(tensor))
        self.operation, self.args, self.kwargs = operation, args, kwargs
        self.state, self.index = state, index
        self.tensor = weakref.ref(tensor)

    def available(self) -> Tensor | None:
        return _unchanged(self.tensor(), self.version)

    @property
    def price(self) -> int:
        return 0 if self.state is None else self.state.nbytes

    def inputs(self) -> Iterator[Source]:
        for arg in self.args:
            for one in arg if isinstance(arg, list) else (arg,):
                if isinstance(one, Source):
                    yield one

    def compute(self) -> Tensor:
        args = [_value(arg) for arg in self.args]
        with drawing_from(self.state, args[0]):
            out = self.operation(*args, **self.kwargs)
        found: Tensor = out if self.index is None else out[self.index]
        return found


class Changed(Computed):
    """What an operation is about to make of its first input by changing it in place."""

    __slots__ = ()

    def __init__(self, tensor: Tensor, *more: Any) -> None:
        super().__init__(tensor, *more)
        self.version += 1

    def compute(self) -> Tensor:
        first, *others = self.args
        changed = first.own()
        found: Tensor = self.operation(changed, *map(_value, others), **self.kwargs)
        return found


class View(Source):
    """A part of another tensor's memory, or all of it in another shape."""

    __slots__ = ("base", "offset", "shape", "stride")

    def __init__(self, tensor: Tensor, base: Source) -> None:
        super().__init__(0)
        self.base = base
        self.shape, self.stride = tensor.shape, tensor.stride()
        self.offset = tensor.storage_offset()

    def inputs(self) -> Iterator[Source]:
        yield self.base

    def compute(self) -> Tensor:
        return self.base.value().as_strided(self.shape, self.stride, self.offset)


def _unchanged(tensor: Tensor | None, version: int) -> Tensor | None:
    """A tensor that is there and was not changed since, else None."""
    if tensor is None or version_of(tensor) != version:
        return None
    return tensor


def _value(arg: Any) -> Any:
    if isinstance(arg, Source):
        return arg.value()
    return [_value(one) for one in arg] if isinstance(arg, list) else arg
