"""What one training step holds in memory, measured on the step itself."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def measure_step(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor]) -> tuple[int, int]:
    """(peak_memory_bytes, saved_activation_bytes) of one forward, backward and optimizer step.

    The peak is what the allocator reports on CUDA; on the CPU it is the most bytes of tensor storages alive at once:
    those of the model, gradients and optimizer, and all that the step makes. What a kernel allocates inside itself
    is not seen there. Saved activations are the storages that autograd keeps when the forward is over, parameters,
    buffers and quantized weights left out; each storage counts once.

    The learning rate is 0 in this step, so the parameters stay what they are. Gradients are cleared.
    """
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] * 0
    optimizer.zero_grad(set_to_none=True)
    resident = _Storages(_tensors(model))
    resident.add(_tensors([optimizer.param_groups, dict(optimizer.state)]))
    saved = _Storages(())
    cuda = next(model.parameters()).is_cuda
    watch = _Live(resident)

    def pack(tensor: Tensor) -> Tensor:
        saved.add(t for t in _parts(tensor) if t.untyped_storage()._cdata not in resident.sizes)
        return tensor

    def step() -> None:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            value = loss()
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    try:
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            step()
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated()
        else:
            with watch:
                step()
            peak = watch.peak
    finally:
        optimizer.zero_grad(set_to_none=True)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
    return peak, saved.total


class _Storages:
    """Storages by identity. Those given are taken to stay alive for as long as this is used."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.sizes: dict[int, int] = {}
        self.add(tensors)

    def add(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self.sizes[storage._cdata] = storage.nbytes()

    @property
    def total(self) -> int:
        return sum(self.sizes.values())


class _Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows every storage that an operation meets until it is freed."""

    def __init__(self, resident: _Storages) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sizes = dict(resident.sizes)
        self.now = self.peak = resident.total

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, out)):  # arguments too: the batch was there before
            if isinstance(tensor, Tensor):
                for part in _parts(tensor):
                    self._follow(part)
        return out

    def _follow(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        old = self.sizes.get(key)
        if old is None:
            # the Python object of a storage lives as long as the storage itself, also while only C++ holds it
            weakref.finalize(storage, self._freed, key)
        if old != size:
            self.sizes[key] = size
            self.now += size - (old or 0)
            self.peak = max(self.peak, self.now)

    def _freed(self, key: int) -> None:
        self.now -= self.sizes.pop(key, 0)


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors that a tensor subclass is made of."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _parts(getattr(tensor, name))
    else:
        yield tensor


def _tensors(thing: Any, seen: set[int] | None = None, inside_tensor: bool = False) -> Iterator[Tensor]:
    """All tensors in reach: parameters, buffers, gradients, optimizer states, what quantized weights carry along."""
    seen = set() if seen is None else seen
    if id(thing) in seen:
        return
    seen.add(id(thing))
    inner: Iterable[Any] = ()
    if isinstance(thing, Tensor):
        yield from _parts(thing)
        if thing.is_leaf and thing.grad is not None:
            yield from _parts(thing.grad)
        inside_tensor, inner = True, getattr(thing, "__dict__", {}).values()
    elif isinstance(thing, dict):
        inner = thing.values()
    elif isinstance(thing, list | tuple):
        inner = thing
    elif isinstance(thing, nn.Module) or inside_tensor:
        inner = getattr(thing, "__dict__", {}).values()
    for item in list(inner):
        yield from _tensors(item, seen, inside_tensor)
